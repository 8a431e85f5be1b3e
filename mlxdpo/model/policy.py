"""A language model ready to be tuned: Hugging Face weights through mlx-lm's model definitions, with its identity."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxdpo.config import ModelConfig
from mlxdpo.io.atomic import DISK
from mlxdpo.io.checksum import pickled_in, read_tensors
from mlxdpo.io.digest import folder_digest
from mlxdpo.io.json_file import read_json
from mlxdpo.io.weight_files import PATTERN, check_weight_files, left_over, only_weights
from mlxdpo.machine.device import default_dtype, limit_memory
from mlxdpo.machine.errors import error_message
from mlxdpo.model.builtin import smollm2_folder
from mlxdpo.model.chat_template import template_settings
from mlxdpo.model.corrections import correct, model_classes, router_note
from mlxdpo.model.ends import end_tokens
from mlxdpo.model.model_config import ModelReading, module_of, names_read, read_model_config
from mlxdpo.model.stored_shapes import check_counts
from mlxdpo.model.trial import try_tokenizer
from mlxdpo.types import UserError

BUILTIN = {"smollm2": smollm2_folder}
CODE = "*.py"  # downloaded and run only with model.trust_remote_code
DOWNLOAD = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Policy:
    """A loaded model. `config` is the original config.json, whole (mlx-lm's model arguments lose keys).

    `identity` says which numbers it computes with: source, revision, digest of the weights, dtype, quantisation.
    `reading` says how its config was brought under mlx-lm's names, and up to which length of row that holds.
    """

    model: nn.Module
    tokenizer: Any
    config: Mapping[str, Any]
    folder: Path
    eos_ids: frozenset[int]
    identity: Mapping[str, Any]
    reading: ModelReading = field(default_factory=lambda: ModelReading({}))


def find_model(path: str, revision: str | None = None, patterns: Sequence[str] = DOWNLOAD) -> Path:
    """The folder of a model: a local one, the built-in `smollm2`, or a Hub id, of which `patterns` are downloaded once.

    Raises `UserError` when there is none.
    """
    if not path:
        raise UserError("no model given; pass --model with a Hugging Face folder, a Hub id, or `smollm2`")
    if path in BUILTIN:
        return BUILTIN[path]()
    if os.path.isdir(path):  # unlike Path.is_dir, it answers for every name
        return Path(path)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"{path}: no such folder, and not a Hub id (owner/name) nor {', '.join(BUILTIN)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        raise UserError(
            f"{path}: not in the local cache and the Hub cannot be reached; once online: hf download {path}"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise UserError(f"{path}: the Hub refused it ({(str(error).splitlines() or [''])[0]})") from None


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, with the tokens that end an answer (`ends`); no weights are read.

    Raises `UserError` when there is none, and when it needs code that `trust_remote_code` does not allow.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    if name not in BUILTIN and not trust_remote_code:
        try_tokenizer(folder, name)
    # Said in so many words: left unsaid, transformers asks on the terminal whether to run it.
    trust = {"trust_remote_code": trust_remote_code}
    with strangers_files(name, "its tokenizer "):
        said = load_config(folder)
        tokenizer = load(folder, trust | template_settings(folder), eos_token_ids=said.get("eos_token_id"))
        for token in end_tokens(tokenizer._tokenizer, said):
            tokenizer.add_eos_token(str(token))
        return tokenizer


def tokenizer_of(config: ModelConfig) -> Any:
    """The tokenizer of the model that a recipe names; the model is fetched, its weights are looked for and not read."""
    folder = _model_folder(config)
    check_weights(folder, config.path)
    return load_tokenizer(folder, config.path, config.trust_remote_code)


def _model_folder(config: ModelConfig) -> Path:
    return find_model(config.path, config.revision, [*DOWNLOAD, CODE] if config.trust_remote_code else DOWNLOAD)


@contextlib.contextmanager
def strangers_files(name: str, part: str = "") -> Iterator[None]:
    """Whatever goes wrong with the files of a model becomes one sentence; what needs code names the knob for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises Exception itself, the model definitions whatever breaks first
        if isinstance(error, RuntimeError | MemoryError) and error_message(error):
            raise  # the machine's fault, not the files'
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            raise UserError(
                f"{name}: needs Python code that comes with it; read that code, and set model.trust_remote_code true "
                f"if you trust it"
            ) from None
        kind = "" if isinstance(error, FileNotFoundError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{name}: {part}cannot be loaded ({kind}{said[:300]})") from error


def check_weights(folder: Path, name: str) -> list[Path]:
    """The weight files of `folder`, whole safetensors files. Raises `UserError` for anything else, with the way out."""
    files = check_weight_files(folder, name)
    if not files:
        raise UserError(f"{name}: {why_no_weights(folder, name)}")
    seen: dict[str, str] = {}
    shapes: dict[str, Sequence[int]] = {}
    for file in files:
        for tensor, array in read_tensors(file).items():
            shapes[tensor] = array.shape
            if tensor in seen:
                raise UserError(f"{name}: {seen[tensor]} and {file.name} both hold `{tensor}`; move one of them away")
            seen[tensor] = file.name
    check_counts(read_json(folder / "config.json"), shapes, name)
    return files


def why_no_weights(folder: Path, name: str) -> str:
    """What a folder without a model's weights is, and what to do with it."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        said = read_json(adapter)
        base = str(said.get("base_model_name_or_path") or said.get("model") or "BASE")[:120]
        if "peft_type" in said:
            return (
                f"that is a PEFT adapter, its base is {base}; "
                f"run `mlxdpo import --peft {name} --model {base} --out ADAPTER`, then train with "
                f"`--model {base} --model.adapter ADAPTER`"
            )
        return f"that is an adapter, its base is {base}; use `--model {base} --model.adapter {name}`"
    if found := sorted(folder.glob("consolidated*.safetensors")):
        return (
            f"cannot be loaded ({found[0].name} is the maker's own format); take the version of the model that "
            f"transformers loads, with {PATTERN}"
        )
    return f"cannot be loaded (no {PATTERN} there{pickled_in(folder)})"


PACKINGS = {"bitnet", "mxfp4", "mxfp8", "compressed-tensors", "modelopt", "awq"}


def check_packing(raw: Mapping[str, Any], name: str) -> None:
    """Raise `UserError` for packed weights that mlx-lm does not unpack; it would read their codes as numbers."""
    said = raw.get("quantization_config") or raw.get("text_config", {}).get("quantization_config") or {}
    way = str(said.get("quant_method", "")) if isinstance(said, Mapping) else ""
    if not way or "quantization" in raw or way in PACKINGS:
        return
    own = names_read(module_of(str(raw.get("model_type"))))
    if way == "fp8" and ("weight_scale_inv" in own or any("scale_inv" in one for one in own)):
        return
    raise UserError(
        f"{name}: its weights are packed by {way}, which mlx-lm does not unpack; take the model in 16 bits and pack it "
        f"when loading (--model.quantize 4)"
    )


def load_policy(config: ModelConfig) -> Policy:
    """Load weights and tokenizer, all weights frozen.

    The adapter named in `config` is not attached here: see `adapters.with_adapter`.
    Raises `UserError` for a folder that is not a model or one that mlx-lm has no definition for.
    """
    from mlx_lm.utils import quantize_model

    limit_memory()
    trusted = config.trust_remote_code
    folder = _model_folder(config)
    check_weights(folder, config.path)
    model, raw, reading = load_folder(folder, config.path, trusted)
    tokenizer = load_tokenizer(folder, config.path, trusted)
    stored = {array.dtype for _, array in tree_flatten(model.parameters())}
    dtype = default_dtype(stored) if config.dtype == "auto" else getattr(mx, config.dtype)
    quantisation = raw.get("quantization")
    if config.quantize:
        if quantisation:
            raise UserError(f"{config.path} is already quantised ({quantisation['bits']} bits); drop model.quantize")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line of its own
            model, changed = quantize_model(model, dict(raw), group_size=64, bits=config.quantize)
        quantisation = changed["quantization"]
    cast(model, dtype)
    model.freeze()
    model.train()  # gated-delta layers have a gradient only in this mode, and both modes must agree
    with strangers_files(config.path):
        mx.eval(model.parameters())
    identity = {
        "source": config.path,
        "revision": config.revision,
        "digest": folder_digest(folder, code=trusted),
        "dtype": str(dtype).removeprefix("mlx.core."),
        "quantization": quantisation,
    }
    return Policy(model, tokenizer, raw, folder, frozenset(tokenizer.eos_token_ids), identity, reading)


def load_folder(folder: Path, name: str, trusted: bool = False) -> tuple[nn.Module, dict[str, Any], ModelReading]:
    """The model in a folder, its weights not yet read; its config.json; and how that was read.

    The model computes what transformers computes. Raises `UserError` for what mlx-lm has no definition for, or
    computes otherwise.
    """
    from mlx_lm.utils import load_config

    with strangers_files(name):
        raw = load_config(folder)
        check_packing(raw, name)
        reading = ModelReading(raw) if raw.get("model_file") else read_model_config(raw, name)
        if extra := left_over(folder):
            note = f"{name}: {', '.join(extra[:3])} is not in an index and is ignored"
            reading = reading._replace(notes=(*reading.notes, note))
        with only_weights(folder) as view:
            try:
                model, loaded = _load(view, reading, trusted)
            except ValueError as error:
                if not reading.filled:
                    raise
                try:
                    model, loaded = _load(view, reading := reading.as_stored(), trusted)
                except (ValueError, TypeError):
                    raise error from None
        packed = {key: loaded[key] for key in ("quantization", "quantization_config") if key in loaded}
        if note := router_note(model):
            reading = reading._replace(notes=(*reading.notes, f"{name}: {note}"))
        model = correct(model, reading.loaded)
        try_two_tokens(model)
        return model, raw | packed, reading


def try_two_tokens(model: nn.Module) -> None:
    """Call the model as generation does, so that a configuration which its own code cannot run (an odd head dimension
    under rotary positions) raises here and not later. Nothing is computed."""
    from mlx_lm.models.cache import make_prompt_cache

    model(mx.zeros((1, 2), mx.int32), cache=make_prompt_cache(model))


def _load(folder: Path, reading: ModelReading, trusted: bool) -> tuple[nn.Module, dict[str, Any]]:
    from mlx_lm.utils import load_model

    return load_model(
        folder,
        lazy=True,
        model_config=reading.loaded,
        get_model_classes=model_classes,
        trust_remote_code=trusted,
    )


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Bring every floating array to `dtype`; the packed codes of quantised layers are integers and stay."""
    floating = {name: a for name, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)}
    model.load_weights([(name, a.astype(dtype)) for name, a in floating.items()], strict=False)
