"""What is trained on top of frozen weights: LoRA, DoRA, or every weight; attached, saved, reloaded, switched off.

Folders are mlx-lm's own: `mlx_lm.generate --adapter-path runs/NAME/adapter` reads them.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxdpo.config import Config, LoraConfig
from mlxdpo.io.checksum import (
    load_checksummed,
    pickled_in,
    read_checksummed_json,
    save_checksummed,
    write_checksummed_json,
)
from mlxdpo.io.json_file import as_written
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.runs import Run
from mlxdpo.types import UserError

WEIGHTS, SETTINGS = "adapters.safetensors", "adapter_config.json"


def attach_lora(model: nn.Module, lora: LoraConfig, seed: int = 0) -> nn.Module:
    """Make `model` trainable as `lora` says (adapters start as a no-op) and return it.

    Raises `UserError` for a layer name the model does not have, too many layers, or full training of weights that
    cannot take it: in 16 bits a step of 1e-6 rounds to nothing, and quantised codes have no gradient.
    """
    place_lora(model, lora, seed)
    mx.eval(model.trainable_parameters())
    return model


def place_lora(model: nn.Module, lora: LoraConfig, seed: int = 0) -> None:
    """`attach_lora` without computing anything: shapes can be looked at before there is an array of them."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    lora = checked_lora(model, lora)
    if lora.method == "full":
        model.unfreeze()
        model.train()
        return
    mx.random.seed(seed)
    model.freeze()
    settings = {"rank": lora.rank, "scale": lora.multiplier, "dropout": lora.dropout}
    if lora.keys is not None:
        settings["keys"] = set(lora.keys)
    linear_to_lora_layers(model, lora.layers, settings, use_dora=lora.method == "dora")
    model.train()


def checked_lora(model: nn.Module, lora: LoraConfig) -> LoraConfig:
    """`lora` with its layers under their full names. Raises `UserError` for what `attach_lora` would refuse, before
    anything is changed."""
    if lora.method == "full":
        _check_full(model)
        return lora
    lora = _with_full_names(model, lora)
    _check_names(model, lora)
    return lora


def _check_full(model: nn.Module) -> None:
    arrays = dict(tree_flatten(model.parameters()))
    if packed := [name for name, a in arrays.items() if not mx.issubdtype(a.dtype, mx.floating)]:
        raise UserError(f"lora.method full cannot train quantised weights ({packed[0]}); use lora or dora")
    if small := {str(a.dtype) for a in arrays.values() if a.dtype.size < 4}:
        raise UserError(
            f"lora.method full needs model.dtype float32: updates of 1e-6 vanish in {small.pop().split('.')[-1]}"
        )


def _check_names(model: nn.Module, lora: LoraConfig) -> None:
    blocks: list[nn.Module] = model.layers  # type: ignore[assignment]
    if lora.layers > len(blocks):
        raise UserError(f"lora.layers is {lora.layers}, but the model has {len(blocks)} blocks; use -1 for all")
    inside = {name for name, module in blocks[-1].named_modules() if hasattr(module, "weight")}
    known = inside | {name for block in blocks for name, _ in block.named_modules()}
    known |= {name for name, _ in model.named_modules()}
    if taken := sorted(name for name in lora.keys or () if name.rpartition(".")[2] in read_as_arrays(model)):
        raise UserError(f"lora.keys: the model uses the weights of `{taken[0]}` directly; remove it")
    if unknown := sorted(set(lora.keys or ()) - known):
        raise UserError(f"lora.keys: the model has no layer `{unknown[0]}`; in its blocks: {', '.join(sorted(inside))}")


def _with_full_names(model: nn.Module, lora: LoraConfig) -> LoraConfig:
    """`lora` with layers that are named by their last word (PEFT's habit: q_proj) under their names in the blocks."""
    if lora.keys is None:
        return lora
    blocks: list[nn.Module] = model.layers  # type: ignore[assignment]
    inside = {name for block in blocks for name, module in block.named_modules() if hasattr(module, "weight")}
    meant = {key: {name for name in inside if name.endswith(f".{key}")} - {key} for key in lora.keys}
    keys = sorted({name for key in lora.keys for name in (meant[key] if key not in inside and meant[key] else {key})})
    return lora if keys == sorted(lora.keys) else lora.model_copy(update={"keys": keys})


