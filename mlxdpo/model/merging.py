"""Merging by name: TIES and DARE, through PEFT's own functions where torch is installed.

They act on what adapters add to the weights: TIES (arXiv 2306.01708) keeps the largest entries of each and those of the
majority's sign, DARE (arXiv 2311.03099) drops entries at random and scales up the rest. What comes out has any rank, so
the adapter made of it is the nearest of the summed rank (singular values), and the share that it keeps is said.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.config import LoraConfig
from mlxdpo.io.checksum import load_checksummed
from mlxdpo.model.adapters import WEIGHTS, read_settings
from mlxdpo.model.strength import Arrays, weighted_sum
from mlxdpo.types import UserError

MergeMethod = Literal["linear", "ties", "dare_linear", "dare_ties"]


class Merged(NamedTuple):
    """An adapter made of others: settings, arrays, and the share of the merged update (squared norm) that it keeps."""

    lora: LoraConfig
    arrays: Arrays
    kept: float


def merge_adapters(terms: Sequence[tuple[Path, float]], method: MergeMethod, density: float, seed: int) -> Merged:
    """Merge the adapters in several folders, each with its weight. `linear` is exact (`weighted_sum`).

    `density` is the share of entries that the others keep. Raises `UserError` for adapters of unlike layers, DoRA, a
    density that is none, and where PEFT is not installed.
    """
    lora, arrays = weighted_sum(terms)
    if method == "linear":
        return Merged(lora, arrays, 1.0)
    if not 0 < density <= 1:
        raise UserError(f"--density is {density:g}; expected a share above 0, up to 1")
    if any(importlib.util.find_spec(name) is None for name in ("torch", "peft")):
        raise UserError(f"--method {method} is PEFT's; run `pip install peft torch`, or use --method linear")
    torch = importlib.import_module("torch")
    torch.manual_seed(seed)
    merge = partial(_by_peft, torch, method, density, [weight for _, weight in terms])
    loaded = [(read_settings(folder).multiplier, load_checksummed(folder / WEIGHTS)) for folder, _ in terms]
    kept = whole = 0.0
    for name in arrays:
        if not name.endswith(".lora_b"):
            continue
        a_name = f"{name.removesuffix('b')}a"
        made, near, total = _merge_module([(s, one[a_name], one[name]) for s, one in loaded], lora.rank, merge)
        arrays[a_name], arrays[name] = made
        kept, whole = kept + near, whole + total
    return Merged(lora, arrays, kept / whole if whole else 1.0)


def _by_peft(torch: Any, method: str, density: float, weights: list[float], deltas: list[np.ndarray]) -> np.ndarray:
    merge = getattr(importlib.import_module("peft.utils.merge_utils"), method)
    tensors = [torch.from_numpy(np.ascontiguousarray(delta, np.float32)) for delta in deltas]
    return merge(tensors, torch.tensor(weights, dtype=torch.float32), density).numpy()


def _merge_module(
    parts: Sequence[tuple[float, mx.array, mx.array]], rank: int, merge: Callable[[list[np.ndarray]], np.ndarray]
) -> tuple[tuple[mx.array, mx.array], float, float]:
    """A and B of one module's merge, the squared norm that they keep, and that of the merge; experts one by one."""
    if parts[0][2].ndim == 2:
        deltas = [scale * np.array(a, np.float32) @ np.array(b, np.float32) for scale, a, b in parts]
        a, b, kept, whole = _nearest(merge(deltas), rank)
        return (mx.array(a), mx.array(b)), kept, whole
    found = []
    for e in range(len(parts[0][2])):  # A is kept as (E, r, in) or (E * r, in), B as (E, out, r)
        deltas = [
            scale * (np.array(b[e], np.float32) @ np.array(a.reshape(len(b), -1, a.shape[-1])[e], np.float32)).T
            for scale, a, b in parts
        ]
        found.append(_nearest(merge(deltas), rank))
    join = np.concatenate if parts[0][1].ndim == 2 else np.stack
    a, b = join([one[0].T for one in found]), np.stack([one[1].T for one in found])
    return (mx.array(a), mx.array(b)), sum(one[2] for one in found), sum(one[3] for one in found)


def _nearest(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(in, r), (r, out) whose product is nearest to `delta` (in, out); the squared norm kept, and the whole one."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    root = np.sqrt(s[:rank])
    a, b = u[:, :rank] * root, root[:, None] * v[:rank]
    if (missing := rank - len(root)) > 0:
        a, b = np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))
    return a, b, float((s[:rank] ** 2).sum()), float((s**2).sum())
