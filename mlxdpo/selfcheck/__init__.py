"""Self-checks on the user's own machine: each a function in a registry, its result a row of one table."""

from mlxdpo.selfcheck.registry import CHECKS, Check, CheckResult, Finding, run_checks

__all__ = ["CHECKS", "Check", "CheckResult", "Finding", "run_checks"]
