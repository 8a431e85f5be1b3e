"""The frozen reference, scored once: its log-probs come from the starting weights before anything is attached.

They are kept on disk per *row*, under a digest of what was really scored (prompt ids, completion ids) in a table named
by everything else that changes a log-prob (weights, adapter, dtype, quantisation, library versions, device). So
another beta, seed, learning rate, objective, or a grown data set scores nothing twice, and a stale hit cannot happen.
Source of the need: arXiv 2305.18290 eq. 7, where the reference enters as constants.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdpo.config import Config, ModelConfig
from mlxdpo.data.batch_shapes import BatchShape
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import Examples, row_digest
from mlxdpo.data.planning import Indices
from mlxdpo.data.template import template_digest
from mlxdpo.distributed.group import ALONE, Group
from mlxdpo.io.atomic import write_json
from mlxdpo.io.checksum import has_checksum, load_checksummed, save_checksummed
from mlxdpo.io.digest import json_digest
from mlxdpo.machine.device import cache_folder, this_machine, versions
from mlxdpo.model.adapters import load_adapter
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.types import Batch, Example, Pairs, UserError

__all__ = ["digest_of", "identity_of", "read_table", "row_digest", "with_reference", "write_table"]

SAVE_SECONDS = 30.0  # what an interrupted scoring may lose
ROUND = 4  # batches of each process between two meetings, where several processes score
TICKS = 1000  # yields for batches that cost nothing: as many as a progress bar can show
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
    return json_digest(identity)[:32]


def read_table(file: Path) -> Table:
    """Rows scored so far; empty when there is no table."""
    keys, values = _read_arrays(file)
    return dict(zip(_bytes_of(keys), values.tolist(), strict=True))


def _read_arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """A table's row digests (M,) S16, ascending, and their log-probs (M,) float32.

    Raises `UserError` for a damaged table: a wrong log-prob of the reference would be trained against, and not seen.
    """
    try:
        if not (
            file.exists() and has_checksum(file)
        ):  # one without a checksum is not known to be whole: it is scored again
            return np.zeros(0, "S16"), np.zeros(0, np.float32)
        arrays = load_checksummed(file)
    except UserError as error:
        raise UserError(f"{error}, or delete it, and its rows are scored again") from None
    keys = _keys(np.array(arrays["rows"]))
    order = np.argsort(keys, kind="stable")
    return keys[order], np.array(arrays["logps"])[order]


def _keys(rows: np.ndarray) -> np.ndarray:
    """Digests (..., 16) uint8 as (...,) byte strings, which NumPy sorts and searches."""
    return np.ascontiguousarray(rows).view("S16")[..., 0]


def _bytes_of(keys: np.ndarray) -> list[bytes]:
    raw = keys.tobytes()  # `tolist` would strip a digest's last zeros
    return [raw[at : at + 16] for at in range(0, len(raw), 16)]


def write_table(file: Path, table: Table, identity: Mapping[str, Any]) -> None:
    """Save the table with what another process added meanwhile, and say beside it whose it is."""
    known, logps = _read_arrays(file)
    fresh = _keys(np.frombuffer(b"".join(table), np.uint8).reshape(-1, 16))
    keys, first = np.unique(np.concatenate([fresh, known]), return_index=True)
    values = np.concatenate([np.array(list(table.values()), np.float32), logps])[first]
    arrays = {"rows": mx.array(keys.view(np.uint8).reshape(-1, 16)), "logps": mx.array(values)}
    save_checksummed(file, arrays)
    write_json(file.with_suffix(".json"), dict(identity))


def with_reference(
    examples: Sequence[Example],
    scorer: Scorer,
    identity: Mapping[str, Any],
    batches: Sequence[Indices],
    batch_size: int,
    frames: Sequence[BatchShape] = (),
    rows: np.ndarray | None = None,
    peers: Group = ALONE,
) -> Generator[tuple[int, np.ndarray | None], None, None]:
    """Score what the table lacks, batch by batch, saving as it goes.

    Yields (pairs done, None) and at last (N, logps) with logps (N, 2) float32: chosen, rejected, nats; NaN for pairs
    that are in no batch. With `rows` of `shared_rows` (LD-DPO), logps (N, 4), and the scorer gives `Pairs.shared`.
    Of the batches that the table holds already, about a thousand are reported.
    `batches` and `frames` are the ones training will see first: the same shapes give the same rounding, so a policy
    that has not moved differs from its reference by exactly nothing. Several processes share the batches; the table is
    process 0's.
    """
    file = cache_folder() / "reference" / f"{digest_of(identity)}.safetensors"
    # Every distinct row once: a completion in ten pairs has one place in `logps` and `known`.
    rows = Examples.of(examples).rows if rows is None else rows
    keys, place = np.unique(_keys(rows), return_inverse=True)
    place = place.reshape(rows.shape[:2])
    logps, known = _look_up(keys, file) if peers.first else (np.zeros(len(keys), np.float32), np.zeros(len(keys), bool))
    if peers.size > 1:
        both = peers.sum({"logps": mx.array(logps), "known": mx.array(known.astype(np.uint8))})
        logps, known = np.array(both["logps"]), np.array(both["known"]) > 0
    score_one = functools.partial(_score, examples, scorer, batch_size, frames, rows.shape[1])
    ahead: dict[int, np.ndarray] = {}
    held: list[bool] = np.all(known[place], axis=1).tolist()
    done, saved, tick = 0, time.monotonic(), -(-len(batches) // TICKS)
    fresh: Table = {}
    try:
        for number, indices in enumerate(batches):
            score = not all(map(held.__getitem__, indices)) and not known[place[list(indices)]].all()
            if score:
                at = place[list(indices)]
                if number not in ahead:
                    ahead = _round(batches, number, place, known, score_one, peers)
                both = ahead.pop(number)
                logps[at], known[at] = both, True
                if peers.first:
                    fresh.update(zip(_bytes_of(keys[at]), both.reshape(-1).tolist(), strict=True))
            done += len(indices)
            if fresh and time.monotonic() - saved > SAVE_SECONDS:
                write_table(file, fresh, identity)
                fresh, saved = {}, time.monotonic()
            if score or number % tick == 0:
                yield done, None
    finally:  # also when the caller stops in the middle: what was scored is not scored again
        if fresh:
            write_table(file, fresh, identity)
    yield done, logps[place]


def _score(
    examples: Sequence[Example], scorer: Scorer, size: int, frames: Sequence[BatchShape], columns: int, indices: Indices
) -> np.ndarray:
    """(pairs, columns) log-probs of one batch."""
    pairs = scorer(collate(examples, indices, size, shapes=frames))
    return np.stack(_columns(pairs)[:columns], axis=1)[: len(indices)]


def _round(
    batches: Sequence[Indices],
    start: int,
    place: np.ndarray,
    known: np.ndarray,
    score_one: Callable[[Indices], np.ndarray],
    peers: Group,
) -> dict[int, np.ndarray]:
    """Log-probs by number of the batch: of `start` alone, or of the next that one process would score from there on,
    each scored by one of several."""
    if peers.size == 1:
        return {start: score_one(batches[start])}
    numbers = _batches_to_score(batches, start, place, known, ROUND * peers.size)
    found = np.zeros((len(numbers), max(len(batches[n]) for n in numbers), place.shape[1]), np.float32)
    mine = peers.mine([len(batches[n]) for n in numbers])
    for values, number, own in zip(found, numbers, mine, strict=True):
        if own:
            values[: len(batches[number])] = score_one(batches[number])
    summed = np.array(peers.sum(mx.array(found)))
    return {n: values[: len(batches[n])] for n, values in zip(numbers, summed, strict=True)}


def _batches_to_score(
    batches: Sequence[Indices], start: int, place: np.ndarray, known: np.ndarray, most: int
) -> list[int]:
    """The numbers of the next batches, from `start` on, that hold a row which no batch before them has."""
    numbers: list[int] = []
    seen: set[int] = set()
    for number in range(start, len(batches)):
        rows = place[list(batches[number])].ravel()
        if new := set(rows[~known[rows]].tolist()) - seen:
            numbers.append(number)
            seen |= new
        if len(numbers) == most:
            break
    return numbers


def _columns(pairs: Pairs) -> list[np.ndarray]:
    return [np.array(a) for a in (pairs.chosen, pairs.rejected, *(() if pairs.shared is None else pairs.shared))]


def shared_rows(examples: Sequence[Example]) -> np.ndarray:
    """(N, 4, 16) digests of each pair's two rows, and of the same cut to their first min(|chosen|, |rejected|) scored
    tokens.

    The log-prob of a completion's beginning is that of the row that ends there: it is kept as such.
    """
    pairs = Examples.of(examples)
    shorter = pairs.scored.min(axis=1).tolist()
    cut = [
        _digest_of_beginning(pair.prompt, *side, most)
        for pair, most in zip(pairs, shorter, strict=True)
        for side in ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask))
    ]
    return np.concatenate([pairs.rows, np.frombuffer(b"".join(cut), np.uint8).reshape(-1, 2, 16)], axis=1)


def _digest_of_beginning(prompt: np.ndarray, completion: np.ndarray, mask: np.ndarray | None, most: int) -> bytes:
    """Of a row cut behind its first `most` scored tokens."""
    if mask is None:
        return row_digest(prompt, completion[:most])
    end = int(np.flatnonzero(mask)[most - 1]) + 1
    return row_digest(prompt, completion[:end], mask[:end])


def _look_up(keys: np.ndarray, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of the rows `keys` (U,), NaN where the table has none, and which it has (a log-prob may be NaN)."""
    table, values = _read_arrays(file)
    logps, known = np.full(len(keys), np.nan, np.float32), np.zeros(len(keys), bool)
    if len(table):
        found = np.minimum(table.searchsorted(keys), len(table) - 1)
        known = table[found] == keys
        logps[known] = values[found[known]]
    return logps, known


def find_reference(config: Config, policy: Policy) -> tuple[Policy, str | None]:
    """The reference model and the adapter folder it includes. By default the policy itself, before its first update.

    Raises `UserError` when the named reference reads text differently.
    """
    named = config.reference
    if named.model is None:
        if named.adapter is not None:
            raise UserError(
                f"reference.adapter {named.adapter} needs reference.model as well; "
                f"to start from an adapter and keep it as the reference, use model.adapter"
            )
        return policy, config.model.adapter
    # The run's own model under another adapter is the same weights: same revision, quantised the same way.
    same = config.model.model_copy(update={"adapter": None}) if named.model == config.model.path else None
    other = load_policy(same or ModelConfig(path=named.model, dtype=config.model.dtype))
    if template_digest(other.tokenizer, config.data) != template_digest(policy.tokenizer, config.data):
        raise UserError(f"reference.model {named.model} has another tokenizer or template than {config.model.path}")
    if named.adapter is not None:
        load_adapter(other.model, Path(named.adapter))
    return other, named.adapter
