"""PEFT adapters, both ways: what `peft.PeftModel.from_pretrained` loads, and a PEFT adapter on an mlx-lm model.

`import_peft` makes an adapter folder of one, which `--model.adapter` and mlx-lm read.

The two store the same matrices transposed: A is (in, r) here and (r, in) there. A square matrix left untransposed loads
without complaint and computes another function, so the gate reads back what was written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxdpo.config import LoraConfig, ModelConfig
from mlxdpo.exporters.source import ExportSource
from mlxdpo.io.atomic import write_json
from mlxdpo.io.checksum import pickled_in, read_tensors
from mlxdpo.io.json_file import read_json
from mlxdpo.io.names import first_matches
from mlxdpo.io.staging import publish_new, staging_folder
from mlxdpo.model.adapters import place_lora, read_settings, save_adapter
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.types import UserError

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDED = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
MOST_RANK = 4  # times a module's larger side: one module of an absurd rank would widen all others
IN_BLOCK = re.compile(r"^(?P<before>.*?\blayers)\.(?P<layer>\d+)\.(?P<module>.+)$")


def refuse_peft(source: ExportSource) -> None:
    """Raise `UserError` for what PEFT has no form of."""
    if source.method == "full":
        raise UserError("peft: the run trained every weight, so there is no adapter; export --to hf")
    if source.stored_quantised and not source.choices.base:
        raise UserError(
            f"peft: {source.base_name} is packed for MLX and torch cannot load it; name the full-precision model "
            f"that it was made from with --base"
        )
    for name, module in source.adapted.items():
        _refuse_module(source, name, module)


def _refuse_module(source: ExportSource, name: str, module: Any) -> None:
    if module.lora_b.ndim == 3:
        raise UserError(f"peft: `{name}` adapts a stack of experts, which PEFT does not support; export --to mlx,fused")
    # transformers gives all of these names to the module that `torch_name` says.
    stored = {name, torch_name(source.model, name), name.removeprefix("language_model.")}
    if source.origins.of(f"{name}.weight") not in {(f"{one}.weight",) for one in stored}:
        raise UserError(
            f"peft: `{name}` has another name or form in {source.base_name}, so PEFT would not find it; "
            f"export --to mlx,fused"
        )
    tied = not any(path.endswith("lm_head") for path, _ in source.model.named_modules())
    if "embedding" in module and (source.method == "dora" or tied):
        raise UserError(
            f"peft: `{name}` is adapted and is also the head, which PEFT leaves as it was; export --to hf, "
            f"or leave it out of lora.keys"
        )


def write_peft(source: ExportSource, folder: Path) -> str | None:
    """Write `adapter_model.safetensors` and `adapter_config.json`."""
    arrays: dict[str, mx.array] = {}
    for name, module in source.adapted.items():
        parts = PARTS | EMBEDDED if "embedding" in module else PARTS
        for own, theirs in parts.items():
            if own in module:
                arrays[f"{PREFIX}{torch_name(source.model, name)}.{theirs}"] = mx.contiguous(module[own].T)
    mx.save_safetensors(str(folder / WEIGHTS), arrays, {"format": "pt"})
    write_json(folder / SETTINGS, settings(source))
    if source.quantised:
        return f"trained on packed weights; measured on those of {source.base_name}"
    return source.remark_on_base


BESIDE = {"kimi_vl", "llama4"}  # transformers' model holds a whole causal model, under the name that mlx-lm has


def torch_name(model: Any, name: str) -> str:
    """The module that is called `name` here, in transformers' model: a text tower inside another has other names there.

    The text model stands below `model`, beside the towers for images and sound, and its head outside.
    """
    if not name.startswith("language_model.") or model.model_type in BESIDE:
        return name
    inner = name.removeprefix("language_model.")
    return f"model.language_model.{inner.removeprefix('model.')}" if inner.startswith("model.") else inner


def _own_names(model: nn.Module, modules: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's modules by their names here; what has none keeps its own."""
    own = {torch_name(model, name): name for name, _ in model.named_modules()}
    return {own.get(name, name): parts for name, parts in modules.items()}


