"""What each checkpoint of a run is worth: its drift and its win rate against the untuned model, on the same prompts.

The points of the reward-KL frontier (arXiv 2305.18290, section 6.1): one for each kept checkpoint, and one for the
run's adapter where that is none of them. Several runs that differ in beta give the frontier of the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo import Run
from mlxdpo.inner import (
    TrainedRun,
    at_checkpoints,
    at_strengths,
    distinct_prompts,
    encode_pairs,
    heldout_pairs,
    open_trained_run,
    write_json,
)
from mlxdpo_eval.judged_answers import WinRate, judge_answers, win_rate
from mlxdpo_eval.judges import Judge
from mlxdpo_eval.metrics.frontier import Point
from mlxdpo_eval.metrics.intervals import clustered_mean
from mlxdpo_eval.results import to_json
from mlxdpo_eval.sampling import (
    Answers,
    Sampling,
    default_max_tokens,
    first_answers,
    on_policy_kl,
    sample_start,
    sample_tuned,
)

Say = Callable[[str], None]
FINAL = "adapter"


def measure_checkpoints(
    run: Run, judge: Judge, sampling: Sampling, say: Say = lambda text: None, strengths: Sequence[float] = ()
) -> list[Point]:
    """The points of a run, oldest checkpoint first; writes RUN/eval/frontier.json, which the report shows.

    With `strengths` the points are the run's adapter at each of them instead, and RUN/eval/frontier.json stays.
    A checkpoint on whose answers the judge gives no valid verdict has no point. Raises `UserError` where the run's
    model or reference is another one, or there are no held-out pairs.
    """
    opened = open_trained_run(run)
    rows, examples, _ = encode_pairs(opened, heldout_pairs(run)[0])
    sampling = sampling if sampling.max_tokens else replace(sampling, max_tokens=default_max_tokens(examples))
    prompts = distinct_prompts(rows, sampling.prompts)
    before, _ = sample_start(opened, prompts, sampling)

    def point(name: str, opened: TrainedRun = opened) -> Point | None:
        """The point of the weights that are in the model now."""
        say(f"{run.path.name}: {name}")
        found, won = _measure_point(opened, judge, name, before, sample_tuned(opened, prompts, sampling), sampling)
        if won.invalid:
            left = "" if found else ", so it is not plotted"
            say(f"{run.path.name}: {name}: {won.invalid} of {won.asked} verdicts asked for are invalid{left}")
        return found

    if strengths:
        at = [point(f"strength {strength:g}", here) for strength, here in at_strengths(run, strengths)]
        return [p for p in at if p is not None]
    final, seen = _trainable_arrays(opened), False
    found: list[Point | None] = []
    for name in at_checkpoints(opened):
        here = all(mx.array_equal(now, then).item() for now, then in zip(_trainable_arrays(opened), final, strict=True))
        found.append(point(f"{name} = {FINAL}" if here else name))
        seen = seen or here
    points = [p for p in (found if seen else [*found, point(FINAL)]) if p is not None]
    told = {"judge": judge.name, "prompts": len(prompts), "samples": sampling.samples, "seed": sampling.seed}
    write_json(run.path / "eval" / "frontier.json", to_json(told | {"points": points}))
    return points


def _trainable_arrays(opened: TrainedRun) -> list[mx.array]:
    """The tuned arrays that are in the model now."""
    return [array for _, array in tree_flatten(opened.policy.model.trainable_parameters())]


def _measure_point(
    opened: TrainedRun, judge: Judge, name: str, before: Answers, after: Answers, sampling: Sampling
) -> tuple[Point | None, WinRate]:
    first = first_answers(after)
    kl = on_policy_kl(opened, first, sampling.temperature)
    won = win_rate(judge, judge_answers(judge, before, after), before, after)
    if won.overall is None:
        return None, won
    return Point(name, float(np.mean(kl)), won.overall, clustered_mean(kl, first.names), won.overall_interval), won


def name_points(points: Sequence[Point], run: Run) -> list[Point]:
    """The same points with the run's name and what holds it to its reference in front, to stand beside others."""
    config = run.config()
    pull = f"KL cost {config.rollout.kl:g}" if config.stage in ("ppo", "rloo") else f"beta {config.loss.beta:g}"
    return [p._replace(name=f"{run.path.name} ({pull}) {p.name}") for p in points]


def measure_drift(run: Run, prompts: int, seed: int = 0) -> dict[str, list]:
    """KL of a run's model to its reference on its own answers: `nats` an answer, and `prompts`, the name of each one's.

    One answer to each of at most `prompts` held-out prompts, at temperature 1, as long as 95 % of the held-out answers.
    Raises `UserError` as `measure_checkpoints`.
    """
    opened = open_trained_run(run)
    rows, examples, _ = encode_pairs(opened, heldout_pairs(run)[0])
    sampling = Sampling(prompts, 1, default_max_tokens(examples), seed=seed)
    answers = sample_tuned(opened, distinct_prompts(rows, prompts), sampling)
    return {"nats": on_policy_kl(opened, answers, sampling.temperature), "prompts": answers.names}
