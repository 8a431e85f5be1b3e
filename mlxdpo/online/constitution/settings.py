"""The knobs of a constitutional run: what pairs are made of, and how answers are drawn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mlxdpo.config import Section

CRITIQUE = 160  # tokens


class SamplingSettings(Section):
    """How a model is asked to answer, criticise, revise and compare."""

    pairs: Literal["revisions", "samples"] = "revisions"
    """revisions: the model criticises and rewrites its answer, chosen is the revision; samples: two answers are drawn,
    and the principles say how probably each is the better one."""
    labels: Literal["soft", "none"] = "soft"
    """soft: each principle compares the two answers of a pair; none: revisions are taken as better, unseen."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer and longest revision, in tokens."""
    critique_tokens: int = Field(default=CRITIQUE, ge=1)
    """Longest critique, in tokens; a longer one is cut, which is counted."""
    temperature: float = Field(default=1.0, ge=0)
    """Of sampling; 1 is the model itself, 0 takes the likeliest token (not with samples)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability."""
    seed: int = Field(default=0, ge=0)
    """Of the principle drawn for each prompt and the noise of sampling: the same seed gives the same rows."""
    batch_size: int = Field(default=32, ge=1)
    """Answers sampled at once."""
    unfinished: Literal["drop", "keep"] = "drop"
    """Answers and revisions cut off at max_tokens: drop or keep their pairs."""

    @model_validator(mode="after")
    def _samples_differ_and_are_judged(self) -> SamplingSettings:
        if self.pairs == "samples" and self.labels == "none":
            raise ValueError("labels none leaves two samples unjudged; use labels soft")
        if self.pairs == "samples" and self.temperature == 0:
            raise ValueError("temperature 0 gives the same sample twice; raise it, or use pairs revisions")
        if self.pairs == "samples" and self.critique_tokens != CRITIQUE:
            raise ValueError(f"critique_tokens {self.critique_tokens} has no effect with pairs samples; drop it")
        return self
