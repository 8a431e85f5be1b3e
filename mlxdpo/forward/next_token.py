"""How likely given tokens are to come next after each of many rows: a verdict in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.architectures import model_parts
from mlxdpo.forward.shared_prefix import hidden_states
from mlxdpo.model.adapters import dropout_off


def next_logits(model: nn.Module, rows: Sequence[Sequence[int]], ids: Sequence[int], tokens: int = 4096) -> np.ndarray:
    """(N, len(ids)) float32 logits of the tokens `ids` right behind each of N rows of token ids.

    Rows of like length are computed together, about `tokens` tokens at once, padded on the right, which a causal
    model does not see. Only the last position of each row meets the head.
    """
    result = np.zeros((len(rows), len(ids)), np.float32)
    with dropout_off(model):
        for indices in _like_lengths([len(row) for row in rows], tokens):
            result[indices] = _next_of_rows(model, [rows[i] for i in indices], ids)
    return result


def _like_lengths(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    portions: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if portions and (len(portions[-1]) + 1) * lengths[portions[-1][0]] <= tokens:
            portions[-1].append(i)
        else:
            portions.append([i])
    return portions


def _next_of_rows(model: nn.Module, rows: list[Sequence[int]], ids: Sequence[int]) -> np.ndarray:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, given in zip(padded, rows, strict=True):
        row[: len(given)] = given
    last, tokens = mx.array([len(row) - 1 for row in rows]), mx.array(padded)
    if (parts := model_parts(model)) is not None:
        states = hidden_states(parts, tokens[:, :0], tokens, lambda h: h)
        logits = heads.logits(parts.head, parts.norm(states[mx.arange(len(rows)), last]))
    else:
        logits = model(tokens)[mx.arange(len(rows)), last]
    return np.array(logits[:, mx.array(list(ids))].astype(mx.float32))
