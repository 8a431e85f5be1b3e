"""How likely given tokens are to come next after each of many rows: a verdict in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.find_head import find_head
from mlxdpo.forward.levels import STRANGE
from mlxdpo.forward.patch_mlx_lm import attention_files, patched
from mlxdpo.forward.shared_prefix import prefixed_states, whole_logits
from mlxdpo.model.adapters import dropout_off

Logits = Callable[[], mx.array]
"""Gives (n, V) float32 logits."""


def logits_at(
    model: nn.Module, tokens: mx.array, rows: mx.array, columns: mx.array, prefix: mx.array | None = None
) -> Logits:
    """Logits at the positions `rows`, `columns`, each (n,), of `tokens` (R, T), which a function gives when it is
    called: only these meet the head. `prefix` (1, P) are tokens before all rows, computed once.

    The states are computed here, with the adapters of now; where the head cannot be found, all when it is called.
    """
    before = tokens[:1, :0] if prefix is None else prefix
    spread = lambda a: mx.broadcast_to(a, (tokens.shape[0], *a.shape[1:]))  # noqa: E731
    with dropout_off(model), patched(attention_files(model)):
        try:
            head = find_head(model)
            states = prefixed_states(model, head, before, tokens, spread)[rows, columns]
        except STRANGE:
            whole = mx.concatenate([spread(before), tokens], axis=1)
            return lambda: _whole_logits_at(model, whole, rows, columns + before.shape[1])
        mx.eval(states)
    return lambda: heads.logits(head, states)


def _whole_logits_at(model: nn.Module, tokens: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    with dropout_off(model):
        return whole_logits(model, tokens)[rows, columns].astype(mx.float32)


def next_logits(model: nn.Module, rows: Sequence[Sequence[int]], ids: Sequence[int], tokens: int = 4096) -> np.ndarray:
    """(N, len(ids)) float32 logits of the tokens `ids` right behind each of N rows of token ids.

    Rows of like length are computed together, about `tokens` tokens at once, padded on the right, which a causal
    model does not see. Only the last position of each row meets the head.
    """
    result = np.zeros((len(rows), len(ids)), np.float32)
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
    last = mx.array([len(row) - 1 for row in rows])
    logits = logits_at(model, mx.array(padded), mx.arange(len(rows)), last)()
    return np.array(logits[:, mx.array(list(ids))])
