"""What a run is made of, written beside it: the proof for later, and what `--resume` holds the present against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxdpo.config import Config
from mlxdpo.data.dataset import Dataset
from mlxdpo.io.digest import folder_digest
from mlxdpo.machine.device import this_machine, versions
from mlxdpo.model.policy import Policy
from mlxdpo.training.reference import identity_of
from mlxdpo.types import UserError


def describe_run(
    config: Config, policy: Policy, reference: Policy, adapter: str | None, data: Dataset
) -> dict[str, Any]:
    """The manifest. `adapter` is the folder of the adapter that the reference includes, if any."""
    return describe_models(config, policy, reference, adapter) | {
        "parent": parent_of(config.model.adapter),
        "template": data.template,
        "data": {
            "source": config.data.path,
            "digest": data.digest,
            "pairs": len(data.train),
            "heldout": len(data.heldout),
            "reports": {name: asdict(report) for name, report in data.reports.items()},
        },
    }


def describe_models(config: Config, policy: Policy, reference: Policy, adapter: str | None) -> dict[str, Any]:
    """The part of a manifest that every stage has: versions, machine, seed, model and reference with their digests."""
    return {
        # The day that the chat template was told, where it asks for today's.
        **({} if config.data.date is None else {"date": config.data.date}),
        "versions": versions(),
        "machine": this_machine()._asdict(),
        "seed": config.train.seed,
        "model": dict(policy.identity) | {"adapter": _digest(config.model.adapter)},
        "reference": identity_of(reference.identity, _digest(adapter)),
        "reference_source": {"model": reference.identity["source"], "adapter": adapter},
    }


def parent_of(adapter: str | None) -> dict[str, Any] | None:
    """The run whose final adapter a run starts from, if it is one's: its directory, and the adapter's digest."""
    if adapter is None or not (Path(adapter).parent / "config.yaml").exists():
        return None
    return {"run": str(Path(adapter).parent), "adapter": _digest(adapter)}


def _digest(adapter: str | None) -> str | None:
    return None if adapter is None else folder_digest(Path(adapter))


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], run: Path) -> None:
    """Raise `UserError` naming what changed since the run began: model, template, data or reference, in this order."""
    parts = {
        "model": lambda m: {k: m["model"][k] for k in ("digest", "dtype", "quantization", "adapter")},
        "template": lambda m: m["template"],
        "data": lambda m: m["data"]["digest"],
        # The reference's library versions and device are left out: the same weights on a newer MLX are the same run.
        "reference": lambda m: {k: m["reference"][k] for k in ("digest", "dtype", "quantization", "adapter")},
    }
    for name, of in parts.items():
        if of(then) != of(now):
            raise UserError(
                f"{run}: the {name} changed since this run began ({_short(of(then))} then, {_short(of(now))} now); "
                f"put it back, or start a new run with another --out"
            )


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_short(v)}" for k, v in value.items() if v is not None)
    return value[:12] if isinstance(value, str) and len(value) > 40 else str(value)
