"""`mlxdpo import --peft DIR --model M --out ADAPTER`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxdpo.config import ModelConfig, Section
from mlxdpo.io.words import counted


class ImportConfig(Section):
    """The model that the adapter was made for."""

    model: ModelConfig = ModelConfig()


UNNAMED = ImportConfig()


def run(*, peft: Path, config: Annotated[ImportConfig, Parameter(name="*")] = UNNAMED, out: Path) -> None:
    """Turn a PEFT LoRA or DoRA adapter into an adapter folder that training starts from and mlx_lm loads.

    Args:
        peft: Folder with adapter_config.json and adapter_model.safetensors.
        config: Settings.
        out: Adapter folder to make.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.exporters.peft import import_peft

    found = import_peft(peft, config.model, out)
    lora = found.lora
    console.print(
        f"{counted(found.modules, 'module')}: {lora.method}, rank {lora.rank}, scale {lora.multiplier:g} -> {out}",
        markup=False,
    )
    for line in found.changes:
        console.print(line, style="yellow", markup=False)
    console.print(f"start from it: mlxdpo train --model {config.model.path} --adapter {out} --data ...", markup=False)