def adaptable(model: nn.Module, lora: LoraConfig) -> LoraConfig:
    """`lora` with its layers named where not all linear layers can carry an adapter."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    taken = read_as_arrays(model) if lora.method != "full" and lora.keys is None else frozenset()
    if not taken:
        return lora
    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    blocks: list[nn.Module] = model.layers  # type: ignore[assignment]
    found = {name for block in blocks for name, module in block.named_modules() if isinstance(module, kinds)}
    keys = sorted(name for name in found if name.rpartition(".")[2] not in taken)
    return LoraConfig.model_validate(lora.model_dump(exclude_none=True, exclude_unset=True) | {"keys": keys})


def read_as_arrays(model: nn.Module) -> frozenset[str]:
    """Names of layers whose weights mlx-lm's file reads as arrays (gemma3n, kimi_k3): adapters would not be asked."""
    modules = {type(module).__module__ for module in model.modules()}
    files = {module for module in modules if module.startswith("mlx_lm.models.")}
    return frozenset().union(*(weights_read(module) for module in files))


@functools.cache
def weights_read(module: str) -> frozenset[str]:
    """X of every `.X.weight` in what a model file computes with."""
    tree, found = ast.parse(Path(str(sys.modules[module].__file__)).read_text("utf-8")), set()
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        if function.name in ("__init__", "sanitize", "shard", "quant_predicate"):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute):
                found.add(node.value.attr)
    return frozenset(found)


def adapter_settings(lora: LoraConfig) -> dict[str, Any]:
    """`adapter_config.json` in mlx-lm's form."""
    parameters: dict[str, Any] = {"rank": lora.rank, "scale": lora.multiplier, "dropout": lora.dropout}
    if lora.keys is not None:
        parameters["keys"] = sorted(lora.keys)
    return {"fine_tune_type": lora.method, "num_layers": lora.layers, "lora_parameters": parameters}


def save_adapter(model: nn.Module, lora: LoraConfig, folder: Path) -> None:
    """Write the trainable arrays and their settings; each file whole or absent."""
    arrays = dict(tree_flatten(model.trainable_parameters()))
    save_checksummed(folder / WEIGHTS, arrays, {"format": "mlx"})
    write_checksummed_json(folder / SETTINGS, adapter_settings(lora))


def read_settings(folder: Path) -> LoraConfig:
    """The settings an adapter folder was trained with. Raises `UserError` when it is no adapter folder."""
    file = folder / SETTINGS
    if not file.exists() or not (folder / WEIGHTS).exists():
        raise UserError(f"{folder}: no adapter in it; expected {SETTINGS} and {WEIGHTS}{pickled_in(folder)}")
    raw = read_checksummed_json(file)
    with as_written(file):
        inner = raw.get("lora_parameters") or {}
        method = raw.get("fine_tune_type", "lora")
        layers = raw.get("num_layers") or -1  # mlx-lm reads 0 as all blocks too
        shape = {k: inner[k] for k in ("rank", "scale", "dropout", "keys") if k in inner}
        return LoraConfig(method=method, layers=layers, **shape)


def load_adapter(model: nn.Module, folder: Path, lora: LoraConfig | None = None) -> nn.Module:
    """Attach the adapter in `folder`, trainable, with its own settings or `lora`'s; returns the model."""
    place_lora(model, lora or read_settings(folder))  # a stranger's rank is held against the file before it is believed
    load_arrays(model, folder)
    return model


