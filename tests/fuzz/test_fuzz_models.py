"""Models and adapters of a stranger, one number or array of them changed: a result or a sentence; no crash, no hang."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from counting import case, fuzzed
from mutating import SEEDS, mutate_bytes
from tiny_models import write_model
from tiny_runs import write_pairs
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.types import UserError

pytestmark = pytest.mark.fuzz

NUMBERS = [0, -1, 1, 2, 3, 7, 1000, 10**5, 10**7, 10**9, 2**31, 2**62, 10**30, 0.5, -2.5, 1e-300, 1e300, True, None,
           "x", [], {}, [1] * 50, "\0", {"a": 1}]  # fmt: skip
MORE = ["rope_scaling", "quantization", "partial_rotary_factor", "layer_types", "num_experts", "sliding_window"]
SHAPES = [(10**9, 0), (0, 32), (4, 32, 1), (1, 1), (32,), (3, 32), (4, 33), (10**5, 1), ()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiny models, pairs, an adapter of each kind, and the process that runs the command lines."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "qwen3"):
        write_model(folder / kind, chatml_tokenizer(), kind)
    write_pairs(folder / "pairs.jsonl", 2)
    runner = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "forking.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip

    def call(*words):
        """What a command line ends in: None, a `UserError` with its sentence, or a failed assertion."""
        runner.stdin.write(json.dumps([*map(str, words)]) + "\n")
        runner.stdin.flush()
        found = json.loads(runner.stdout.readline())
        assert found["status"] in (0, 2) and "traceback: " not in found["said"], found
        if found["status"] == 2:
            (sentence,) = [line for line in found["said"].splitlines() if line.startswith("error: ")]
            raise UserError(sentence)

    yield folder, call
    runner.stdin.close()
    runner.wait()


def changed_config(rng, config):
    config = dict(config)
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice([*config, *MORE])
        value = rng.choice(NUMBERS)
        if key in ("rope_scaling", "quantization") and rng.random() < 0.7:
            names = ["rope_type", "type", "factor", "group_size", "bits", "original_max_position_embeddings"]
            value = {name: rng.choice([*NUMBERS, "linear", "llama3", "yarn", 64, 4]) for name in rng.sample(names, 3)}
        config[key] = value
    return config


@fuzzed(8, 150, seed=SEEDS)
def test_configs(place, tmp_path, seed):
    folder, call = place
    rng = random.Random(seed)
    kind, target = rng.choice(["llama", "qwen3"]), tmp_path / "m"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder / kind, target)
    file = target / "config.json"
    file.write_text(json.dumps(changed_config(rng, json.loads(file.read_text()))))
    if rng.random() < 0.15:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    words = rng.choice([["score", "--out", tmp_path / "o.jsonl"], ["plan"]])
    case("models: config.json", lambda: call(*words, "--model", target, "--data", folder / "pairs.jsonl"))


@fuzzed(8, 150, seed=SEEDS)
def test_adapters(place, tmp_path, seed):
    """PEFT's and mlx-lm's: settings, patterns, shapes, and single bytes of the weights."""
    folder, call = place
    rng, source = random.Random(seed), tmp_path / "a"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(tmp_path / "start", ignore_errors=True)
    source.mkdir()
    peft = rng.random() < 0.6
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_" if peft else "model.layers.1.self_attn.q_proj.lora_"
    names = ("A.weight", "B.weight") if peft else ("a", "b")
    shapes = [(4, 32), (32, 4)] if peft else [(32, 4), (4, 32)]
    if rng.random() < 0.6:
        shapes[rng.randrange(2)] = rng.choice(SHAPES)
    arrays = {stem + name: mx.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    weights = source / ("adapter_model.safetensors" if peft else "adapters.safetensors")
    mx.save_safetensors(str(weights), arrays)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "alpha_pattern": {}}
    if not peft:
        parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    inner = settings if peft or rng.random() < 0.3 else settings["lora_parameters"]
    inner[rng.choice([*inner, "use_rslora", "use_dora", "lora_dropout"])] = rng.choice(
        [*NUMBERS, {"((.+)+)+!": 2}, {"(": 1}, {"q_proj": 10**400}, "dora", "full", ["self_attn.q_proj"]]
    )
    (source / "adapter_config.json").write_text(json.dumps(settings))
    if rng.random() < 0.2:
        weights.write_bytes(mutate_bytes(rng, weights.read_bytes()))
    if peft:
        words = ["import", "--peft", source, "--model", folder / "llama", "--out", tmp_path / "start"]
    else:
        words = ["score", "--adapter", source, "--model", folder / "llama", "--data", folder / "pairs.jsonl"]
        words += ["--out", tmp_path / "o.jsonl"]
    case("models: adapters", lambda: call(*words))
