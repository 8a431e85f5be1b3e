"""Own objectives: a function of `Pairs` becomes an objective that a recipe can name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxdpo.config import LossConfig
from mlxdpo.losses import LOSSES
from mlxdpo.losses.objective import Objective
from mlxdpo.types import Pairs, UserError

OWN_TITLE = "own objective"
MODIFIERS: tuple[str, ...] = ("f_divergence", "reference_free", "ld_alpha", "wpo", "probability", "margin")


def objective(function: Callable[..., mx.array] | None = None, *, reference: bool = True, name: str = "") -> Any:
    """Register a function as an objective; a decorator, with or without arguments.

    `function(pairs, *, beta, ...)` gets `Pairs` of (B,) log-probs, nats, and gives one loss per pair, (B,), without a
    mean. Its keywords are settings of `loss`; one with a default that is not a setting keeps its default. `reference`
    says whether it reads `ref_chosen` and `ref_rejected`; without, the reference is not scored. `name` is what
    `loss.name` calls it, the function's name unless given. A later registration replaces an earlier one.

    Raises `UserError` for a name of a built-in objective, a keyword that is not a setting, and a function that does not
    give one finite loss per pair, or whose gradient is not finite.
    """
    if function is None:
        return functools.partial(objective, reference=reference, name=name)
    name = name or function.__name__
    known = LOSSES.get(name)
    if not name.isidentifier():
        raise UserError(f"an objective cannot be called {name}; give a name of letters: objective(name='mine')")
    if known is not None and known.title != OWN_TITLE:
        raise UserError(f"{name} is a built-in objective; give yours another name: objective(name='my_{name}')")
    bare = _with_settings_alone(function, name)
    _check_function(bare, name)
    family = "difference" if reference else "reference-free"
    refuses = dict.fromkeys(MODIFIERS, "its effect on a custom objective is unknown")
    LOSSES[name] = Objective(bare, OWN_TITLE, "", family, None, "", refuses=refuses)
    return function


def _with_settings_alone(function: Callable[..., mx.array], name: str) -> Callable[..., mx.array]:
    """The function with those of its keywords alone that are settings. Raises `UserError` for one that is neither a
    setting nor has a default."""
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    settings = [p for p in keywords if p.name in LossConfig.model_fields]
    if unknown := [p.name for p in keywords if p not in settings and p.default is p.empty]:
        knobs = ", ".join(k for k in LossConfig.model_fields if k not in ("name", "weights"))
        raise UserError(f"{name} takes {unknown[0]}, which is not a setting; give it a default, or use one of: {knobs}")

    def bare(pairs: Pairs, **knobs: Any) -> mx.array:
        """The function."""
        return function(pairs, **knobs)

    first = inspect.Parameter("pairs", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    bare.__signature__ = inspect.Signature([first, *settings])  # type: ignore[attr-defined]
    return bare


def _check_function(function: Callable[..., mx.array], name: str) -> None:
    """Raise `UserError` unless the function gives a finite loss and gradient for each of three pairs."""
    columns = [mx.array(v) for v in ([-9.0, -7.5, -12.0], [-11.0, -8.0, -10.5], [-9.5, -7.0, -11.0])]
    lengths = [mx.array([4.0, 5.0, 6.0]), mx.array([5.0, 4.0, 7.0])]
    pairs = Pairs(columns[0], columns[1], columns[2], columns[1] + 0.25, *lengths)
    settings = LossConfig()
    signature = inspect.signature(function).parameters.values()
    knobs = {p.name: getattr(settings, p.name) for p in signature if p.kind is p.KEYWORD_ONLY}

    def summed(chosen: mx.array) -> mx.array:
        """The losses, added up."""
        return function(pairs._replace(chosen=chosen), **knobs).sum()

    found = function(pairs, **knobs)
    if not isinstance(found, mx.array) or found.shape != (3,):
        shape = tuple(found.shape) if isinstance(found, mx.array) else type(found).__name__
        raise UserError(f"{name} gives {shape} for 3 pairs; expected one loss per pair, (3,): do not take the mean")
    if not mx.isfinite(found).all().item() or not mx.isfinite(mx.grad(summed)(pairs.chosen)).all().item():
        raise UserError(f"{name} gives a loss or gradient that is not finite on ordinary log-probs; check its domain")
