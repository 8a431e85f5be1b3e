"""A step on trajectories with alternatives at every step: each token once, against rows computed whole.

python -m benchmarks.trajectories [--steps 8] [--alternatives 2] [--prompt 120] [--turn 30] [--tool 60] [--blocks 30]

Three ways to the same gradient, each through the same layers and the same head over scored tokens alone, in turn:

    rows   every row whole, nothing shared
    pairs  every pair by itself: its two rows share the turns before them
    tree   every distinct token once
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from unittest import mock

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)

import mlx.core as mx  # isort: skip
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.config import LoraConfig, LossConfig, ModelConfig
from mlxdpo.data import batching
from mlxdpo.data.batching import collate
from mlxdpo.data.distinct_rows import DistinctRow
from mlxdpo.losses import resolve
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.training.step import make_gradient
from mlxdpo.types import Batch, Example


def conversation(steps: int, alternatives: int, prompt: int, turn: int, tool: int) -> list[Example]:
    """One conversation whose turns are each compared with `alternatives - 1` others, random ids."""
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(100, 40_000, n).astype(np.int32)  # noqa: E731
    root, history, pairs = ids(prompt), np.zeros(0, np.int32), []
    for step in range(steps):
        chosen = ids(turn)
        for _ in range(alternatives - 1):
            both = [np.concatenate([history, answer]) for answer in (chosen, ids(turn))]
            mask = np.arange(len(both[0])) >= len(history)
            pairs.append(Example(root, *both, f"step {step}", chosen_mask=mask, rejected_mask=mask))
        history = np.concatenate([history, chosen, ids(tool)])
    return pairs


def each_row_alone(pairs: Sequence[Example]) -> tuple[list[DistinctRow], np.ndarray]:
    """`distinct_rows` that shares nothing: a prompt for each row, rows in the order of the pairs."""
    both = [
        (pair, *side)
        for pair in pairs
        for side in ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask))
    ]
    rows = [DistinctRow(pair.prompt, ids, mask, i) for i, (pair, ids, mask) in enumerate(both)]
    return rows, np.arange(len(rows), dtype=np.int32).reshape(-1, 2)


def as_one_pair(pair: Example) -> Example:
    """The same pair with the turns before it as its prompt."""
    before = int(np.flatnonzero(pair.chosen_mask)[0])
    prompt = np.concatenate([pair.prompt, pair.chosen[:before]])
    return Example(prompt, pair.chosen[before:], pair.rejected[before:], pair.where)


def batches(examples: list[Example]) -> dict[str, list[Batch]]:
    """The batches of one step, for each way."""
    every = tuple(range(len(examples)))
    with mock.patch.object(batching, "distinct_rows", each_row_alone):
        rows = collate(examples, every, len(every))
    pairs = [as_one_pair(example) for example in examples]
    return {
        "rows": [rows],
        "pairs": [collate(pairs, every, len(every))],
        "tree": [collate(examples, every, len(every))],
    }


def timed(
    step: Callable[[list[Batch]], object], ways: dict[str, list[Batch]], repeats: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of each way's step, on the clock and of all cores, measured in turn."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, some in ways.items():
            clock, cores = time.perf_counter(), time.process_time()
            step(some)
            times[way].append((time.perf_counter() - clock, time.process_time() - cores))
    return {
        way: (statistics.median(clock for clock, _ in some), statistics.median(cores for _, cores in some))
        for way, some in times.items()
    }


def main() -> None:
    """Print tokens, seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"steps": 8, "alternatives": 2, "prompt": 120, "turn": 30, "tool": 60, "blocks": 30, "repeats": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    examples = conversation(args.steps, args.alternatives, args.prompt, args.turn, args.tool)
    model = load_policy(ModelConfig(path="smollm2", dtype="float32")).model
    model.model.layers = model.model.layers[: args.blocks]  # of 30
    attach_lora(model, LoraConfig(rank=16), 0)
    gradient = make_gradient(model, resolve(LossConfig()))
    share = mx.array(1 / len(examples))

    def step(some: list[Batch]) -> np.ndarray:
        """The gradient as one vector."""
        trees = [gradient(batch, share).gradients for batch in some]
        mx.eval(trees)
        return sum(
            np.concatenate([np.array(g).ravel() for _, g in sorted(tree_flatten(tree), key=lambda one: one[0])])
            for tree in trees
        )

    ways = batches(examples)
    found = {way: step(some) for way, some in ways.items()}
    times = timed(step, ways, args.repeats)
    print(f"{args.steps} steps of {args.alternatives} answers, {len(examples)} pairs, {args.blocks} blocks")
    for way, some in ways.items():
        tokens = sum(part.prefix.size + len(part.rest) for batch in some for part in batch.parts or (batch,))
        apart = np.linalg.norm(found[way] - found["rows"]) / np.linalg.norm(found["rows"])
        ratios = [whole / own for whole, own in zip(times["rows"], times[way], strict=True)]
        print(
            f"{way:6} {tokens:7} tokens  {times[way][0]:7.2f} s {ratios[0]:5.2f} x  "
            f"of all cores {times[way][1]:7.2f} s {ratios[1]:5.2f} x  gradient apart by {apart:.1e}"
        )


if __name__ == "__main__":
    main()
