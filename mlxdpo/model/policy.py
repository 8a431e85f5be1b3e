"""A language model ready to be tuned: Hugging Face weights through mlx-lm's model definitions, with its identity."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from mlxdpo.machine.device import default_dtype
from mlxdpo.model.builtin import smollm2_folder
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
    """

    model: nn.Module
    tokenizer: Any
    config: Mapping[str, Any]
    folder: Path
    eos_ids: frozenset[int]
    identity: Mapping[str, Any]


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
        raise UserError(f"{path}: not in the local cache and the Hub cannot be reached; download it first") from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
        raise UserError(f"{path}: the Hub refused it ({(str(error).splitlines() or [''])[0]})") from None


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, with the end-of-sequence ids of its configuration; no weights are read.

    Raises `UserError` when there is none, and when it needs code that `trust_remote_code` does not allow.
    """
    from mlx_lm.utils import load_config
    from mlx_lm.utils import load_tokenizer as load

    if name not in BUILTIN and not trust_remote_code:
        try_tokenizer(folder, name)
    # Said in so many words: left unsaid, transformers asks on the terminal whether to run it.
    trust = {"trust_remote_code": trust_remote_code}
    with strangers_files(name, "its tokenizer "):
        return load(folder, trust, eos_token_ids=load_config(folder).get("eos_token_id"))


def tokenizer_of(config: ModelConfig) -> Any:
    """The tokenizer of the model that a recipe names; the model is fetched, its weights are not read."""
    return load_tokenizer(_model_folder(config), config.path, config.trust_remote_code)


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
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            raise UserError(
                f"{name}: needs Python code that comes with it; read that code, and set model.trust_remote_code true "
                f"if you trust it"
            ) from None
        kind = "" if isinstance(error, FileNotFoundError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{name}: {part}cannot be loaded ({kind}{said[:300]})") from error


def check_weights(folder: Path, name: str) -> None:
    """Raise `UserError` unless `folder` holds whole safetensors weights, the only kind that is read.

    So does a config.json that counts more layers than they have.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{name}: cannot be loaded (no model*.safetensors there{pickled_in(folder)})")
    stored = {array: tensor.shape for file in files for array, tensor in read_tensors(file).items()}
    check_counts(read_json(folder / "config.json"), stored, name)


def load_policy(config: ModelConfig) -> Policy:
    """Load weights and tokenizer, all weights frozen.

    The adapter named in `config` is not attached here: see `adapters.with_adapter`.
    Raises `UserError` for a folder that is no model or one that mlx-lm has no definition for.
    """
    from mlx_lm.utils import load_model, quantize_model

    trusted = config.trust_remote_code
    folder = _model_folder(config)
    check_weights(folder, config.path)
    with strangers_files(config.path):
        model, raw = load_model(folder, lazy=True, trust_remote_code=trusted)
    tokenizer = load_tokenizer(folder, config.path, trusted)
    stored = {array.dtype for _, array in tree_flatten(model.parameters())}
    dtype = default_dtype(stored) if config.dtype == "auto" else getattr(mx, config.dtype)
    quantisation = raw.get("quantization")
    if config.quantize:
        if quantisation:
            raise UserError(f"{config.path} is already quantised ({quantisation['bits']} bits); drop model.quantize")
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
    return Policy(model, tokenizer, raw, folder, frozenset(tokenizer.eos_token_ids), identity)


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Bring every floating array to `dtype`; the packed codes of quantised layers are integers and stay."""
    floating = {name: a for name, a in tree_flatten(model.parameters()) if mx.issubdtype(a.dtype, mx.floating)}
    model.load_weights([(name, a.astype(dtype)) for name, a in floating.items()], strict=False)
