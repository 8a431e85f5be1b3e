"""What mlx-lm loads: the adapter as it is, fused weights, and fused weights packed again.

Fusing onto a packed base leaves the trained layers unpacked: packed again, a delta of 1 % of a weight's size keeps a
sixth of its slope and a twentieth of its direction (4 bits, groups of 64), which is the tune gone. Whoever wants small
files asks for `quantized`, is shown what it cost, and is refused when that was the tune.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxdpo.data.read import read_pairs, split_heldout
from mlxdpo.exporters.source import (
    ExportSource,
    base_of,
    copy_side_files,
    ends_beside_base,
    hub_name,
    plain_weight,
    tuned,
)
from mlxdpo.inference.trained_run import encode_pairs
from mlxdpo.io.atomic import write_json
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, adapter_settings, read_settings
from mlxdpo.model.config_rules import ALIASES
from mlxdpo.model.model_config import module_of, names_read
from mlxdpo.model.policy import load_folder
from mlxdpo.types import UserError


def refuse_adapter(source: ExportSource) -> None:
    """Raise `UserError` where mlx-lm alone cannot load the base, so that nobody could put the adapter onto it."""
    from mlx_lm.utils import load_model

    if (config := for_mlx_lm(source)) == source.raw_config:
        return
    try:
        load_model(source.folder, lazy=True)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        changed = ", ".join(name for name, value in config.items() if source.raw_config.get(name) != value)
        detail = (str(error).splitlines() or [""])[0][:150]
        raise UserError(
            f"mlx: mlx-lm alone cannot load {source.base_name} ({detail}), whose config.json says {changed} under "
            f"other names; export --to fused or server, which write the whole model"
        ) from None


def write_adapter(source: ExportSource, folder: Path) -> str | None:
    """The run's adapter, for `mlx_lm.generate --adapter-path`."""
    shutil.copyfile(source.trained.run.adapter / WEIGHTS, folder / WEIGHTS)
    # Written anew: the run's file has a checksum, which another key would break, and may lack what mlx-lm needs.
    settings = adapter_settings(read_settings(source.trained.run.adapter))
    write_json(folder / SETTINGS, settings | {"model": hub_name(source.trained.config.model.path, source.folder)})
    if source.quantised and not source.stored_quantised:
        bits = source.trained.policy.identity["quantization"]["bits"]
        return f"trained on weights packed to {bits} bits when loading; measured on the unpacked ones"
    if ends := ends_beside_base(source):
        return (
            f"ends answers with {', '.join(ends)}, which the base's files do not list: add them to the client's stops"
        )
    return source.remark_on_base


def reload_adapter(source: ExportSource, folder: Path) -> nn.Module:
    """The base with the adapter, by mlx-lm's own `load(..., adapter_path=)`."""
    from mlx_lm.utils import load

    return load(str(source.folder), adapter_path=str(folder), lazy=True)[0]


def served_whole(source: ExportSource) -> bool:
    """Whether a server needs the whole model: every weight was trained, the base's files end answers elsewhere, or its
    config.json has names that mlx-lm does not read (transformers 5 writes some), which a fused export translates."""
    return source.method == "full" or bool(ends_beside_base(source)) or for_mlx_lm(source) != source.raw_config


def write_served(source: ExportSource, folder: Path) -> str | None:
    """What `mlx_lm.server` loads: the adapter, or the whole model where that is not enough."""
    return write_fused(source, folder) if served_whole(source) else write_adapter(source, folder)


def reload_served(source: ExportSource, folder: Path) -> nn.Module:
    """The same, by the loader that the server has."""
    return reload_model(source, folder) if served_whole(source) else reload_adapter(source, folder)


def write_fused(source: ExportSource, folder: Path) -> str | None:
    """One MLX model with the tune inside; packed layers that were not trained keep their codes, byte for byte."""
    model, config = fused(source)
    _save_model(source, model, config, folder)
    return "trained layers unpacked, all others still packed" if source.quantised else None


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


CALIBRATION = (64, 256)  # rows of tokens that GPTQ sees, and their length
GPTQ_BITS = (2, 4, 8)


def other_packings(source: ExportSource) -> dict[str, Callable[[ExportSource, Path], str | None]]:
    """Ways to pack a model that rounding to the nearest code loses, by name."""
    bits, group = source.choices.bits, source.choices.group_size
    layers = [m for m in source.model.modules() if type(m) is nn.Linear] + [base_of(m) for m in source.adapted.values()]
    if source.quantised or bits not in GPTQ_BITS or any(layer.weight.shape[-1] % group for layer in layers):
        return {}
    return {"GPTQ": write_gptq}


def write_gptq(source: ExportSource, folder: Path) -> str | None:
    """The fused model, packed so that each column's rounding error is made good by the columns after it (GPTQ,
    arXiv 2210.17323), over the run's own training pairs; what GPTQ does not know is packed to 8 bits."""
    from mlx_lm.quant.gptq import gptq_quantize

    bits, group = source.choices.bits, source.choices.group_size
    model, config = fused(source)
    model.set_dtype(mx.float32)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        model, config["quantization"] = gptq_quantize(model, _training_tokens(source), bits, group, 8, group)
    kind = getattr(mx, source.trained.policy.identity["dtype"])
    model.set_dtype(kind)
    _save_model(source, model, config, folder)
    return f"packed to {bits} bits in groups of {group} by GPTQ after fusing, embeddings to 8"


def _training_tokens(source: ExportSource) -> mx.array:
    """(N, L) tokens of training prompts with their chosen completions, one after the other."""
    trained, (count, length) = source.trained, CALIBRATION
    trained.run.need("data.path", instead=", or export without the target quantized")
    config = trained.config
    rows = split_heldout(read_pairs(config.data)[0], config.data.eval_fraction, config.train.seed)[0]
    examples = encode_pairs(trained, rows[: 4 * count])[1]
    tokens = np.concatenate([np.concatenate([e.prompt, e.chosen]) for e in examples])[: count * length]
    length = min(length, len(tokens))
    return mx.array(tokens[: len(tokens) // length * length].reshape(-1, length))


ADAPTER_FOLDER = "adapter"


def refuse_packed_base(source: ExportSource) -> None:
    """Raise `UserError` for a run that is no adapter on a plain base, or has nothing to pack."""
    if source.method == "full":
        raise UserError("packed-base: the run trained every weight, so there is no adapter; export --to quantized")
    if source.quantised:
        raise UserError("packed-base: the run trained on packed weights; --to mlx is its adapter on them")
    refuse_quantized(source)


def write_packed_base(source: ExportSource, folder: Path) -> str | None:
    """The base, packed to `--bits`, and the adapter in floating point beside it: no code holds the tune."""
    from mlx_lm.utils import quantize_model

    bits, group = source.choices.bits, source.choices.group_size
    model = load_folder(source.folder, source.base_name, source.trained.config.model.trust_remote_code)[0]
    model, config = quantize_model(model, for_mlx_lm(source), group, bits)
    _save_model(source, model, config, folder)
    (folder / ADAPTER_FOLDER).mkdir()
    write_adapter(source, folder / ADAPTER_FOLDER)
    return f"the base packed to {bits} bits in groups of {group}, the adapter in {ADAPTER_FOLDER}/ as trained"


def reload_packed_base(source: ExportSource, folder: Path) -> nn.Module:
    """Both, by mlx-lm's own loader."""
    from mlx_lm.utils import load

    return load(str(folder), adapter_path=str(folder / ADAPTER_FOLDER), lazy=True)[0]


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
        raise UserError(f"fused: `{name}` is a {type(layer).__name__}, which cannot be fused; export --to mlx")
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
