"""The registry of objectives: `LOSSES["sigmoid"](pairs, beta=0.1)` gives one loss per pair, shape (B,).

Adding one: a function in `paired.py`, a line here, a golden row in `tests/goldens.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlxdpo.config import LossConfig
from mlxdpo.losses import paired
from mlxdpo.types import Pairs, UserError


class Objective(NamedTuple):
    """An objective: its function, what it is, its paper, and its value while policy and reference agree."""

    function: Callable[..., mx.array]
    title: str
    paper: str
    start: Callable[[float], float]

    def __call__(self, pairs: Pairs, **knobs: Any) -> mx.array:
        """One loss per pair, (B,)."""
        return self.function(pairs, **knobs)

    @property
    def knobs(self) -> tuple[str, ...]:
        """Names of the knobs it takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


LOSSES: dict[str, Objective] = {
    "sigmoid": Objective(paired.sigmoid, "DPO; conservative DPO with label_smoothing", "2305.18290", paired.start_ln2),
    "ipo": Objective(paired.ipo, "IPO, length-averaged", "2310.12036", paired.start_ipo),
    "hinge": Objective(paired.hinge, "hinge on implicit rewards (SLiC, RSO)", "2305.10425", paired.start_hinge),
}


def resolve(loss: LossConfig) -> tuple[Objective, dict[str, Any]]:
    """The objective a recipe names and its knobs. Raises `UserError` for an unknown name or a knob it does not take."""
    if loss.name not in LOSSES:
        raise UserError(f"loss.name `{loss.name}` is unknown; known: {', '.join(LOSSES)}")
    objective = LOSSES[loss.name]
    given = loss.model_dump(exclude={"name"})
    for name, value in given.items():
        if name not in objective.knobs and value != LossConfig.model_fields[name].default:
            raise UserError(
                f"loss.{name} {value} has no effect on `{loss.name}`, which takes: {', '.join(objective.knobs)}"
            )
    return objective, {name: given[name] for name in objective.knobs}