def settings(source: ExportSource) -> dict[str, Any]:
    """PEFT's `adapter_config.json`; their alpha / r is our scale."""
    lora = read_settings(source.trained.run.adapter)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.base_name,
        "revision": source.trained.config.model.revision,
        "r": lora.rank,
        "lora_alpha": lora.multiplier * lora.rank,
        "lora_dropout": lora.dropout,
        **_targets_of(source),
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": source.method == "dora",
        "use_rslora": False,
        "modules_to_save": None,
    }


def _targets_of(source: ExportSource) -> dict[str, Any]:
    """`targets` of an export. Beside other towers whole paths: their modules have the same short names."""
    adapted = sorted(source.adapted)
    if all(torch_name(source.model, name) == name for name in adapted) and not hasattr(source.model, "language_model"):
        return targets(adapted, [name for name, _ in source.model.named_modules()])
    paths = [torch_name(source.model, name) for name in adapted]
    return {"target_modules": paths, "layers_to_transform": None, "layers_pattern": None}


def targets(adapted: list[str], modules: list[str]) -> dict[str, Any]:
    """`target_modules` and layers that name exactly the modules in `adapted`, as short as that can be said.

    PEFT matches the end of a path, so `down_proj` would also reach an unadapted module of that name: where short names
    and layers do not give exactly the set, whole paths do.
    """
    found = [IN_BLOCK.match(name) for name in adapted]
    inside = {(m["before"], m["module"], int(m["layer"])) for m in found if m}
    layers, ends = {layer for _, _, layer in inside}, {module.split(".")[-1] for _, module, _ in inside}
    matched = [m for m in map(IN_BLOCK.match, modules) if m and int(m["layer"]) in layers]
    reached = {m.string for m in matched if m["module"].split(".")[-1] in ends}
    if all(found) and reached == set(adapted) and len({before for before, _, _ in inside}) == 1:
        total = {int(m["layer"]) for m in map(IN_BLOCK.match, modules) if m}
        some = {"layers_to_transform": sorted(layers), "layers_pattern": "layers"} if layers != total else {}
        return {"target_modules": sorted(ends), "layers_to_transform": None, "layers_pattern": None} | some
    return {"target_modules": adapted, "layers_to_transform": None, "layers_pattern": None}


def reload_peft(source: ExportSource, folder: Path) -> nn.Module:
    """The base with the adapter, read back from what was written for PEFT."""
    path = source.choices.base or source.trained.config.model.path
    config = source.trained.config.model.model_copy(update={"path": path, "adapter": None, "quantize": None})
    if source.choices.base:
        config = config.model_copy(update={"revision": None})
    policy = load_policy(config)
    attach(policy, read_peft(folder))
    return policy.model


class Adapter(NamedTuple):
    """A PEFT LoRA adapter: settings, and per module path its arrays as PEFT has them."""

    folder: Path
    settings: Mapping[str, Any]
    modules: dict[str, dict[str, mx.array]]


