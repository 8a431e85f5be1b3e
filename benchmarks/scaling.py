"""How a step grows: head memory with the vocabulary, time with completion and prompt tokens, loading with the rows.

python -m benchmarks.scaling [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np

from mlxdpo.config import LoraConfig, LossConfig, ModelConfig
from mlxdpo.data.batching import collate
from mlxdpo.forward.fused_head import Head, token_logps
from mlxdpo.losses import resolve
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.training.step import make_gradient
from mlxdpo.types import Batch, Example

VOCABULARIES = (32_000, 151_936, 262_144)
HIDDEN, POSITIONS = 576, 2048
COMPLETIONS = (64, 128, 256, 512, 1024, 2048)
PROMPTS = (64, 128, 256, 512, 1024)


def head_memory(vocabulary: int) -> float:
    """Peak MB of log-probs and their gradient over POSITIONS states, weights aside."""
    module = nn.Embedding(vocabulary, HIDDEN)
    module.freeze()
    h, y = mx.random.normal((POSITIONS, HIDDEN)), mx.random.randint(0, vocabulary, (POSITIONS,))
    mx.eval(module.parameters(), h, y)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    head = Head(lambda: module, None, 1.0)
    mx.eval(mx.value_and_grad(lambda states: token_logps(head, states, y).sum())(h))
    return (mx.get_peak_memory() - before) / 1e6


def pair(prompt: int, completion: int) -> Batch:
    """One pair of these lengths."""
    draw = np.random.default_rng(0)
    one, two, three = (draw.integers(100, 40_000, n).astype(np.int32) for n in (prompt, completion, completion))
    return collate([Example(one, two, three, "")], (0,), 1, np.zeros((1, 2), np.float32))


def seconds(step: Callable[[Batch], None], batches: dict[int, Batch], repeats: int) -> dict[int, float]:
    """Median seconds of each batch's step, measured in turn."""
    times: dict[int, list[float]] = {n: [] for n in batches}
    for _ in range(repeats):
        for n, batch in batches.items():
            start = time.perf_counter()
            step(batch)
            times[n].append(time.perf_counter() - start)
    return {n: statistics.median(found) for n, found in times.items()}


def slope(found: dict[int, float]) -> float:
    """Exponent b of seconds = a * tokens ** b, least squares of the logarithms."""
    return float(np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0])


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print("head, MB beside weights:", {v: round(head_memory(v), 1) for v in VOCABULARIES})
    policy = load_policy(ModelConfig(path="smollm2"))
    attach_lora(policy.model, LoraConfig(rank=8, keys=["self_attn.q_proj", "self_attn.v_proj"]), 0)
    gradient = make_gradient(policy.model, resolve(LossConfig()))

    def step(batch: Batch) -> None:
        """Gradient of one batch, evaluated."""
        mx.eval(gradient(batch, mx.array(1.0)))

    by_completion = seconds(step, {n: pair(64, n) for n in COMPLETIONS}, repeats)
    by_prompt = seconds(step, {n: pair(n, 128) for n in PROMPTS}, repeats)
    for name, found in (("completion", by_completion), ("prompt", by_prompt)):
        shown = {n: f"{s:.2f} s, {1e3 * s / n:.2f} ms a token" for n, s in found.items()}
        print(f"{name} tokens: {shown}; seconds grow as tokens ** {slope(found):.2f}")


if __name__ == "__main__":
    main()