def load_arrays(model: nn.Module, folder: Path) -> None:
    """Overwrite the trainable arrays by those saved in `folder`; names and shapes must match one to one."""
    own = dict(tree_flatten(model.trainable_parameters()))
    saved = load_checksummed(folder / WEIGHTS)
    for name in sorted(own.keys() ^ saved.keys()):
        raise UserError(f"{folder}: `{name}` is only in the {'model' if name in own else 'adapter'}; another model?")
    for name, array in own.items():
        if array.shape != saved[name].shape:
            raise UserError(f"{folder}: `{name}` is {saved[name].shape}, the model has {array.shape}; another model?")
        if not mx.issubdtype(saved[name].dtype, mx.floating):
            raise UserError(
                f"{folder}: `{name}` holds {_dtype(saved[name])}, expected floating-point numbers; restore it"
            )
    model.load_weights(list(saved.items()), strict=False)
    mx.eval(model.trainable_parameters())


def _dtype(array: mx.array) -> str:
    return str(array.dtype).removeprefix("mlx.core.")


def load_run(run: Run, *, checkpoint: Path | None = None) -> Policy:
    """A run's tuned model: its base with `adapter/`, or with the adapter of one of its checkpoints.

    Raises `UserError` when the base model is not the one the run was trained on, and for a reward model.
    """
    config, folder = run.config(), checkpoint or run.adapter
    if config.stage == "reward":
        raise UserError(
            f"{run.path}: a reward model writes no text; use it as a judge (mlxdpo eval RUN --judge reward:{run.path})"
        )
    lora = read_settings(folder)
    policy = base_of_run(run)
    load_adapter(policy.model, folder, lora)
    return policy


def base_of_run(run: Run) -> Policy:
    """The bare model under a run's adapter. Raises `UserError` where it is gone or not the one in the manifest."""
    config = run.config()
    run.need("model.path")
    policy = load_policy(config.model)
    if policy.identity["digest"] != run.manifest()["model"]["digest"]:
        raise UserError(f"{run.path}: {config.model.path} changed since this run was trained; restore it")
    return policy


def load_start(run: Run) -> Policy:
    """The model as a run found it: its base, with the adapter that training started from, if any."""
    config = run.config()
    run.need("model.path", "model.adapter")
    policy = load_policy(config.model)
    if config.model.adapter is not None:
        load_adapter(policy.model, Path(config.model.adapter))
    return policy


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The frozen model under the adapters, while the context lasts. Exact for LoRA and DoRA: the layers are swapped."""
    wrapped = [(n, m) for n, m in model.named_modules() if "lora_a" in m and ("linear" in m or "embedding" in m)]
    bare = [(name, module.linear if "linear" in module else module.embedding) for name, module in wrapped]
    model.update_modules(tree_unflatten(bare))
    try:
        yield model
    finally:
        model.update_modules(tree_unflatten(wrapped))


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[nn.Module]:
    """No dropout while the context lasts; every other layer stays in training mode, as both modes must agree."""
    drops = [module for _, module in model.named_modules() if isinstance(module, nn.Dropout)]
    before = [module.training for module in drops]
    for module in drops:
        module.eval()
    try:
        yield model
    finally:
        for module, training in zip(drops, before, strict=True):
            module.train(training)


def with_adapter(config: Config, model: nn.Module) -> Config:
    """Attach the adapter that training starts from, if any; its settings become the run's.

    Raises `UserError` for a `lora` setting that contradicts the adapter or that the model cannot take.
    """
    if config.model.adapter is None:
        lora = checked_lora(model, config.lora)
        return config.model_copy(update={"lora": adaptable(model, lora)})
    own = read_settings(Path(config.model.adapter))
    for name in config.lora.model_fields_set & {"method", "rank", "keys", "layers", "alpha", "scale"}:
        asked = config.lora.multiplier if name in ("alpha", "scale") else getattr(config.lora, name)
        has = own.multiplier if name in ("alpha", "scale") else getattr(own, name)
        same = sorted(asked) == sorted(has) if isinstance(asked, list) and isinstance(has, list) else asked == has
        if asked is not None and not same:
            raise UserError(
                f"lora.{name} is {asked}, but the adapter {config.model.adapter} has {has}; drop lora.{name}"
            )
    dropout = config.lora.dropout if "dropout" in config.lora.model_fields_set else own.dropout
    lora = LoraConfig.model_validate(own.model_dump(exclude_none=True) | {"dropout": dropout})
    load_adapter(model, Path(config.model.adapter), lora)
    return config.model_copy(update={"lora": lora})
