"""The frozen reference, scored once: its log-probs come from the starting weights before anything is attached.

They are kept on disk per *row*, under a digest of what was really scored (prompt ids, completion ids) in a table named
by everything else that changes a log-prob (weights, adapter, dtype, quantisation, library versions, device). So
another beta, seed, learning rate, objective, or a grown data set scores nothing twice, and a stale hit cannot happen.
Source of the need: arXiv 2305.18290 eq. 7, where the reference enters as constants.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdpo.data.batching import Indices, collate
from mlxdpo.platform import cache_folder, this_machine, versions
from mlxdpo.runs import write_atomic, write_json
from mlxdpo.types import Batch, Example, Pairs

SAVE_SECONDS = 30.0  # what an interrupted scoring may lose
Table = dict[bytes, float]
Scorer = Callable[[Batch], Pairs]


def identity_of(base: Mapping[str, Any], adapter_digest: str | None) -> dict[str, Any]:
    """Everything but the tokens that changes a log-prob: `base` is a policy's identity."""
    numbers = {k: base[k] for k in ("digest", "dtype", "quantization")}
    made_by = {k: v for k, v in versions().items() if k in ("mlx", "mlx-lm")}
    return {
        **numbers,
        "adapter": adapter_digest,
        **made_by,
        "device": this_machine().kind,
        "value": "summed, nats; blocked log-sum-exp",
    }


def digest_of(identity: Mapping[str, Any]) -> str:
    """The name of a reference's table."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def row_digest(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """16 bytes for a row: its token ids and where its completion begins."""
    ids = np.concatenate([[len(prompt)], prompt, completion]).astype("<i4")
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def read_table(file: Path) -> Table:
    """Rows scored so far; empty when there is no table."""
    if not file.exists():
        return {}
    arrays: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
    keys, values = np.array(arrays["rows"]), np.array(arrays["logps"])
    return {keys[i].tobytes(): float(values[i]) for i in range(len(values))}


def write_table(file: Path, table: Table, identity: Mapping[str, Any]) -> None:
    """Save the table with what another process added meanwhile, and say beside it whose it is."""
    merged = read_table(file) | table
    keys = np.frombuffer(b"".join(merged), np.uint8).reshape(-1, 16)
    arrays = {"rows": mx.array(keys), "logps": mx.array(np.array(list(merged.values()), np.float32))}
    write_atomic(file, lambda temporary: mx.save_safetensors(str(temporary), arrays))
    write_json(file.with_suffix(".json"), dict(identity))


def with_reference(
    examples: Sequence[Example],
    scorer: Scorer,
    identity: Mapping[str, Any],
    batches: Sequence[Indices],
    batch_size: int,
) -> Generator[tuple[int, np.ndarray | None], None, None]:
    """Score what the table lacks, batch by batch, saving as it goes.

    Yields (pairs done, None) and at last (N, logps) with logps (N, 2) float32: chosen, rejected, nats; NaN for pairs
    that are in no batch.
    `batches` are the ones training will see first: the same shapes give the same rounding, so a policy that has not
    moved differs from its reference by exactly nothing.
    """
    file = cache_folder() / "reference" / f"{digest_of(identity)}.safetensors"
    table, done, saved = read_table(file), 0, time.monotonic()
    keys = [(row_digest(e.prompt, e.chosen), row_digest(e.prompt, e.rejected)) for e in examples]
    fresh: Table = {}
    try:
        for indices in batches:
            if any(key not in table for i in indices for key in keys[i]):
                pairs = scorer(collate(examples, indices, batch_size))
                for i, chosen, rejected in zip(indices, pairs.chosen.tolist(), pairs.rejected.tolist(), strict=False):
                    fresh.update(zip(keys[i], (chosen, rejected), strict=True))
                table |= fresh
            done += len(indices)
            if fresh and time.monotonic() - saved > SAVE_SECONDS:
                write_table(file, fresh, identity)
                fresh, saved = {}, time.monotonic()
            yield done, None
    finally:  # also when the caller stops in the middle: what was scored is not scored again
        if fresh:
            write_table(file, fresh, identity)
    yield done, np.array([[table.get(c, np.nan), table.get(r, np.nan)] for c, r in keys], np.float32).reshape(-1, 2)
