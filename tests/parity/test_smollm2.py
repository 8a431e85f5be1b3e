"""SmolLM2-135M-Instruct: summed log-probs of real pairs equal transformers' on torch, float32.

MLXDPO_PAIRS names a preference file to score instead of the bundled demo pairs.
Tolerance 1e-3 nats a sequence: float32 rounding through 30 layers and over a vocabulary of 49,152, summed over up to
some hundreds of tokens (seen: 3.2e-4 over 128 sequences of up to -351 nats).
"""

import os
import time
from importlib.resources import files

import numpy as np
import pytest
from torch_side import completion_logps as torch_logps
from torch_side import load_torch

from mlxdpo.config import DataConfig, ModelConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.encode import encode_all
from mlxdpo.data.planning import outline, plan_straight
from mlxdpo.data.read import read_preferences
from mlxdpo.model.builtin import smollm2_folder
from mlxdpo.model.policy import load_policy
from mlxdpo.training.step import make_scorer

pytestmark = [pytest.mark.parity, pytest.mark.real]

TOLERANCE = 1e-3
COUNT = 64


def pairs_file():
    """The file named by MLXDPO_PAIRS, else the bundled demo pairs."""
    return os.environ.get("MLXDPO_PAIRS") or str(files("mlxdpo.demo") / "pairs.jsonl")


def test_summed_logps_of_the_first_pairs():
    folder = smollm2_folder()
    policy = load_policy(ModelConfig(path=str(folder), dtype="float32"))
    data = DataConfig(path=pairs_file(), on_bad_row="skip")
    rows, _ = read_preferences(data)
    examples, _ = encode_all(rows[: 2 * COUNT], policy.tokenizer, data, eos_ids=policy.eos_ids)
    examples = examples[:COUNT]
    assert len(examples) == COUNT
    scorer, ours, started = make_scorer(policy.model), np.zeros((COUNT, 2)), time.perf_counter()
    for indices in plan_straight(outline(examples, "prompt"), 4):
        pairs = scorer(collate(examples, indices, 4))
        ours[list(indices)] = np.array([pairs.chosen, pairs.rejected]).T[: len(indices)]
    middle, model = time.perf_counter(), load_torch(folder)
    theirs = np.array([[torch_logps(model, e.prompt, c).sum() for c in (e.chosen, e.rejected)] for e in examples])
    worst = abs(ours - theirs)
    seconds = (middle - started, time.perf_counter() - middle)
    print(f"{worst.size} sequences, log-probs {theirs.min():.0f} to {theirs.max():.0f}: worst {worst.max():.2e} nats,")
    print(f"mean {worst.mean():.2e}; {seconds[0]:.0f} s in MLX, {seconds[1]:.0f} s in torch")
    assert worst.max() <= TOLERANCE
