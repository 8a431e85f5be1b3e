"""Self-checks on the user's own machine: each a function in a registry, its result a row of one table."""

from mlxdpo.selfcheck import machine, mlx_attention, numbers, training  # noqa: F401  (they enter the registry)
from mlxdpo.selfcheck.registry import CHECKS, Check, CheckResult, Finding, run_checks

__all__ = ["CHECKS", "Check", "CheckResult", "Finding", "run_checks"]
