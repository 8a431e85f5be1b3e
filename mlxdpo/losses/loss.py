"""The loss a recipe names: one objective or a weighted sum of several, under the modifiers it asks for.

What is put together here is resolved before training: what has no effect is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxdpo.config import LossConfig, names_of
from mlxdpo.losses.modifiers import (
    f_divergence_scores,
    ld_log_ratios,
    ld_pairs,
    swapped_pairs,
    unpaired_rows,
    without_reference,
    wpo_weight,
)
from mlxdpo.losses.objective import Objective
from mlxdpo.losses.registry import LOSSES
from mlxdpo.types import Pairs, UserError

EXTRA_COLUMNS = ("probability", "weight", "margin")
"""Columns that `data.columns` may name beside those of a row shape: numbers of the pair (`types.Extras`)."""
SWITCHES = {"f_divergence": "reverse_kl", "ld_alpha": None, "wpo": False, "reference_free": False}
"""Modifiers that a recipe switches on, with the value that is off."""


@dataclass(frozen=True)
class Term:
    """One objective of a sum."""

    name: str
    objective: Objective
    share: float
    knobs: dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """What a step minimises: `loss(pairs)` gives one number per pair, (B,); the step takes their mean."""

    terms: tuple[Term, ...]
    config: LossConfig
    extra_columns: frozenset[str] = frozenset()

    def __call__(self, pairs: Pairs, step_statistics: mx.array | None = None) -> mx.array:
        """One loss per pair, (B,). `step_statistics` (K, B) is what the method of that name took from all pairs of the
        step; without it these pairs are all there are."""
        statistics = iter(step_statistics) if step_statistics is not None else None
        total: Any = 0
        for term in self.terms:
            objective, modified, knobs = term.objective, self._modified(term, pairs), term.knobs
            if objective.step_statistics is not None:
                own = None if statistics is None else tuple(next(statistics) for _ in range(objective.entries))
                value = objective.function(modified, **knobs, step_statistics=own)
            else:
                value = objective.function(modified, **knobs)
                if "probability" in self.extra_columns and objective.paired and not objective.reads_label:
                    opposite = objective.function(swapped_pairs(modified), **knobs)
                    value = pairs.label * value + (1 - pairs.label) * opposite  # type: ignore[operator]
            if self.config.wpo and term.name != "sft":
                value = value * wpo_weight(pairs)
            total = total + term.share * value
        return total * pairs.weight if "weight" in self.extra_columns else total

    def _modified(self, term: Term, pairs: Pairs) -> Any:
        """The pairs as the term's objective gets them, under the modifiers; imitation gets them whole."""
        if "margin" not in self.extra_columns:
            pairs = pairs._replace(margin=None)
        if "probability" not in self.extra_columns:
            pairs = pairs._replace(label=None)
        if term.name == "sft":
            return pairs
        if not term.objective.paired:
            return unpaired_rows(pairs)
        if self.config.reference_free:
            pairs = without_reference(pairs)
        if self.config.ld_alpha is not None:
            desensitized = ld_pairs if term.objective.family == "ranked" else ld_log_ratios
            pairs = desensitized(pairs, self.config.ld_alpha)
        if self.config.f_divergence != "reverse_kl":
            pairs = f_divergence_scores(pairs, self.config.f_divergence, self.config.f_alpha)
        return pairs

    def step_statistics(self, pairs: Pairs) -> mx.array | None:
        """(K, B) what the objectives take from all pairs of a step, or None where each pair stands for itself."""
        coupled = [term for term in self.terms if term.objective.step_statistics is not None]
        found = [row for t in coupled for row in t.objective.statistics_of(self._modified(t, pairs), t.knobs)]
        return mx.stop_gradient(mx.stack(found)) if found else None

    @property
    def needs_step_statistics(self) -> bool:
        """Whether it takes something from all pairs of a step."""
        return any(term.objective.step_statistics is not None for term in self.terms)

    @property
    def needs_step_logps(self) -> bool:
        """Whether that asks for their log-probs, so that a step scores its pairs before it differentiates."""
        return any(term.objective.over == "log-probs" for term in self.terms)

    @property
    def needs(self) -> frozenset[str]:
        """What it reads besides summed log-probs of the policy: "reference", "shared" (LD-DPO), "squares" (WPO)."""
        reference = any(t.objective.reference for t in self.terms) and not self.config.reference_free
        wanted = {
            "reference": reference,
            "shared": self.config.ld_alpha is not None,
            "squares": self.config.wpo,
        }
        return frozenset(name for name, needed in wanted.items() if needed)

    @property
    def paired(self) -> bool:
        """Whether it reads pairs; else single completions with a thumb."""
        return self.terms[0].objective.paired

    @property
    def mismatched(self) -> bool:
        """Whether unpaired rows need a completion of another prompt beside their own."""
        return any(term.objective.mismatched for term in self.terms)

    @property
    def per_token(self) -> bool:
        """Whether its rewards are means over tokens, where it has no reference."""
        return self.terms[0].objective.per_token

    @property
    def lifts(self) -> bool:
        """Whether it holds the chosen completions' likelihood up."""
        return any(term.objective.lifts for term in self.terms)

    def start(self) -> float | None:
        """Its value while policy and reference agree, before weights of pairs; None where that is no constant."""
        if self.config.wpo or self.config.reference_free or "margin" in self.extra_columns:
            return None
        values = [t.objective.start(**t.knobs) if t.objective.start else None for t in self.terms]
        known = [t.share * v for t, v in zip(self.terms, values, strict=True) if v is not None]
        return sum(known) if len(known) == len(values) else None


