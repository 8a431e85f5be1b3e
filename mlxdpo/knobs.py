"""The knobs of the objective: every parameter that one of them takes. What refuses what is `losses.resolve`'s business.

A knob's default is the one most objectives share; where an objective has its own (`OWN`), naming it sets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A frozen group of knobs that refuses unknown names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


OWN: Mapping[str, Mapping[str, float]] = {
    "sigmoid_norm": {"beta": 5.0},
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "dpop": {"beta": 0.3},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "alphapo": {"beta": 2.5, "gamma": 0.25},
}
"""Defaults of single objectives, from their papers (docs/objectives.md)."""


def names_of(name: str) -> list[str]:
    """The objectives of `loss.name`: "sigmoid+sft" is a sum of two."""
    return [part.strip() for part in name.split("+")]


class LossConfig(Section):
    """The objective."""

    name: str = "sigmoid"
    """Objective, or a sum: sigmoid+sft, in YAML also [sigmoid, sft]; `mlxdpo objectives` lists them."""
    weights: list[float] = []
    """Weights of the objectives of a sum, in their order; unset means 1 each."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference; where there is none, scale of the rewards."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (sigmoid: conservative DPO)."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """discopop: temperature of the mixture of its two losses."""
    dpop_lambda: float = Field(default=50.0, ge=0)
    """dpop: weight of the penalty on a chosen completion less likely than under the reference."""
    length_alpha: float = Field(default=0.01, ge=0)
    """r_dpo: reward that a token of length costs."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """cpo: weight of its imitation term."""
    gamma: float = Field(default=0.0, ge=0)
    """simpo, alphapo: margin that the chosen completion's reward should lead by."""
    alphapo_alpha: float = 0.25
    """alphapo: shape of the reward; 0 is SimPO."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """kto, apo_zero_unpaired: weight of thumbs up."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """kto, apo_zero_unpaired: weight of thumbs down."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that holds the policy at its reference (f-DPO)."""
    f_alpha: float = 0.5
    """Order of alpha_divergence."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """LD-DPO: weight of the tokens that the longer completion has beyond the shorter; unset or 1 counts them fully."""
    wpo: bool = False
    """Weight each pair by how likely the policy is to write it (WPO)."""
    reference_free: bool = False
    """Compare log-probs instead of log-ratios; nothing holds the policy at its reference then."""

    @field_validator("name", mode="before")
    @classmethod
    def _sum(cls, value: Any) -> Any:
        return "+".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value

    @model_validator(mode="after")
    def _own_defaults(self) -> LossConfig:
        # Not among the fields that were set: a command line that names the objective must not override a recipe's beta.
        for name in reversed(names_of(self.name)):
            for knob, value in OWN.get(name, {}).items():
                if knob not in self.model_fields_set:
                    object.__setattr__(self, knob, value)  # the section is frozen for everybody else
        return self
