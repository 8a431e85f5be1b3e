"""Points: what the continuations of held-out openings are worth and how far they drifted, one JSON line a checkpoint.

Every checkpoint of every arm meets the same openings and the same noise, so most of what differs between them is what
tuning did. A line is written when it is whole, and what is there is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from benchmarks.frontier.plan import Arm, Budget
from benchmarks.frontier.runs import folder_of
from mlxdpo.baselines.rollouts import RolloutRows, draw_completions, lay_out, portions, token_pass, with_lower
from mlxdpo.config import Config
from mlxdpo.data.encode import encode_prompt
from mlxdpo.demo.material import bundled
from mlxdpo.demo.rewards import REWARDS
from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.find_head import find_head
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.adapters import adapters_off, attach_lora, load_arrays
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.training import checkpoint
from mlxdpo_eval.metrics.drift import repetition, sequence_kl

FILE = "points.jsonl"
NOISE = 77_000  # seeds of the k-th continuation: no training run has them
MAX_TOKENS, BATCH, ROWS = 24, 64, 16
UNTUNED = "untuned"
Stop = Callable[[], bool]
Line = dict[str, Any]


class Bench(NamedTuple):
    """A loaded model with an adapter whose weights are exchanged, and the held-out openings."""

    policy: Policy
    openings: list[str]
    ids: list[list[int]]


def load_bench(config: Config, budget: Budget) -> Bench:
    """The model of an arm's configuration, and openings spread over all held-out subjects."""
    policy = load_policy(config.model)
    attach_lora(policy.model, config.lora)
    every = [row["prompt"] for row in bundled("prompts")]
    openings = [every[i * len(every) // budget.openings] for i in range(budget.openings)]
    return Bench(policy, openings, [encode_prompt(one, policy.tokenizer, config.data).tolist() for one in openings])


def sampled(bench: Bench, number: int, kl: bool) -> dict[str, list[float]]:
    """The `number`-th continuation of every opening by the weights that are in now: rewards, drift, length, end."""
    policy, model = bench.policy, bench.policy.model
    drawn = draw_completions(model, bench.ids, MAX_TOKENS, policy.eos_ids, NOISE + number, BATCH)
    texts = [
        policy.tokenizer.decode([t for t in tokens if t not in policy.eos_ids]).rstrip() for tokens in drawn.completions
    ]
    whole = [opening + text for opening, text in zip(bench.openings, texts, strict=True)]
    found = {name: list(map(score, whole)) for name, score in REWARDS.items()}
    found["tokens"] = [float(len(tokens)) for tokens in drawn.completions]
    found["repetition"] = [repetition(tokens) or 0.0 for tokens in drawn.completions]
    found["kl"] = divergence(model, lay_out(drawn.prompts, drawn.completions)) if kl else [0.0] * len(texts)
    return found


def divergence(model: nn.Module, rows: RolloutRows) -> list[float]:
    """KL(policy || its start) along each row, exact per step, summed: nats (arXiv 2305.18290 section 6.1, footnote 3).

    Layers below the first adapter are computed once for both. Raises `NoFastWay` where the head cannot be found.
    """
    head = find_head(model)
    rows, result = with_lower(model, rows, ROWS), []
    logits_of = lambda states: lambda here: heads.logits(head, states[:, here])  # noqa: E731
    for at in portions(rows.tokens.shape[0], ROWS):
        part = rows.part(at)
        tuned = _states(model, part)
        with adapters_off(model):
            start = _states(model, part)
        result += sequence_kl(logits_of(tuned), logits_of(start), part.mask).tolist()
    return result


def _states(model: nn.Module, rows: RolloutRows) -> mx.array:
    states = token_pass(model, rows)[1]
    mx.eval(states)
    return states


def measured(out: Path) -> list[Line]:
    """All points so far."""
    return list(read_lines(out / FILE))


def measure_untuned(bench: Bench, budget: Budget, out: Path, should_stop: Stop) -> bool:
    """Continuations of the untuned model: the start of every frontier, and what best-of-n chooses from."""
    known = {line["number"] for line in measured(out) if line["method"] == UNTUNED}
    for number in range(budget.pool):
        if number in known:
            continue
        if should_stop():
            return False
        with adapters_off(bench.policy.model):
            found = sampled(bench, number, kl=False)
        append_line(out / FILE, {"method": UNTUNED, "number": number, "openings": bench.openings, **found})
    return True


def measure(bench: Bench, arm: Arm, budget: Budget, out: Path, should_stop: Stop) -> Iterator[Line]:
    """The points of an arm's checkpoints that are not measured yet, as they are written; ends early when asked."""
    known = {(line["name"], line["step"]) for line in measured(out) if line["method"] != UNTUNED}
    for step in budget.checkpoints(arm):
        if (arm.name, step) in known:
            continue
        if should_stop():
            return
        folder = checkpoint.folder_of(folder_of(out, arm) / "checkpoints", step)
        load_arrays(bench.policy.model, folder)
        several = [sampled(bench, number, kl=True) for number in range(budget.samples)]
        line = {"name": arm.name, **arm._asdict(), "step": step, "seconds": checkpoint.read_progress(folder).seconds}
        line |= {key: [one[key] for one in several] for key in several[0]}
        append_line(out / FILE, line)
        yield line