def read_peft(folder: Path) -> Adapter:
    """Read a PEFT adapter folder. Raises `UserError` for what is no LoRA adapter, or more than one."""
    if not (folder / SETTINGS).exists() or not (folder / WEIGHTS).exists():
        raise UserError(f"{folder}: no PEFT adapter in it; expected {SETTINGS} and {WEIGHTS}{pickled_in(folder)}")
    raw = read_json(folder / SETTINGS)
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{folder / SETTINGS}: peft_type is {raw.get('peft_type')!r}; mlx-lm supports only LORA")
    for name in ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters"):
        if raw.get(name):
            raise UserError(f"{folder / SETTINGS}: {name} is {raw[name]!r}, which an mlx-lm adapter does not support")
    if raw.get("bias", "none") != "none" or raw.get("lora_bias") or raw.get("fan_in_fan_out"):
        raise UserError(f"{folder / SETTINGS}: an mlx-lm adapter supports neither trained biases nor fan_in_fan_out")
    modules: dict[str, dict[str, mx.array]] = {}
    stored = read_tensors(folder / WEIGHTS)
    known = {theirs: own for own, theirs in [*PARTS.items(), *EMBEDDED.items()]} | {"lora_magnitude_vector.weight": "m"}
    for name, array in stored.items():
        end = next((part for part in known if name.endswith("." + part)), None)
        if end is None or not name.startswith(PREFIX):
            raise UserError(f"{folder / WEIGHTS}: `{name}` is not a LoRA array of a causal language model")
        modules.setdefault(name[len(PREFIX) : -len(end) - 1], {})[known[end]] = array
    return Adapter(folder, raw, modules)


def peft_scales(settings: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """What PEFT multiplies the updates of modules of these ranks by: alpha / r, or alpha / sqrt(r) (rsLoRA,
    arXiv 2312.03732). Raises `UserError` for a pattern that is none."""
    patterns = settings.get("alpha_pattern") or {}
    found = first_matches(list(patterns), list(ranks))
    alphas = [settings["lora_alpha"] if at is None else list(patterns.values())[at] for at in found]
    root = math.sqrt if settings.get("use_rslora") else float
    return {name: alpha / root(rank) for (name, rank), alpha in zip(ranks.items(), alphas, strict=True)}


def _checked_ranks(adapter: Adapter) -> dict[str, int]:
    """The rank of each module. Raises `UserError` for one whose arrays are no pair of matrices of one rank."""
    found = {}
    for name, parts in adapter.modules.items():
        a, b = parts.get("lora_a"), parts.get("lora_b")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
            shapes = ", ".join(f"{part} {array.shape}" for part, array in sorted(parts.items()))
            raise UserError(f"{adapter.folder}: `{name}` holds {shapes}; expected lora_a (r, in) and lora_b (out, r)")
        found[name] = a.shape[0]
        if found[name] > MOST_RANK * max(a.shape[1], b.shape[0]):
            raise UserError(f"{adapter.folder}: `{name}` has rank {a.shape[0]} between {a.shape[1]} and {b.shape[0]}")
    return found


def attach(policy: Policy, adapter: Adapter) -> LoraConfig:
    """Put a PEFT adapter onto a frozen model, trainable; returns the settings it has there.

    mlx-lm adapts the same layers of each of the last blocks with one rank and one scale. Where PEFT's ranks differ,
    the rest is filled with directions that do nothing yet; other scales go into B; modules that PEFT left out get an
    adapter that does nothing. Raises `UserError` for modules or shapes the model does not have.
    """
    adapter = adapter._replace(modules=_own_names(policy.model, adapter.modules))
    try:
        scales = peft_scales(adapter.settings, _checked_ranks(adapter))
        lora = common_settings(policy, adapter, scales)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{adapter.folder / SETTINGS}: invalid PEFT settings ({type(error).__name__}: {error}); export it again"
        ) from None
    place_lora(policy.model, lora)  # computed once the shapes are known to fit
    own: dict[str, mx.array] = dict(tree_flatten(policy.model.trainable_parameters()))
    arrays: dict[str, mx.array] = {}
    for module, parts in adapter.modules.items():
        factor = scales[module] / lora.multiplier
        for part, array in parts.items():
            name = f"{module}.{part}"
            here = array.T.astype(mx.float32) * (factor if part == "lora_b" and factor != 1 else 1)
            arrays[name] = _fill_rank(adapter, name, here, own[name], part)
    policy.model.load_weights(list(arrays.items()), strict=False)
    mx.eval(policy.model.trainable_parameters())
    return lora


