"""Objectives: `LOSSES["sigmoid"](pairs, beta=0.1)` is one loss per pair, (B,); `resolve` gives what a recipe asks."""

from __future__ import annotations

from mlxdpo.losses.loss import Loss, resolve
from mlxdpo.losses.objective import Objective
from mlxdpo.losses.registry import LOSSES

__all__ = ["LOSSES", "Loss", "Objective", "resolve"]
