"""The knobs of tuning in rounds: how answers are drawn and made into pairs, and how rounds follow one another."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mlxdpo.knobs import Section


class Drawing(Section):
    """How answers are drawn from a policy, which are left out, and which two make a pair."""

    samples: int = Field(default=8, ge=2)
    """Answers drawn to each prompt."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling; 1 is the model itself."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability."""
    seed: int = Field(default=0, ge=0)
    """Noise of sampling: the same seed gives the same rows."""
    batch_size: int = Field(default=64, ge=1)
    """Answers sampled at once."""
    pairs: Literal["best-worst", "all", "margin", "ranked"] = "best-worst"
    """best-worst: one pair for each prompt; all: every two answers with different scores; margin: every two that lie
    at least `margin` apart; ranked: one row for each prompt with all its answers and scores, which trains as all."""
    margin: float = Field(default=0.0, ge=0)
    """Least difference of the scores of a pair (pairs: best-worst, margin)."""
    unfinished: Literal["auto", "drop", "keep"] = "auto"
    """Answers cut off at max_tokens: drop them or keep them; auto keeps them where data.eos is leave."""
    near: float = Field(default=0.9, gt=0, le=1)
    """Leave out an answer that shares this much of its word triples with an earlier one (Jaccard); 1: equal words."""

    @model_validator(mode="after")
    def _margin_is_used(self) -> Drawing:
        if self.pairs == "margin" and not self.margin:
            raise ValueError("pairs margin needs a margin above 0; pairs all takes every difference")
        if self.pairs in ("all", "ranked") and self.margin:
            raise ValueError(f"margin {self.margin:g} has no effect with pairs {self.pairs}; use pairs margin")
        return self


class CollectConfig(Drawing):
    """How a round's pairs come about (`mlxdpo iterate`)."""

    judge: str = ""
    """Who ranks the answers: vader, textblob, longest, local:MODEL, reward:RUN, endpoint:MODEL@URL, FILE.py:FUNCTION;
    votes:FILE takes the app's votes instead of drawing answers."""


class RoundsConfig(Section):
    """How rounds follow one another, and when they stop by themselves (`mlxdpo iterate`)."""

    count: int = Field(default=3, ge=1)
    """Rounds; short: --rounds."""
    reference: Literal["first", "previous"] = "first"
    """What each round's rewards are measured against: where round 1 started, or where the round itself starts."""
    every: int | None = Field(default=None, ge=1)
    """Online: rounds of this many optimizer steps on fresh pairs; optimizer and schedule go on from round to round."""
    prompts: int | None = Field(default=None, ge=1)
    """Prompts a round answers, the next ones each time; unset: all (with `every`: as many as its steps take)."""
    second: str = ""
    """A judge that never ranks: when the first one rises and it surely falls, the first one is being gamed."""
    max_kl: float = Field(default=0.5, gt=0)
    """Stop when the KL from where round 1 started is surely above this, nats per token of the answers."""
    heldout: int = Field(default=100, ge=2)
    """Held-out prompts to measure with, at most."""
    heldout_samples: int = Field(default=2, ge=1)
    """Answers to each of them."""
