"""What mlx-lm loads: the adapter as it is, fused weights, and fused weights packed again.

Fusing onto a packed base leaves the trained layers unpacked: packed again, a delta of 1 % of a weight's size keeps a
sixth of its slope and a twentieth of its direction (4 bits, groups of 64), which is the tune gone. Whoever wants small
files asks for `quantized`, is shown what it cost, and is refused when that was the tune.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxdpo.exporters.source import ExportSource, base_of, copy_side_files, hub_name, plain_weight, tuned
from mlxdpo.io.atomic import write_json
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, adapter_settings, read_settings
from mlxdpo.model.config_rules import ALIASES
from mlxdpo.model.model_config import module_of, names_read
from mlxdpo.model.policy import load_folder
from mlxdpo.types import UserError


def write_adapter(source: ExportSource, folder: Path) -> str | None:
    """The run's adapter, for `mlx_lm.generate --adapter-path`."""
    shutil.copyfile(source.trained.run.adapter / WEIGHTS, folder / WEIGHTS)
    # Written anew: the run's file has a checksum, which another key would break, and may lack what mlx-lm needs.
    settings = adapter_settings(read_settings(source.trained.run.adapter))
    write_json(folder / SETTINGS, settings | {"model": hub_name(source.trained.config.model.path, source.folder)})
    if source.quantised and not source.stored_quantised:
        bits = source.trained.policy.identity["quantization"]["bits"]
        return f"trained on weights packed to {bits} bits when loading; here measured on the unpacked ones"
    return source.remark_on_base


def reload_adapter(source: ExportSource, folder: Path) -> nn.Module:
    """The base with the adapter, by mlx-lm's own `load(..., adapter_path=)`."""
    from mlx_lm.utils import load

    return load(str(source.folder), adapter_path=str(folder), lazy=True)[0]


def write_served(source: ExportSource, folder: Path) -> str | None:
    """What `mlx_lm.server` loads: the adapter, or after full fine-tuning the whole model."""
    return write_fused(source, folder) if source.method == "full" else write_adapter(source, folder)


def reload_served(source: ExportSource, folder: Path) -> nn.Module:
    """The same, by the loader that the server has."""
    return reload_model(source, folder) if source.method == "full" else reload_adapter(source, folder)


def write_fused(source: ExportSource, folder: Path) -> str | None:
    """One MLX model with the tune inside; packed layers that were not trained keep their codes, byte for byte."""
    model, config = fused(source)
    _save_model(source, model, config, folder)
    return "trained layers unpacked, all others as packed as they were" if source.quantised else None


def refuse_quantized(source: ExportSource) -> None:
    """Raise `UserError` for a model with nothing to pack at the chosen group size."""
    group = source.choices.group_size
    trained = [plain_weight(base_of(module)) for module in source.adapted.values()]
    plain = [module.weight for module in source.model.modules() if type(module) in (nn.Linear, nn.Embedding)]
    if not any(weight.shape[-1] % group == 0 for weight in trained + plain):
        raise UserError(
            f"quantized: no layer of {source.base_name} has a width that groups of {group} divide; "
            f"choose another --group-size, or export --to fused"
        )


def write_quantized(source: ExportSource, folder: Path) -> str | None:
    """The fused model with every layer packed to `--bits` (layers of a packed base keep the bits they have)."""
    from mlx_lm.utils import quantize_model

    bits, group = source.choices.bits, source.choices.group_size
    model, config = fused(source)
    model, config = quantize_model(model, config, group, bits)
    _save_model(source, model, config, folder)
    return f"packed to {bits} bits in groups of {group} after fusing"


def reload_model(source: ExportSource, folder: Path) -> nn.Module:
    """The written folder, by mlx-lm's own `load`."""
    from mlx_lm.utils import load

    return load(str(folder), lazy=True)[0]


def fused(source: ExportSource) -> tuple[nn.Module, dict[str, Any]]:
    """The base as stored (or packed as the run packed it), trained weights in place of its own; and its config."""
    from mlx_lm.utils import quantize_model

    model = load_folder(source.folder, source.base_name, source.trained.config.model.trust_remote_code)[0]
    config, bits = for_mlx_lm(source), source.trained.config.model.quantize
    if bits:
        model, config = quantize_model(model, config, 64, bits)
    if source.method == "full":
        _replace_all(model, source)
        return model, config
    layers = dict(model.named_modules())
    plain = [(name, _fuse(name, module, layers[name])) for name, module in source.adapted.items()]
    model.update_modules(tree_unflatten(plain))
    return model, config


def for_mlx_lm(source: ExportSource) -> dict[str, Any]:
    """The base's config.json with what mlx-lm finds there under no name that it knows."""
    raw, read = dict(source.raw_config), source.trained.policy.reading.config
    kind = {"model_type": ALIASES.get(raw["model_type"], raw["model_type"])}
    if "text_config" in raw and "text_config" in read:
        text = raw["text_config"] | _translated(raw["text_config"], read["text_config"], raw)
        shared = {name: read[name] for name in ("vocab_size",) if name in read}  # some files look for it outside
        return shared | raw | {"text_config": text} | kind
    return raw | _translated(raw, read, raw) | kind


def _translated(raw: Mapping[str, Any], read: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    names = names_read(module_of(str(whole["model_type"])))
    return {
        key: value
        for key, value in read.items()
        if key in names and key != "model_type" and (key not in raw or raw[key] != value)
    }


def _replace_all(model: nn.Module, source: ExportSource) -> None:
    own: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    pairs = [(name, change(own[name]).astype(own[name].dtype)) for name, change in source.changes.items()]
    model.load_weights(pairs, strict=False)


def _fuse(name: str, module: nn.Module, layer: Any) -> nn.Module:
    """A plain layer of the stored number type that computes what `module` does on top of `layer`."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = {
        nn.Linear: nn.Linear,
        nn.QuantizedLinear: nn.Linear,
        nn.Embedding: nn.Embedding,
        nn.QuantizedEmbedding: nn.Embedding,
        SwitchLinear: SwitchLinear,
        QuantizedSwitchLinear: SwitchLinear,
    }
    if type(layer) not in kinds:
        raise UserError(f"fused: `{name}` is a {type(layer).__name__}, which has no plain form; export --to mlx")
    kind = layer.scales.dtype if "scales" in layer else layer.weight.dtype
    weight = tuned(module, plain_weight(layer)).astype(kind if mx.issubdtype(kind, mx.floating) else mx.bfloat16)
    made = kinds[type(layer)]
    plain = made(*(weight.shape if made is nn.Embedding else weight.shape[::-1]))
    plain.pop("bias", None)
    if "bias" in layer:
        plain.bias = layer.bias
    plain.weight = weight
    return plain


def _save_model(source: ExportSource, model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    from mlx_lm.utils import save_model

    save_model(folder, model, donate_model=True)
    copy_side_files(source, source.folder, folder)
    if "quantization" in config:
        config |= {"quantization_config": config["quantization"]}
    if config != source.raw_config:
        write_json(folder / "config.json", config)
