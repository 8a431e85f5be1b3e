"""Which level a model is run at: the fastest whose numbers are those of the plain way, which is what generation runs.

A right value proves nothing about a gradient: both are compared where training follows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.levels import PLAIN, STRANGE, Level, offered_levels, probe_batch
from mlxdpo.forward.logprobs import (
    Forward,
    fast_forward,
    float32_activations,
    plain_details,
    plain_forward,
    rounding_tolerance,
)
from mlxdpo.machine.device import float32_matmul, this_machine
from mlxdpo.model.adapters import dropout_off
from mlxdpo.types import Batch

# How far gradients may be apart, relative: by the order of sums in float32, in TF32, in 16 bits.
GRADIENT_ROUNDING = {"float32": 1e-3, "TF32": 3e-2, "16 bits": 1e-1}


class ForwardFns(NamedTuple):
    """How a model is run: `train` under differentiation, `score` without, at one level. Both give the same numbers, to
    the bit."""

    train: Forward
    score: Forward
    level: Level


def forward_fns(model: nn.Module, checkpoint: bool = False, level: Level | None = None) -> ForwardFns:
    """How `model` is run at a level; None finds it by `find_level`. With `checkpoint` less is kept for the gradient."""
    level = find_level(model) if level is None else level
    if level.plain:
        return ForwardFns(functools.partial(plain_forward, checkpoint=checkpoint), plain_forward, level)
    return ForwardFns(fast_forward(level, checkpoint), fast_forward(level, head=heads.score_logps), level)


def detailed_fns(fns: ForwardFns, checkpoint: bool = False) -> ForwardFns:
    """The same level, giving `RowDetails`: for modifiers that ask more than summed log-probs."""
    if fns.level.plain:
        return ForwardFns(functools.partial(plain_details, checkpoint=checkpoint), plain_details, fns.level)
    train = fast_forward(fns.level, checkpoint, head=heads.token_logps_and_squares)
    return ForwardFns(train, fast_forward(fns.level, head=heads.score_logps_and_squares), fns.level)


PLAIN_FORWARD = forward_fns(nn.Module(), level=PLAIN)


def find_level(model: nn.Module) -> Level:
    """The fastest level that gives the plain way's log-probs on a few random tokens: where no training follows."""
    offered = offered_levels(model)
    if offered[0].plain:
        return offered[0]
    assert offered[0].head is not None
    return agreeing_level(model, offered, probe_batch(offered[0].head))


def agreeing_level(
    model: nn.Module, offered: Sequence[Level], batch: Batch, short: Batch | None = None, checkpoint: bool = False
) -> Level:
    """The first of the levels that gives the plain way's log-probs on `batch`, and gradients on `short` where it is
    given; `plain` where none does. The level found says why it is not a faster one.

    Log-probs are asked in float32, so that rounding in 16 bits hides no difference; gradients in the model's dtype,
    because a backward pass in another would keep all weights in it.
    """
    why = ""
    with dropout_off(model):
        with float32_activations(model):
            wanted = np.array(plain_forward(model, batch))
        slope = None if short is None else _gradient(model, plain_forward, short)
        for level in offered:
            fns = forward_fns(model, checkpoint, level)
            try:
                with float32_activations(model):
                    gaps = np.nan_to_num(np.abs(np.array(fns.score(model, batch)) - wanted), nan=np.inf)
                if (gaps > rounding_tolerance(np.array(batch.length))).any():
                    why = why or f"{level.name} is {gaps.max():.3g} nats off here"
                    continue
                if short is not None and (lost := _distance(_gradient(model, fns.train, short), slope)) > _limit(model):
                    why = why or f"the gradient of {level.name} is {lost:.0%} off here"
                    continue
            except STRANGE as error:
                why = why or f"{level.name}: {error}"
                continue
            return level._replace(why=why or level.why, agrees=True)
    return PLAIN._replace(why=why)


def _gradient(model: nn.Module, forward: Forward, batch: Batch) -> np.ndarray:
    """What the vectors of all layers (norms, biases) would be changed by, for a weighted sum of the rows' log-probs."""
    weight = mx.array(np.random.default_rng(0).normal(size=batch.length.shape[0]).astype(np.float32))
    with _vectors_trainable(model):
        slope = nn.value_and_grad(model, lambda: (forward(model, batch) * weight).sum())()[1]
        return np.concatenate([np.array(g.astype(mx.float32)).ravel() for _, g in tree_flatten(slope)] or [np.zeros(1)])


@contextmanager
def _vectors_trainable(model: nn.Module) -> Iterator[None]:
    """While it lasts the vectors of the layers are trained, besides what is."""
    modules = [module for layer in model.layers if layer is not None for module in layer.modules()]
    before = [set(module._no_grad) for module in modules]
    try:
        for module in modules:
            vectors = {name for name, a in module.items() if isinstance(a, mx.array) and a.ndim == 1}
            module._no_grad -= {name for name in vectors if mx.issubdtype(module[name].dtype, mx.floating)}
        yield
    finally:
        for module, names in zip(modules, before, strict=True):
            module._no_grad = names


def _distance(found: np.ndarray, wanted: np.ndarray | None) -> float:
    assert wanted is not None
    off, size = np.linalg.norm(found - wanted), np.linalg.norm(wanted)
    return float(off / size) if size else float(off > 0)


def _limit(model: nn.Module) -> float:
    floats = {a.dtype for _, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)}
    if floats - {mx.float32}:
        return GRADIENT_ROUNDING["16 bits"]
    return GRADIENT_ROUNDING["TF32" if this_machine().kind != "cpu" and float32_matmul() == "TF32" else "float32"]