def resolve(config: LossConfig, columns: Collection[str] = ()) -> Loss:
    """The loss a recipe names; `columns` are those that `data.columns` names.

    Raises `UserError` for an unknown objective, a knob or modifier that has no effect or makes no sense, and a sum
    that mixes pairs with single completions.
    """
    names = names_of(config.name)
    for name in names:
        if name not in LOSSES:
            raise UserError(f"loss.name `{name}` is unknown; known: {', '.join(LOSSES)}")
    objectives = [LOSSES[name] for name in names]
    if len({objective.paired for objective in objectives}) > 1:
        single = ", ".join(name for name in names if not LOSSES[name].paired)
        raise UserError(
            f"loss.name {config.name} mixes pairs with single completions; of these {single} reads single completions"
        )
    shares = config.weights or [1.0] * len(names)
    if len(shares) != len(names):
        raise UserError(f"loss.weights has {len(shares)} numbers for the {len(names)} objectives of {config.name}")
    _check_knobs(config, names)
    extra_columns = frozenset(columns) & frozenset(EXTRA_COLUMNS)
    _check_modifiers(config, names, extra_columns)
    terms = [
        Term(name, objective, share, {knob: getattr(config, knob) for knob in objective.knobs})
        for name, objective, share in zip(names, objectives, shares, strict=True)
    ]
    return Loss(tuple(terms), config, extra_columns)


def _check_knobs(config: LossConfig, names: list[str]) -> None:
    """Refuse a knob that is not at its default and that no named objective takes."""
    taken = list(dict.fromkeys(knob for name in names for knob in LOSSES[name].knobs))
    for knob, field in LossConfig.model_fields.items():
        value = getattr(config, knob)
        if knob in {"name", "weights", *SWITCHES, *taken} or value == field.default:
            continue
        if knob == "f_alpha":
            if config.f_divergence != "alpha_divergence":
                raise UserError(f"loss.f_alpha {value} has no effect without loss.f_divergence alpha_divergence")
            continue
        takes = ", ".join(taken) or "nothing"
        raise UserError(f"loss.{knob} {value} has no effect on `{config.name}`, which takes: {takes}")
    if "exo_pair" in names and config.label_smoothing == 0:
        raise UserError("exo_pair needs loss.label_smoothing above 0 (its paper: 1e-3): at 0 its loss is infinite")


def _check_modifiers(config: LossConfig, names: list[str], extra_columns: frozenset[str]) -> None:
    """Refuse what makes no sense for one of the objectives; imitation beside another objective is left as it is."""
    given: dict[str, str] = {
        name: f"loss.{name} {getattr(config, name)}" for name, off in SWITCHES.items() if getattr(config, name) != off
    }
    given |= {name: f"data.columns {name}" for name in extra_columns}
    for modifier, shown in given.items():
        for name in names:
            if name == "sft" and len(names) > 1:
                continue
            if reason := LOSSES[name].refuses.get(modifier):
                raise UserError(f"{shown} does not apply to {name}: {reason}; drop one of them")
    if config.reference_free and config.f_divergence != "reverse_kl":
        raise UserError("loss.f_divergence scores log-ratios to a reference; drop it or loss.reference_free")
