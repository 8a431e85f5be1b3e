"""What is exported: a trained run, the folder its weights came from, and what training did to each of them.

The delta is added in float32 and the sum rounded once. mlx-lm's own fuse rounds the delta first: at .3 % of the
weights' size that alone costs a tenth of its direction in bfloat16.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.exporters.record import card_metadata
from mlxdpo.inference.trained_run import TrainedRun
from mlxdpo.io.atomic import write_json
from mlxdpo.io.checksum import read_tensors
from mlxdpo.io.json_file import read_json
from mlxdpo.io.names import is_hub_id
from mlxdpo.io.weight_files import weight_files
from mlxdpo.model.adapters import read_settings
from mlxdpo.model.chat_template import NAMED_FOLDER, template_settings, write_template_files
from mlxdpo.model.corrections import model_classes
from mlxdpo.model.model_config import read_model_config
from mlxdpo.model.policy import find_model

Change = Callable[[mx.array], mx.array]
"""A base weight -> the tuned one, both float32 and of one shape."""


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that carry an adapter, by path."""
    return {name: module for name, module in model.named_modules() if "lora_a" in module}


def base_of(module: Any) -> nn.Module:
    """The frozen layer under an adapter."""
    return module.linear if "linear" in module else module.embedding


def plain_weight(layer: Any) -> mx.array:
    """The weight of a frozen layer in float32, dequantised where it is packed."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    biases = layer.biases.astype(mx.float32) if layer.get("biases") is not None else None
    scales = layer.scales.astype(mx.float32) if layer.mode == "affine" else layer.scales
    return mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits, layer.mode).astype(mx.float32)


def delta(module: Any) -> mx.array:
    """What an adapter adds before DoRA's normalisation, float32, in its weight's shape.

    LoRA (arXiv 2106.09685 eq. 3): scale * (A B)^T for a linear layer with A (in, r), B (r, out); scale * A B for an
    embedding with A (words, r), B (r, D); scale * B A for each of a stack of experts.
    """
    a, b = module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
    if "embedding" in module:
        return module.scale * (a @ b)
    if b.ndim == 3:  # experts: A is kept as (E * r, in), B as (E, out, r)
        return module.scale * (b @ a.reshape(b.shape[0], -1, a.shape[-1]))
    return module.scale * (b.T @ a.T)


def tuned(module: Any, weight: mx.array) -> mx.array:
    """The weight that computes alone what `module` computes on top of `weight`; float32.

    DoRA (arXiv 2402.09353 eq. 5): m (W + delta) / ||W + delta||, norms over each output's row.
    """
    moved = weight + delta(module)
    if "m" not in module:
        return moved
    return module.m.astype(mx.float32)[:, None] * moved / mx.linalg.norm(moved, axis=1, keepdims=True)


def changes(model: nn.Module, method: str) -> dict[str, Change]:
    """Every changed parameter of a tuned model, named as in the plain model without adapters."""
    if method == "full":
        arrays: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
        return {name: partial(_replaced, array) for name, array in arrays.items()}
    return {f"{name}.weight": partial(tuned, module) for name, module in adapted(model).items()}


def expert_change(change: Change, e: int) -> Change:
    """The change of expert `e` alone, where the model stacks experts and the checkpoint does not."""
    assert isinstance(change, partial)  # `changes` makes no others
    if change.func is _replaced:
        return partial(_replaced, change.args[0][e])
    return partial(_moved_expert, change.args[0], e)


def _moved_expert(module: Any, e: int, weight: mx.array) -> mx.array:
    a = module.lora_a.astype(mx.float32)
    a = a.reshape(module.lora_b.shape[0], -1, a.shape[-1])
    return weight + module.scale * (module.lora_b[e].astype(mx.float32) @ a[e])


def dequantised(model: nn.Module) -> dict[str, Change]:
    """For each packed layer of a model, adapted or not: its weight as it computes, whatever was stored."""
    found: dict[str, Change] = {}
    inside = {id(base_of(module)) for module in adapted(model).values()}
    for name, module in model.named_modules():
        if "lora_a" in module and "scales" in base_of(module):
            found[f"{name}.weight"] = partial(_tuned_plain, module)
        elif "scales" in module and id(module) not in inside:
            found[f"{name}.weight"] = partial(_plain_layer, module)
    return found


def _tuned_plain(module: Any, weight: mx.array) -> mx.array:
    return tuned(module, plain_weight(base_of(module)))


def _plain_layer(layer: Any, weight: mx.array) -> mx.array:
    return plain_weight(layer)


def _replaced(by: mx.array, weight: mx.array) -> mx.array:
    return by.astype(mx.float32)


GgufType = Literal[
    "auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"
]
# What travels with weights besides weights: never code, never what some tool left in the folder.
SIDE = ("*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja", f"{NAMED_FOLDER}/*.jinja", "LICENSE*", "NOTICE*")
NOT_SIDE = ("*.index.json", "adapter_config.json", "export.json", "hf_quant_config.json")


class Origins(NamedTuple):
    """Which stored tensors a model's parameters are, found by following mlx-lm's `sanitize`.

    A hundred model files rename, drop, stack or transform tensors on loading. The loader is run on lazy arrays and
    asked afterwards: a parameter that is the very array that was stored has kept its values and only, perhaps, its
    name. What was stacked is found again by its values. Anything else counts as unknown.

    `stored` names each tensor's file, `one` the tensor that a parameter is, `made` the parameters that are none.
    `unused` are tensors that no parameter has: tied heads stored twice, buffers, experts before they were stacked.
    """

    stored: dict[str, Path]
    one: dict[str, str]
    made: dict[str, mx.array]
    unused: dict[str, mx.array]

    def of(self, parameter: str) -> tuple[str, ...] | None:
        """The tensors that make up a parameter, in their order along its first axis; None when that is not known."""
        if parameter in self.one:
            return (self.one[parameter],)
        if parameter not in self.made or self.made[parameter].ndim < 3:
            return None
        whole, known = self.made[parameter], {}
        for name, array in self.unused.items():
            if array.shape == whole.shape[1:] and array.dtype == whole.dtype:
                known[_array_digest(array)] = name
        found = [known.get(_array_digest(part)) for part in whole]
        return tuple(name for name in found if name) if all(found) and len(set(found)) == len(found) else None


def origins(folder: Path) -> Origins:
    """Follow mlx-lm's loader through the tensors of `folder`; reads headers only."""
    from mlx_lm.utils import load_config

    config = read_model_config(load_config(folder), folder.name).loaded
    model_class, arguments = model_classes(config)
    stored, files = {}, {}
    for file in weight_files(folder):
        part = read_tensors(file)
        stored |= part
        files |= dict.fromkeys(part, file)
    model = model_class(arguments.from_dict(config))  # `sanitize` may change the model: this one is for it alone
    parameters = model.sanitize(dict(stored)) if hasattr(model, "sanitize") else dict(stored)
    names = {id(array): name for name, array in stored.items()}
    one = {name: names[id(array)] for name, array in parameters.items() if id(array) in names}
    made = {name: array for name, array in parameters.items() if name not in one}
    unused = {name: array for name, array in stored.items() if name not in set(one.values())}
    return Origins(files, one, made, unused)


