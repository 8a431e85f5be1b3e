"""The head of any model, found by watching which linear map its logits come from, and what enters it.

Two tokens are enough to see the last map to the vocabulary, and nothing is computed: arrays are lazy. What follows the
map (a scale, a soft cap) is read off the model by feeding it known logits in place of the map's.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.forward.fused_head import Head, plain_map
from mlxdpo.forward.watch import Watcher, watched

SMALL, LARGE = 1e-3, 1e7  # logits: in the middle of any soft cap, and far beyond it


class NoFastWay(Exception):
    """A model that cannot be run so; the message says why."""


def find_head(model: nn.Module) -> Head:
    """The head of `model`. Raises `NoFastWay` where its logits are not those of a linear map, scaled and soft-capped.

    The head's module is looked up again by its name whenever it is used: an adapter may have come.
    """
    tokens, seen = mx.array([[1, 2]]), []
    vocabulary = model(tokens).shape[-1]

    def note(name: str) -> Watcher:
        """A watcher that keeps `name` for each call on states."""

        def call(own: Any, *args: Any, **kwargs: Any) -> Any:
            """What is called inside another is noted before it: an adapter comes after what it adapts."""
            out = own(*args, **kwargs)
            if mx.issubdtype(args[0].dtype, mx.floating):  # states, not the tokens of a trunk
                seen.append(name)
            return out

        return call

    with ExitStack() as stack:
        for name, module in model.named_modules():
            weight = plain_map(module).get("weight")
            if name and weight is not None and weight.ndim == 2 and weight.shape[0] == vocabulary:
                stack.enter_context(watched(module, **{_method(module): note(name)}))
        model(tokens)
    if not seen:
        raise NoFastWay("its logits do not come from a linear map that is called")
    # Others may be as wide by chance; the last one is the head, or what follows it will not fit.
    find = functools.partial(_named, model, seen[-1])
    return Head(find, *_tail(model, find(), vocabulary))


def _named(model: Any, name: str) -> Any:
    """The module of that name, now."""
    return functools.reduce(lambda m, key: m[int(key)] if isinstance(m, list) else m[key], name.split("."), model)


def _method(module: nn.Module) -> str:
    return "as_linear" if hasattr(module, "as_linear") else "__call__"


def _tail(model: nn.Module, module: nn.Module, vocabulary: int) -> tuple[float | None, float]:
    """The soft cap and the factor that follow the head."""
    noise = np.random.default_rng(0).normal(0, 20, vocabulary)
    given = np.stack([np.full(vocabulary, x) for x in (SMALL, LARGE, 2 * LARGE)] + [noise]).astype(np.float32)
    with watched(module, **{_method(module): lambda own, *args, **kwargs: mx.array(given[None])}):
        found = np.array(model(mx.array([[1, 2, 3, 4]])).astype(mx.float32), np.float64)[0]
    cap = float(found[2, 0]) if np.allclose(found[1], found[2], rtol=1e-3) else None
    factor = float(np.median(found[0])) / SMALL
    wanted = given * factor if cap is None else cap * np.tanh(given * (factor / cap))
    if not np.allclose(found, wanted, rtol=2e-3, atol=1e-4 * abs(factor)):
        raise NoFastWay("what follows its head is not a scale and a soft cap")
    return cap, 1.0 if abs(factor - 1) < 1e-4 else factor


def hidden_states(model: nn.Module, head: Head, tokens: mx.array, cache: Any = None) -> mx.array:
    """(R, T) token ids -> (R, T, D), what enters the head; its map is not computed. `cache` is one for each layer."""
    module, kept = head.module(), []

    def keep(own: Any, states: mx.array) -> mx.array:
        """Instead of logits something of their shape, which nobody evaluates."""
        kept.append(states)
        return mx.broadcast_to(mx.zeros((1,), states.dtype), (*states.shape[:-1], plain_map(module).weight.shape[0]))

    with watched(module, **{_method(module): keep}):
        model(tokens, cache=cache)
    return kept[-1]
