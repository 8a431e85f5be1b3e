"""A PEFT adapter as a starting point: an adapter folder that `--model.adapter` and mlx-lm read."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from mlxdpo.config import LoraConfig, ModelConfig
from mlxdpo.exporters.peft import Adapter, attach, read_peft, scale_of
from mlxdpo.io.atomic import sync_folder
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, save_adapter
from mlxdpo.model.policy import load_policy
from mlxdpo.types import UserError


class Imported(NamedTuple):
    """What became of a PEFT adapter: its settings here, how many modules it had, what had to be written otherwise."""

    lora: LoraConfig
    modules: int
    changes: list[str]


def import_peft(folder: Path, model: ModelConfig, out: Path) -> Imported:
    """Write the PEFT adapter in `folder`, made for `model`, as an mlx-lm adapter into `out`, which must not exist.

    The function stays the same to the last bit where ranks and scales are one; where they differ, see
    `peft.attach`. Raises `UserError` for what an mlx-lm adapter cannot hold, and for a model it does not fit.
    """
    if out.exists():
        raise UserError(f"{out} is already there; choose another --out")
    if model.adapter is not None:
        raise UserError(f"--adapter {model.adapter}: a PEFT adapter goes onto the bare model; drop --adapter")
    adapter = read_peft(folder)
    policy = load_policy(model)
    lora = attach(policy, adapter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        made = Path(name) / "adapter"
        save_adapter(policy.model, lora, made)
        assert (made / WEIGHTS).exists() and (made / SETTINGS).exists()
        made.rename(out)
    sync_folder(out.parent)
    return Imported(lora, len(adapter.modules), _changes(adapter, lora, policy.model))


def _changes(adapter: Adapter, lora: LoraConfig, model: object) -> list[str]:
    """Sentences on what mlx-lm's one rank, one scale and last blocks made necessary."""
    ranks = {name: parts["lora_a"].shape[0] for name, parts in adapter.modules.items()}
    scales = {name: scale_of(adapter.settings, name, rank) for name, rank in ranks.items()}
    here = sum("lora_a" in module for _, module in model.named_modules())  # type: ignore[attr-defined]
    found = []
    if lower := sum(rank < lora.rank for rank in ranks.values()):
        found.append(f"{lower} modules had a lower rank than {lora.rank}: their further directions do nothing yet")
    if other := sum(scale != lora.multiplier for scale in scales.values()):
        found.append(f"{other} modules had another scale than {lora.multiplier:g}: it went into their B")
    if here > len(adapter.modules):
        found.append(f"{here - len(adapter.modules)} modules had no adapter: they got one that does nothing yet")
    return found
