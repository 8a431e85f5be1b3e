"""`mlxdpo plan`: the same shapes as a run, without its weights; and what it says."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiny_models import CONFIGS, write_model
from tiny_runs import finish, recipe, write_pairs
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.config import LoraConfig, ModelConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import Examples
from mlxdpo.estimate.forecast import forecast, shape_of, shortened
from mlxdpo.estimate.memory import Layouts
from mlxdpo.forward.levels import Level
from mlxdpo.io.weight_files import missing_files
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.model.skeleton import dora_extra, make_trainable, read_header, read_skeleton
from mlxdpo.training.plan import BatchLayout, planned_batch
from mlxdpo.types import Example, UserError
from mlxdpo_eval.metrics.sequential import minimum_detectable

METHODS = [{}, {"rank": 3, "layers": 1, "keys": ["self_attn.q_proj"]}, {"method": "full"}]


def shapes(arrays):
    return {name: (array.shape, array.dtype) for name, array in tree_flatten(arrays)}


@pytest.mark.parametrize("lora", METHODS, ids=["lora", "one layer", "full"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_skeleton_is_the_model_in_every_shape(kind, lora, tmp_path, cache):
    config = ModelConfig(path=str(write_model(tmp_path / kind, chatml_tokenizer(), kind)))
    skeleton, policy = read_skeleton(config), load_policy(config)
    make_trainable(skeleton.model, LoraConfig(**lora))
    attach_lora(policy.model, LoraConfig(**lora))
    assert shapes(skeleton.model.parameters()) == shapes(policy.model.parameters())
    assert shapes(skeleton.model.trainable_parameters()) == shapes(policy.model.trainable_parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_skeleton_too(dtype, tmp_path, cache):
    folder = write_model(tmp_path / "model", chatml_tokenizer(), hidden_size=64, intermediate_size=128)
    config = ModelConfig(path=str(folder), quantize=4, dtype=dtype)
    assert shapes(read_skeleton(config).model.parameters()) == shapes(load_policy(config).model.parameters())


def test_what_dora_has_beside_lora(tmp_path, cache):
    config = ModelConfig(path=str(write_model(tmp_path / "model", chatml_tokenizer())))
    skeleton, policy = read_skeleton(config), load_policy(config)
    make_trainable(skeleton.model, LoraConfig(method="dora"))
    attach_lora(policy.model, LoraConfig(method="dora"))
    size = lambda model: sum(a.size for _, a in tree_flatten(model.trainable_parameters()))  # noqa: E731
    assert size(skeleton.model) + dora_extra(skeleton.model) == size(policy.model)


def test_no_weight_is_loaded(tmp_path, cache):
    """8 MB of them; the adapters, which are made, have 0.1 MB."""
    folder = write_model(tmp_path / "model", chatml_tokenizer(), hidden_size=256, intermediate_size=1024)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    skeleton = read_skeleton(ModelConfig(path=str(folder)))
    make_trainable(skeleton.model, LoraConfig(rank=2))
    assert sum(a.nbytes for _, a in tree_flatten(skeleton.model.parameters())) > 8e6
    assert mx.get_peak_memory() - before < 1e6


@pytest.mark.parametrize("raw", [b"", b"1234567", b"\xff" * 8, b"\x02\x00\x00\x00\x00\x00\x00\x00{]"])
def test_a_file_that_is_no_safetensors_is_one_sentence(raw, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="not a safetensors file"):
        read_header(tmp_path / "model.safetensors")


completions = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 120), completions), min_size=1, max_size=4),
    st.sampled_from(["packed", "prefix"]),
    st.data(),
)
def test_a_shape_is_the_batch_that_collate_makes(prompts, level, data):
    """Prompts with several completions each, some of them the same in several pairs."""
    pairs = []
    for number, (length, lengths) in enumerate(prompts):
        prompt = np.full(length, number, np.int32)
        texts = [np.full(n, i, np.int32) for i, n in enumerate(lengths)] + [np.full(3, 99, np.int32)]
        for _ in range(data.draw(st.integers(1, 3))):
            chosen, rejected = data.draw(st.permutations(texts))[:2]
            pairs.append(Example(prompt, chosen, rejected, "x"))
    found, batch = (
        planned_batch(Examples.of(pairs), tuple(range(len(pairs))), Level(level)),
        collate(pairs, range(len(pairs)), 1),
    )
    assert found.layout[:2] == batch.prefix.shape and found.layout[2:4] == batch.rows.shape
    assert found.layout.rest == len(batch.rest) and found.layout.scored == len(batch.targets)
    assert found.tokens <= found.layout.tokens
    assert found.layout.packed == (level == "packed")


def test_what_it_says_of_a_small_run(tmp_path, cache):
    """18 pairs in windows of 4: 5 steps, 36 rows, and as many batches as windows have halves."""
    config = recipe(tmp_path)
    found = forecast(config)
    assert (found.summary.steps, found.summary.pairs, found.summary.rows) == (5, 18, 36)
    assert found.fits and found.advice == () and 0 <= found.summary.waste < 1
    events = finish(config)
    data = next(event for event in events if event.kind == "start").values["data"]
    assert found.summary.longest == data.train.row_lengths.max()
    assert found.summary.steps == sum(event.kind == "step" for event in events)


def test_weights_are_those_of_the_run(tmp_path, cache):
    config = recipe(tmp_path)
    policy = load_policy(config.model)
    assert forecast(config).memory.weights == sum(a.nbytes for _, a in tree_flatten(policy.model.parameters()))
    attach_lora(policy.model, config.lora)
    trained = sum(a.nbytes for _, a in tree_flatten(policy.model.trainable_parameters()))
    assert forecast(config).memory.trained == trained and forecast(config).memory.optimizer == 2 * trained


def test_what_does_not_fit_is_told_what_to_change_most_first(tmp_path, cache):
    write_model(tmp_path / "llama", chatml_tokenizer(), hidden_size=64, intermediate_size=512)
    found = forecast(recipe(tmp_path), machine=10**5)
    assert not found.fits
    peaks = [change.peak for change in found.advice]
    assert peaks == sorted(peaks) and peaks[-1] < found.memory.peak
    named = " ".join(change.setting for change in found.advice)
    assert "train.batch_size 1 with train.gradient_accumulation 4" in named and "data.max_length" in named


def test_shorter_rows_are_scaled_down():
    at = BatchLayout(2, 100, 4, 100, 300, 80)
    short = BatchLayout(2, 20, 4, 30, 90, 10)
    both = shortened(Layouts((at, short), (at,), short), 100)
    assert both.training == (BatchLayout(2, 50, 4, 50, 150, 40), short) and both.first == short


def test_on_the_command_line(tmp_path, cache, capsys):
    write_model(tmp_path / "model", chatml_tokenizer())
    write_pairs(tmp_path / "pairs.jsonl")
    line = ["plan", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl")]
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak"] == max(found["phases"].values()) == found["phases"][found["phase"]]
    assert found["fits"] and found["change"] == [] and found["plan"]["pairs"] > 0
    assert run([*line, "--train.batch-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "optimizer steps; longest row" in said and "it fits" in said and "distinct answers" in said


def test_it_says_what_held_out_prompts_can_show_and_how_long_it_takes(tmp_path, cache, capsys):
    write_model(tmp_path / "model", chatml_tokenizer())
    write_pairs(tmp_path / "pairs.jsonl", 40)
    line = ["plan", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl")]
    line += ["--data.eval-fraction", "0.5", "--optim.lr", "5e-6", "--train.epochs", "1"]
    assert run([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"] + found["heldout"] == 40 and found["seconds"] is None
    assert found["detectable"] == minimum_detectable(found["heldout_prompts"])
    assert run([*line, "--measure"]) == 0
    said = capsys.readouterr().out
    assert f"distinguish from 0.50: {found['detectable']:.2f}" in said
    assert "expect no visible change" in said and "training takes about 0:0" in said
    assert run([*line[:5], "--data.eval-fraction", "0", "--measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["detectable"] is None and found["warning"] is None and found["seconds"] > 0


def test_advice_is_printed(tmp_path, cache, capsys, monkeypatch):
    from mlxdpo.estimate import forecast as module

    write_model(tmp_path / "model", chatml_tokenizer())
    write_pairs(tmp_path / "pairs.jsonl")
    small = module.this_machine()._replace(memory=10**5)
    monkeypatch.setattr(module, "this_machine", lambda: small)
    assert run(["plan", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "it does not fit" in said and "data.max_length" in said


MISTAKES = {
    "plan --data pairs.jsonl --model nope": "nope: no such folder",
    "plan --model model": "no data given",
    "plan --model model --data pairs.jsonl --lora.keys wq": "the model has no layer `wq`",
    "plan --model model --data pairs.jsonl --optim.name adamx": "optim.name `adamx` is unknown",
    "plan --model empty --data pairs.jsonl": "empty: cannot be loaded (no model*.safetensors there)",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(line, tmp_path, cache, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model", chatml_tokenizer())
    write_pairs(tmp_path / "pairs.jsonl")
    (tmp_path / "empty").mkdir()
    assert run(line.split()) == 2
    said = capsys.readouterr().err
    assert MISTAKES[line] in said and said.count("\n") == 1


def test_a_dimension_that_is_not_there_is_named(tmp_path, cache):
    skeleton = read_skeleton(ModelConfig(path=str(write_model(tmp_path / "model", chatml_tokenizer()))))
    skeleton.model.args.intermediate_size = None
    without = {k: v for k, v in skeleton.config.items() if k != "intermediate_size"}
    with pytest.raises(UserError, match="has no intermediate_size"):
        shape_of(skeleton._replace(config=without), ModelConfig(path="model"))


def test_a_snapshot_that_lacks_a_shard_counts_as_one_without_weights(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path) == ["model-00002-of-00002.safetensors"]
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert missing_files(tmp_path) == ["model-00002-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert missing_files(tmp_path) == []
