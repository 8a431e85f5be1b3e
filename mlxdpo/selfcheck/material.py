"""What the checks compute on: a model and pairs made by arithmetic, and numbers of them that were made elsewhere.

`golden.json` holds log-probs, loss and gradients from a float64 forward in numpy that shares no code with this package
(tests/support/float64_llama.py makes the file).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.data.batching import collate
from mlxdpo.selfcheck.golden_model import SHAPE, arithmetic_model, bytes_of
from mlxdpo.types import Batch, Example

BETA = 0.1
# Tokens of prompt, chosen and rejected. The first two rows share a prompt; all prompts share a prefix length of 32.
LENGTHS = ((41, 7, 4), (41, 7, 12), (35, 9, 3), (50, 2, 16))


@cache
def golden() -> dict[str, Any]:
    """The stored numbers."""
    return json.loads(files("mlxdpo.selfcheck").joinpath("golden.json").read_text("utf-8"))


@cache
def examples() -> tuple[Example, ...]:
    """Four pairs of ranked answers over three prompts, one completion in two of them."""
    words = lambda name, count: (bytes_of(name, count) % (SHAPE["vocab_size"] - 1) + 1).astype(np.int32)  # noqa: E731
    pairs = []
    for i, (prompt, chosen, rejected) in enumerate(LENGTHS):
        answers = words(f"chosen {max(i, 1)}", chosen), words(f"rejected {i}", rejected)
        pairs.append(Example(words(f"prompt {max(i, 1)}", prompt), *answers, f"pair {i}"))
    return tuple(pairs)


@cache
def model(dtype: str = "float32") -> nn.Module:
    """The model with adapters that do something. Checks do not change it."""
    return arithmetic_model(getattr(mx, dtype))


def batch(ref: np.ndarray | None = None, indices: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    """The pairs `indices` as a batch; `ref` is (4, 2), reference log-probs in nats."""
    return collate(examples(), indices, len(indices), ref)


def reference() -> np.ndarray:
    """(4, 2) golden log-probs of chosen and rejected under the model without adapters, nats."""
    return np.array(golden()["reference"], np.float32)


def weighted(forward: Callable[[nn.Module, Batch], Any], rows: Batch) -> Callable[[nn.Module], mx.array]:
    """A scalar of a model in which every row counts differently, so that no error can hide behind another."""
    weight = mx.arange(1, len(rows.group) + 1).astype(mx.float32) / len(rows.group)
    return lambda tuned: (forward(tuned, rows) * weight).sum()


def gradient(tuned: nn.Module, function: Callable[[nn.Module], mx.array]) -> tuple[float, np.ndarray]:
    """A scalar of a model and its gradient by all trained arrays, as one vector in the order of their names."""
    found, tree = nn.value_and_grad(tuned, function)(tuned)
    mx.eval(found, tree)
    flat = [np.array(a.astype(mx.float32)).ravel() for _, a in sorted(tree_flatten(tree))]
    return float(found.item()), np.concatenate(flat)


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """Relative distance of two vectors, |got - wanted| / |wanted|."""
    got, wanted = (np.asarray(a, np.float64) for a in (got, wanted))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
