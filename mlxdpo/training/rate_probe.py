"""`optim.lr: auto`: the peak rate that moves this model, on these pairs, about as far as preferences ask for.

An optimizer of Adam's kind moves each weight by about the rate at every step, whatever the gradient's size. So how far
a run takes a model from its reference follows from its rates added up and from how well its steps agree. Both are
measured here: a few steps on the run's own first batches, each rate chosen from what the ones before have moved, and
after each the rewards of training pairs that none of these steps takes. Held-out pairs are not looked at: `eval` scores
them, and a rate that was chosen on them would flatter the run. Then everything is put back, and the run begins as if
its recipe had named the rate.

How far is far enough: an implicit reward is beta nats (arXiv 2305.18290 section 5), and where two rewards differ by 2
the logistic loss has an eighth of its slope left. Rewards that differ by much less leave answers as they were; much
more is drift that the loss no longer asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import Indices
from mlxdpo.training.loop import evaluate_heldout
from mlxdpo.training.metrics import Scored, token_means
from mlxdpo.training.plan import schedule_share
from mlxdpo.training.step import (
    CompiledFns,
    NonFiniteError,
    TrainState,
    make_optimizer,
    train_step,
    weights_restored,
)
from mlxdpo.types import Event

GOAL = 2.0  # root mean square of unseen pairs' reward differences at the end of a run
MOST_DRIFT = 1.2  # nats a token: root mean square of the log-ratios of unseen answers
SHARE = 0.14  # of the run's passes through the model that probes may take; compiling comes on top
FEWEST, MOST = 3, 8  # probe steps
PROBED = 0.5  # of the way that probes go: further off, how distance grows cannot be told from them
POWERS = 1.0, 2.0  # of the rates added up that distance grows with: one factor of an adapter moves alone, or both do
WORSE = 0.01  # nats: a rise of the unseen pairs' loss within the probes that is no noise
STEEPEST = 10.0  # times the rate before
MEASURED, FEWEST_MEASURED = 16, 4  # pairs that are scored after each: wanted, and at least
FIRST = {"lora": 1e-4, "dora": 1e-4, "full": 5e-6}  # rate of the first step, a twentieth of what is usual in all
USUAL = {"lora": 2e-3, "dora": 2e-3, "full": 1e-4}  # rates added up over a run that is too short for probes
"""What an untried run of LoRA adds up to: 1e-4 over 40 steps of a cosine, the middle of published LoRA-DPO recipes."""
FAR = 10.0  # times usual, or less than it by as much: SmolLM2 answered as before at 1/50
LEAST_RATE = 1e-7
LARGEST_RATE = {"lora": 2e-3, "dora": 2e-3, "full": 1e-4}  # the demo's run broke at twice that; `plan` warns above it


class Moved(NamedTuple):
    """What unseen pairs show after steps whose rates add up to `rates`.

    `rewards` is the root mean square of their reward differences, `per_token` of their log-ratios a token, nats;
    `loss` their mean loss.
    """

    rates: float
    rewards: float
    per_token: float
    loss: float


class ProbePlan(NamedTuple):
    """The batch of each probe step, and batches of training pairs that are scored after each.

    No prompt is in both.
    """

    steps: list[Indices]
    measured: list[Indices]


def probe_plan(state: TrainState) -> ProbePlan | str:
    """The probes of a run, or why there are none: `SHARE` of the run pays for fewer than `FEWEST` steps, or fewer than
    `FEWEST_MEASURED` of its pairs have other prompts than those steps.

    A pair's step counts as three of its forward passes. Steps are left out before fewer than `MEASURED` pairs are
    scored after each.
    """
    passes = sum(len(batch) for step in range(state.plan.steps) for batch in state.plan.batches(step))
    few = False
    for steps in range(min(MOST, state.plan.steps), FEWEST - 1, -1):
        wanted = MEASURED if steps > FEWEST else FEWEST_MEASURED
        affordable = int(SHARE * 3 * passes / steps) - 3 * state.config.train.batch_size
        if affordable < wanted:
            continue
        taken = [state.plan.batches(step)[0] for step in range(steps)]
        unseen = _unseen_batches(state, taken, min(MEASURED, affordable))
        if sum(map(len, unseen)) >= FEWEST_MEASURED:
            return ProbePlan(taken, unseen)
        few = True
    if few:
        return f"too few training pairs to measure probes on, {FEWEST_MEASURED} with other prompts than theirs"
    return f"{state.plan.steps} steps are too few to pay for probes"


def _unseen_batches(state: TrainState, taken: Sequence[Indices], most: int) -> list[Indices]:
    """Batches of the first pass, its last first, without the prompts of the batches `taken`: `most` pairs or fewer."""
    prompts = Examples.of(state.train.examples).prompt_numbers
    seen = {prompts[pair] for batch in taken for pair in batch}
    found: list[Indices] = []
    for batch in reversed(state.plan.training):
        left = tuple(pair for pair in batch if prompts[pair] not in seen)[:most]
        if left:
            found.append(left)
            most -= len(left)
    return found


class ChosenRate(NamedTuple):
    """The peak learning rate that was found, the probes it follows from, and why it is this one."""

    lr: float
    probes: tuple[Moved, ...]
    reason: str

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {"lr": self.lr, "probes": [probe._asdict() for probe in self.probes], "reason": self.reason}


def rate_sentence(chosen: ChosenRate) -> str:
    """What was chosen and why, for a person."""
    return f"optim.lr auto is {chosen.lr:g}: {chosen.reason}"


def choose_rate(state: TrainState, should_stop: Callable[[], bool]) -> Generator[Event, None, ChosenRate | None]:
    """The peak rate for a run whose recipe leaves it open; None when asked to stop.

    The weights are those of before afterwards, and no state of the run has changed. Of several processes each must
    call this alike.
    """
    plan, usual = probe_plan(state), usual_rate(state.config, state.plan.steps)
    if isinstance(plan, str):
        return ChosenRate(usual, (), f"what is usual for {state.plan.steps} steps, because {plan}")
    probes = yield from _probe_steps(state, plan, should_stop)
    if probes is None:
        return None
    if way(probes[-1]) == 0:
        return ChosenRate(usual, tuple(probes), "what is usual: the probes moved nothing")
    rates, reason = rates_to_goal(probes)
    wanted, largest = rates / _schedule_sum(state.config, state.plan.steps), LARGEST_RATE[state.config.lora.method]
    if not LEAST_RATE <= wanted <= largest:
        reason = f"auto takes {LEAST_RATE:g} to {largest:g}, and {wanted:.2g} would be the rate at which {reason}"
    else:
        reason = f"at it {reason}"
    return ChosenRate(_within(state.config, wanted), tuple(probes), reason)


def usual_rate(config: Config, steps: int) -> float:
    """The peak rate of a run of so many steps that is not probed: its rates add up to `USUAL`."""
    return _within(config, USUAL[config.lora.method] / _schedule_sum(config, steps))


def rates_note(config: Config, steps: int) -> str:
    """Whether steps times rate can move a model at all; empty where the rate is still open or within what is usual."""
    if config.optim.lr == "auto" or config.optim.name == "sgd":
        return ""
    total, usual = config.optim.lr * _schedule_sum(config, steps), USUAL[config.lora.method]
    said = f"{steps} steps at {config.optim.lr:g} add up to {total:.2g}, usual is about {usual:g}"
    if total < usual / FAR:
        return f"{said}: expect no visible change; optim.lr auto finds a rate, more epochs help too"
    if total > usual * FAR and config.optim.lr > LARGEST_RATE[config.lora.method]:
        return f"{said}: expect broken answers; optim.lr auto finds a rate"
    return ""


def _schedule_sum(config: Config, steps: int) -> float:
    """What the steps of a schedule add up to, in peak rates."""
    return sum(schedule_share(config.optim, step, steps) for step in range(steps))


def _within(config: Config, rate: float) -> float:
    """Two digits, which a person can copy, within what is ever of use."""
    return float(f"{min(LARGEST_RATE[config.lora.method], max(LEAST_RATE, rate)):.1e}")


def _probe_steps(
    state: TrainState, plan: ProbePlan, should_stop: Callable[[], bool]
) -> Generator[Event, None, list[Moved] | None]:
    measured = replace(state.plan, heldout=plan.measured)
    probing = replace(state, plan=measured, heldout=state.train, optimizer=make_optimizer(state.config.optim))
    rate, total, largest = FIRST[state.config.lora.method], 0.0, LARGEST_RATE[state.config.lora.method]
    most = largest * _schedule_sum(state.config, state.plan.steps)  # no run adds up to more
    found: list[Moved] = []
    with weights_restored(state.model):
        fns = CompiledFns(probing)
        before = measure(probing, fns) if "reference" not in state.loss.needs else None
        for step, batch in enumerate(plan.steps):
            total += rate
            try:
                if train_step(probing, fns, [batch], step, rate, should_stop) is None:
                    return None
                found.append(_moved(probing, measure(probing, fns), before, total))
            except NonFiniteError:
                if not found:
                    raise
                break  # too far; the steps before have shown enough
            yield Event("probe", 0, {"done": step + 1, "total": len(plan.steps), "lr": rate, **found[-1]._asdict()})
            rate = min(next_rate(found, len(plan.steps)), most - total, STEEPEST * largest)
            if rate < total / 1000:
                break  # it would show nothing new
    return found


def way(moved: Moved) -> float:
    """What part of the way to the goal has been gone, 0 at the start; by rewards or by drift, whichever is further."""
    return max(moved.rewards / GOAL, moved.per_token / MOST_DRIFT)


def growth(found: Sequence[Moved]) -> float:
    """The power of the rates added up that the way has grown with between the last two probes, within `POWERS`."""
    if len(found) < 2 or way(found[-2]) == 0:
        return POWERS[0]
    last, before = found[-1], found[-2]
    power = math.log(max(way(last) / way(before), 1.0)) / math.log(last.rates / before.rates)
    return min(max(power, POWERS[0]), POWERS[1])


def next_rate(found: Sequence[Moved], steps: int) -> float:
    """The rate of the next probe step, so that `PROBED` of the way is reached in even steps with the last of them."""
    last, before = found[-1], found[-2].rates if len(found) > 1 else 0.0
    wanted = PROBED * (len(found) + 1) / steps
    gone = way(last)
    rates = last.rates * (wanted / gone) ** (1 / growth(found)) if gone > 0 else math.inf
    rate = last.rates - before  # of the step that was taken last
    return min(max(rates - last.rates, rate / STEEPEST), rate * STEEPEST)


def rates_to_goal(found: Sequence[Moved]) -> tuple[float, str]:
    """The rates added up that lead to the goal, and why in words; distance keeps growing as it did last.

    A few large steps and many small ones whose rates have the same sum go about equally far (within a third on a
    small llama).
    """
    last, goal = found[-1], 1.0
    why = f"rewards of pairs it has not trained on come to differ by about {GOAL:g}"
    if last.per_token / MOST_DRIFT > last.rewards / GOAL:
        why = f"unseen answers reach about {MOST_DRIFT:g} nats a token from the reference"
    if last.loss > found[0].loss + WORSE:
        goal, why = 0.5, f"{why}, half of that because their loss rose from {found[0].loss:.3f} to {last.loss:.3f}"
    return last.rates * (goal / way(last)) ** (1 / growth(found)), f"{why} ({len(found)} probe steps)"


def measure(state: TrainState, fns: CompiledFns) -> Scored:
    """The measured pairs under the weights of this moment."""
    scored = evaluate_heldout(state, fns)
    return token_means(scored) if state.loss.per_token else scored


def _moved(state: TrainState, now: Scored, before: Scored | None, rates: float) -> Moved:
    """How far pairs have come from the reference, or from where they were before the first step."""
    chosen = now.chosen - (now.ref_chosen if before is None else before.chosen)
    rejected = now.rejected - (now.ref_rejected if before is None else before.rejected)
    apart = chosen - rejected if state.loss.paired else chosen
    lengths = (1.0, 1.0) if state.loss.per_token else (now.chosen_len, now.rejected_len)
    per_token = np.concatenate([chosen / lengths[0], rejected / lengths[1]])
    return Moved(rates, state.config.loss.beta * _rms(apart), _rms(per_token), float(now.losses.mean()))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
