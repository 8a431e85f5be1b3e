"""What a training did, said at its end: whether answers differ at all, how far the model has moved, what to do next.

A handful of prompts and one answer each: enough to see that nothing happened, never enough to say that it is better.
That is what `mlxdpo eval` is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from mlxdpo import Run
from mlxdpo.inner import distinct_prompts, heldout_pairs, open_trained_run, read_preferences
from mlxdpo_eval.sampling import Sampling, on_policy_kl, sample_answers

PROMPTS, LONGEST = 8, 48


class Outcome(NamedTuple):
    """Greedy answers to held-out prompts that training changed, of how many, and nats per sampled answer.

    `kl` is the mean KL(policy || reference) along answers that the tuned model samples at temperature 1.
    """

    changed: int
    prompts: int
    kl: float


def measure_outcome(run: Run, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Answers before and after to the first held-out prompts; `say` is told how long it takes.

    Raises `UserError` when the run held out none.
    """
    opened = open_trained_run(run)
    rows = distinct_prompts(heldout_pairs(run, read=read_preferences)[0], PROMPTS)
    greedy = Sampling(PROMPTS, 1, LONGEST, temperature=0.0)
    say(f"comparing greedy answers before and after; held-out prompts: {len(rows)}")
    with opened.start() as model:
        before = sample_answers(opened, model, rows, 1, greedy, say, "greedy answers before")
    after = sample_answers(opened, opened.policy.model, rows, 1, greedy, say, "greedy answers after")
    sampled = replace(greedy, temperature=1.0)
    drawn = sample_answers(opened, opened.policy.model, rows, 1, sampled, say, "answers whose KL is measured")
    kl = on_policy_kl(opened, drawn, 1.0)
    changed = sum(a != b for a, b in zip(before.texts, after.texts, strict=True))
    return Outcome(changed, len(rows), sum(kl) / len(kl))


def outcome_sentences(outcome: Outcome, heldout: Mapping[str, float], run: Run) -> list[str]:
    """How much it changed, what held-out pairs say, what to do next. `heldout` are the last `eval_` metrics."""
    changed, prompts, kl = outcome
    sentences = [f"changed: {changed} of {prompts} greedy answers to held-out prompts; KL {kl:.3g} nats an answer"]
    if "eval_rewards/margins" in heldout and "eval_rewards/accuracies" in heldout:
        sentences.append(
            f"held-out pairs: margin {heldout['eval_rewards/margins']:+.3f}, accuracy "
            f"{heldout['eval_rewards/accuracies']:.2f} (untuned: 0.50), {_displacement(run, heldout)}"
        )
    if changed:
        sentences.append(f"evaluate: mlxdpo eval {run.path} --judge longest (or another judge: mlxdpo eval --help)")
    else:
        sentences.append(
            "the model answers as before, so it cannot be better; train for longer: "
            f"mlxdpo train --resume {run.path} {longer(run)}, or start again at a higher rate (--optim.lr)"
        )
    return sentences


def longer(run: Run) -> str:
    """The option that lets a finished run train three times as long."""
    train = run.config().train
    if train.steps is not None:
        return f"--train.steps {3 * train.steps}"
    return f"--train.epochs {3 * train.epochs:g}" if isinstance(train.epochs, float | int) else "--train.epochs 6"


def _displacement(run: Run, heldout: Mapping[str, float]) -> str:
    """By how much the chosen answers' log-prob moved, nats."""
    beta = run.config().loss.beta
    moved = heldout["eval_rewards/chosen"] / beta
    return f"chosen answers {abs(moved):.2f} nats {'more' if moved >= 0 else 'less'} likely than before"