def _fill_rank(adapter: Adapter, name: str, given: mx.array, fresh: mx.array, part: str) -> mx.array:
    """`given` in the shape of a fresh adapter array, which lends A's further columns; B's further rows stay zero."""
    rank = given.shape[-1] if part == "lora_a" else given.shape[0]
    if part == "lora_a" and rank < fresh.shape[1]:
        given = mx.concatenate([given, fresh[:, rank:]], axis=1)
    if part == "lora_b" and rank < fresh.shape[0]:
        given = mx.concatenate([given, fresh[rank:]], axis=0)
    if given.shape != fresh.shape:
        raise UserError(f"{adapter.folder}: `{name}` is {given.shape}, the model has {fresh.shape}; another model?")
    return given


def common_settings(policy: Policy, adapter: Adapter, scales: Mapping[str, float]) -> LoraConfig:
    """One rank, scale, set of layer names and number of blocks that cover every module of a PEFT adapter."""
    paths = {name for name, _ in policy.model.named_modules()}
    if unknown := sorted(set(adapter.modules) - paths):
        raise UserError(f"{adapter.folder}: the model has no layer `{unknown[0]}`; name the model it was made for")
    found = {name: IN_BLOCK.match(name) for name in adapter.modules}
    keys = {m["module"] if m else name for name, m in found.items()}
    blocks: list[nn.Module] = policy.model.layers  # type: ignore[assignment]
    first = min((int(m["layer"]) for m in found.values() if m), default=0)
    rank, scale = max(_checked_ranks(adapter).values()), max(scales.values())
    layers = -1 if first == 0 else len(blocks) - first
    method = "dora" if adapter.settings.get("use_dora") else "lora"
    dropout = adapter.settings.get("lora_dropout", 0.0)
    return LoraConfig(method=method, rank=rank, scale=scale, dropout=dropout, keys=sorted(keys), layers=layers)


class Imported(NamedTuple):
    """What became of a PEFT adapter: its settings here, how many modules it had, what had to be written otherwise."""

    lora: LoraConfig
    modules: int
    changes: list[str]


def import_peft(folder: Path, model: ModelConfig, out: Path) -> Imported:
    """Write the PEFT adapter in `folder`, made for `model`, as an mlx-lm adapter into `out`, which must not exist.

    The function stays the same to the last bit where ranks and scales are one; where they differ, see
    `attach`. Raises `UserError` for what an mlx-lm adapter cannot hold, and for a model it does not fit.
    """
    if out.exists():
        raise UserError(f"{out} already exists; choose another --out")
    if model.adapter is not None:
        raise UserError(f"--adapter {model.adapter}: a PEFT adapter is applied to the base model; drop --adapter")
    adapter = read_peft(folder)
    policy = load_policy(model)
    lora = attach(policy, adapter)
    with staging_folder(out.parent, f".{out.name}-draft-") as folder:
        save_adapter(policy.model, lora, folder)
        publish_new(folder, out)
    return Imported(lora, len(adapter.modules), _import_changes(adapter, lora, policy.model))


def _import_changes(adapter: Adapter, lora: LoraConfig, model: object) -> list[str]:
    """Sentences on what mlx-lm's one rank, one scale and last blocks made necessary."""
    ranks = _checked_ranks(adapter)
    scales = peft_scales(adapter.settings, ranks)
    here = sum("lora_a" in module for _, module in model.named_modules())  # type: ignore[attr-defined]
    found = []
    if lower := sum(rank < lora.rank for rank in ranks.values()):
        found.append(f"{lower} modules had a lower rank than {lora.rank}: the additional directions are zero")
    if other := sum(scale != lora.multiplier for scale in scales.values()):
        found.append(f"{other} modules had another scale than {lora.multiplier:g}: it went into their B")
    if here > len(adapter.modules):
        found.append(f"{here - len(adapter.modules)} modules had no adapter: they got one initialised to zero")
    return found
