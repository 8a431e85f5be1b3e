"""Which rows a model can take: how long they may be, and which token ids it has a row of its embedding for.

MLX reads foreign memory for an id beyond the embedding, or dies: so ids are compared before anything is computed.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from mlxdpo.model.model_config import ModelReading
from mlxdpo.model.policy import Policy
from mlxdpo.types import UserError


def check_takes(policy: Policy, longest: int, largest: int) -> None:
    """Raise `UserError` for rows that would be computed as something else than meant.

    `longest` is the number of tokens of the longest row, `largest` the largest token id of all.
    """
    check_length(policy.reading, longest)
    check_ids(policy.model, largest, policy.tokenizer)


def check_length(reading: ModelReading, longest: int) -> None:
    """Raise `UserError` for rows longer than those that are computed as transformers does."""
    limit = reading.longest
    if limit is not None and longest > limit:
        raise UserError(f"a row has {longest} tokens, but beyond {limit} {reading.why}; set data.max_length {limit}")


def check_ids(model: nn.Module, largest: int, tokenizer: Any = None) -> None:
    """Raise `UserError` for a token id that the model has no row for."""
    rows = embedding_rows(model)
    if largest < rows:
        return
    name = "" if tokenizer is None else f" ({str(tokenizer.convert_ids_to_tokens(largest))[:40]})"
    raise UserError(
        f"token {largest}{name} is in the data, and the model's embedding has {rows} rows: its tokenizer was given "
        f"tokens that it was not; take them out of tokenizer and data, or save the model again after transformers' "
        f"resize_token_embeddings({largest + 1}) and train the new rows too (lora.method full)"
    )


def embedding_rows(model: nn.Module) -> int:
    """Rows of the embedding: token ids are below."""
    tables = [m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]
    args = getattr(model, "args", None)
    named = getattr(args, "vocab_size", 0)
    return int(named) if named in tables else max(tables, default=1 << 31)
