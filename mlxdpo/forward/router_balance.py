"""The balancing loss of a mixture of experts' routers, read off the model while it runs.

No architecture is known here. In mlx-lm a layer's experts are one module that is called with the chosen experts of
each token; the linear map called last before it, with a number for each expert, is the router. Both are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

from mlxdpo.forward.levels import whole_rows
from mlxdpo.forward.rewards import last_places
from mlxdpo.forward.watch import Watcher, watched_all
from mlxdpo.types import Batch, UserError

SETTING = "train.router_aux_loss_coef"
EXPERTS = (SwitchGLU, SwitchMLP)


class Routed(NamedTuple):
    """One call of a layer's experts: the router's `logits` (N, E) and the experts `chosen` for each token (N, k)."""

    logits: mx.array
    chosen: mx.array


def balancing_loss(routed: list[Routed], weights: mx.array) -> mx.array:
    """(), E sum_e f_e P_e over the tokens of all layers, as transformers computes it.

    Source: arXiv 2101.03961, equations 4 to 6. f_e is how often a token chooses expert e (with k experts a token the
    f_e add up to k), P_e the mean of the router's probability of e; f_e has no gradient. It is k where all experts are
    used alike. `weights` (L N,) float32 is how much each token of the L calls counts, 0 for padding.
    """
    logits = mx.concatenate([one.logits for one in routed]).astype(mx.float32)
    chosen = mx.concatenate([one.chosen for one in routed])
    experts, weights = logits.shape[-1], weights[:, None] / weights.sum()
    taken = (chosen[..., None] == mx.arange(experts)).sum(axis=-2)
    often, likely = (taken * weights).sum(axis=0), (mx.softmax(logits, axis=-1) * weights).sum(axis=0)
    return experts * (mx.stop_gradient(often) * likely).sum()


def token_weights(batch: Batch) -> mx.array:
    """(R, P + S) float32: how many of the batch's completions read a token of the full rows, 0 for padding.

    Each pair has two completions, so a row that stands in several pairs counts several times, as in TRL.
    """
    rows = mx.arange(batch.length.shape[0])[:, None]
    pairs = sum(((side[None] == rows) * batch.weight).sum(axis=1) for side in (batch.chosen, batch.rejected))
    ends = batch.place[last_places(batch)]
    return (mx.arange(whole_rows(batch).shape[1]) <= ends[:, None]) * pairs[:, None]  # type: ignore[index]


@contextmanager
def watched_routers(model: nn.Module) -> Iterator[list[Routed]]:
    """While it lasts, each call of a layer's experts is added to the list that it yields."""
    experts = [module for module in model.modules() if isinstance(module, EXPERTS)]
    inside = {id(part): part for module in experts for part in module.modules()}
    switches = (part for part in inside.values() if isinstance(part, SwitchLinear | QuantizedSwitchLinear))
    widths = {part.num_experts for part in switches}
    linear = [module for module in model.modules() if _is_linear(module) and id(module) not in inside]
    found: list[Routed] = []
    latest: list[mx.array] = []

    def seen_linear(_: tuple[Any, ...], result: mx.array) -> None:
        """Keep what may be a router's logits."""
        if result.shape[-1] in widths:
            latest[:] = [result]

    def seen_experts(arguments: tuple[Any, ...], _: Any) -> None:
        """The logits before it are its router's."""
        chosen = arguments[1].reshape(-1, arguments[1].shape[-1])
        logits = [a.reshape(-1, a.shape[-1]) for a in latest]
        found.extend(Routed(a, chosen) for a in logits if len(a) == len(chosen))
        latest.clear()

    with watched_all(linear, lambda _: _told(seen_linear)), watched_all(experts, lambda _: _told(seen_experts)):
        yield found


def _is_linear(module: nn.Module) -> bool:
    """A linear map, quantised or adapted too."""
    return isinstance(module, nn.Linear | nn.QuantizedLinear) or (hasattr(module, "lora_a") and "linear" in module)


def _told(seen: Callable[[tuple[Any, ...], Any], None]) -> Watcher:
    """A watcher that tells `seen` of each call's arguments and result."""

    def call(own: Any, *arguments: Any, **named: Any) -> Any:
        """The module's own call, told of once it is done."""
        result = own(*arguments, **named)
        seen(arguments, result)
        return result

    return call


def check_routers(model: nn.Module) -> None:
    """Raise `UserError` for a model whose routers cannot be balanced: it has no experts, or something else than the
    largest logits chooses them."""
    name = type(model).__module__.rpartition(".")[2]
    layers = sum(isinstance(module, EXPERTS) for module in model.modules())
    if not layers:
        raise UserError(f"{SETTING}: {name} has no experts to balance; set it to 0")
    with watched_routers(model) as routed:
        mx.eval(model(mx.arange(8)[None]))
    if len(routed) != layers or not all(map(_largest_are_chosen, routed)):
        raise UserError(
            f"{SETTING}: the experts of {name} are not chosen by the largest logits of a router, so the balancing loss "
            f"of Switch Transformers does not fit it; set it to 0"
        )


def _largest_are_chosen(routed: Routed) -> bool:
    logits, chosen = np.array(routed.logits.astype(mx.float32)), np.array(routed.chosen)
    least = np.take_along_axis(logits, chosen, axis=1).min(axis=1, keepdims=True)
    return bool(((logits >= least).sum(axis=1) == chosen.shape[1]).all())


def batch_balance(routed: list[Routed], batch: Batch) -> mx.array:
    """() the balancing loss of a batch that went through the model as full rows, one part after the other."""
    parts = batch.parts or (batch,)
    calls = len(routed) // len(parts)
    weights = [mx.tile(token_weights(part).reshape(-1), calls) for part in parts]
    return balancing_loss(routed, mx.concatenate(weights))