def _array_digest(array: mx.array) -> bytes:
    return hashlib.sha256(np.array(array.view(mx.uint8)).tobytes()).digest()


@dataclass(frozen=True)
class Choices:
    """What the user may choose. `base` is the full-precision model that a quantised run is put onto; `ollama_base` one
    of Ollama's, for the adapter alone; `publisher` the folder of LM Studio's that a model lies in."""

    base: str | None = None
    bits: int = 4
    group_size: int = 64
    gguf_type: GgufType = "auto"
    ollama_base: str | None = None
    lmstudio: Literal["mlx", "gguf"] = "mlx"
    publisher: str = "mlxdpo"


@dataclass(frozen=True)
class ExportSource:
    """A trained run to be exported."""

    trained: TrainedRun
    choices: Choices

    @property
    def model(self) -> nn.Module:
        """The tuned model, adapters attached."""
        return self.trained.policy.model

    @property
    def folder(self) -> Path:
        """The folder of the weights that were trained on."""
        return self.trained.policy.folder

    @cached_property
    def method(self) -> str:
        """lora, dora or full."""
        return read_settings(self.trained.run.adapter).method

    @cached_property
    def base(self) -> Path:
        """The folder that fused Hugging Face weights and PEFT adapters stand on: `--base`, else the trained one."""
        return find_model(self.choices.base) if self.choices.base else self.folder

    @property
    def stored_quantised(self) -> bool:
        """Whether the trained folder itself holds packed weights."""
        return "quantization" in self.raw_config or "quantization_config" in self.raw_config

    @property
    def quantised(self) -> bool:
        """Whether the run trained on packed weights, stored or made when loading."""
        return self.trained.policy.identity["quantization"] is not None

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The base's config.json as it stands on disk."""
        return read_json(self.folder / "config.json")

    @cached_property
    def adapted(self) -> dict[str, nn.Module]:
        """The adapted modules by their path in the model; empty after full fine-tuning."""
        return adapted(self.model)

    @cached_property
    def changes(self) -> dict[str, Change]:
        """What became of each changed parameter, by its name in mlx-lm's model."""
        return changes(self.model, self.method)

    @cached_property
    def origins(self) -> Origins:
        """Which tensors of the base folder each parameter is made of."""
        return origins(self.base)

    @property
    def base_name(self) -> str:
        """What cards and adapters call the base: a Hub id where there is one, never a path of this machine."""
        return hub_name(self.choices.base or self.trained.config.model.path, self.base)

    @property
    def remark_on_base(self) -> str | None:
        """What an adapter's user has to know when the base goes by a Hub id that is not where its weights came from."""
        path = self.choices.base or self.trained.config.model.path
        if is_hub_id(path) or self.base_name == Path(path).resolve().name:
            return None
        return f"made for, and measured on, {Path(path).name}, a version of {self.base_name} by its card"


