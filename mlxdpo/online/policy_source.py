"""Whose answers: a run's model before or after tuning, or the model of a recipe, with what rows say of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, DataConfig
from mlxdpo.data.template import template_digest
from mlxdpo.io.digest import folder_digest
from mlxdpo.model.adapters import load_adapter, load_run, load_start
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.runs import Run


class PolicySource(NamedTuple):
    """A loaded policy, how its text is written, and what rows say of it (run, digests)."""

    policy: Policy
    data: DataConfig
    made: Mapping[str, Any]


def policy_source(policy: Policy, data: DataConfig, name: str, adapter: Path | None) -> PolicySource:
    """A loaded policy as a source; `adapter` is the folder of the adapter it has, if any."""
    own = {name: policy.identity[name] for name in ("digest", "dtype", "quantization")}
    digest = None if adapter is None else folder_digest(adapter)
    made = {"run": name, "model": own, "adapter": digest, "template": template_digest(policy.tokenizer, data)}
    return PolicySource(policy, data, made)


def source_of(run: Run, before: bool = False) -> PolicySource:
    """A run's tuned model, or the one it started from."""
    policy, start = (load_start(run) if before else load_run(run)), run.config().model.adapter
    adapter = Path(start) if before and start else run.adapter
    return policy_source(policy, run.config().data, run.path.name, None if before and not start else adapter)


def start_source(config: Config, name: str) -> PolicySource:
    """The model of a recipe as it is before any training, with the adapter it starts from."""
    policy, adapter = load_policy(config.model), config.model.adapter
    if adapter is not None:
        load_adapter(policy.model, Path(adapter))
    return policy_source(policy, config.data, name, None if adapter is None else Path(adapter))