def hub_name(path: str, folder: Path) -> str:
    """The Hub id behind a model: itself, or the `base_model` of a local folder's card, else the folder's name."""
    if is_hub_id(path):
        return path
    named = card_metadata(folder / "README.md").get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    return named if isinstance(named, str) else Path(path).resolve().name


def side_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer, template, generation settings and licence of a model folder."""
    dropped = {file for pattern in NOT_SIDE for file in folder.glob(pattern)}
    return sorted({file for pattern in SIDE for file in folder.glob(pattern)} - dropped)


def copy_side_files(source: ExportSource, base: Path, folder: Path) -> None:
    """What an export has besides weights: the base's files, templates where tokenizers look for them, and the ends."""
    for file in side_files(base):
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    write_template_files(template_settings(base), folder)
    _write_ends(source, folder)


def _write_ends(source: ExportSource, folder: Path) -> None:
    """Let an export's generation_config.json end answers where training taught them to end, too."""
    said, listed, taught = _ends_said_in(source, folder)
    if taught:
        write_json(folder / "generation_config.json", said | {"eos_token_id": [*listed, *taught]})


def _ends_said_in(source: ExportSource, folder: Path) -> tuple[dict[str, Any], list[int], list[int]]:
    """A folder's generation settings, the ends that they or the base's config.json name, and those taught besides."""
    file, raw = folder / "generation_config.json", source.raw_config
    said = read_json(file) if file.is_file() else {k: raw[k] for k in ("bos_token_id", "pad_token_id") if raw.get(k)}
    own = said.get("eos_token_id", raw.get("eos_token_id"))
    listed: list[int] = [own] if isinstance(own, int) else list(own or ())
    return said, listed, sorted(source.trained.policy.eos_ids - set(listed))


def ends_beside_base(source: ExportSource) -> list[str]:
    """Tokens that training taught as ends and that the base's own files, which an adapter is used with, do not name."""
    return source.trained.policy.tokenizer.convert_ids_to_tokens(_ends_said_in(source, source.folder)[2])
