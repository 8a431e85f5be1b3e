"""What a model's own hidden states say of pairs: embeddings of answers, and the likelihood displacement to be expected.

One forward pass a row; nothing of width V is computed and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.data.findings import AuditInput
from mlxdpo.data.planning import Group, Indices, outline, plan_straight
from mlxdpo.forward.reward_head import normed_states
from mlxdpo.model.adapters import dropout_off
from mlxdpo.model.policy import Policy
from mlxdpo.training.reference import identity_of, with_reference
from mlxdpo.training.step import make_scorer
from mlxdpo.types import Example

WIDTH = 32  # tokens to which rows are padded on the right, where causal attention does not see them


class PairStates(NamedTuple):
    """Of N pairs, float32; D is the model's hidden size, states are those that enter its head.

    chosen, rejected  (N, D) mean state of the completion's tokens
    prompt            (N, D) state of the prompt's last token
    ches              (N,) CHES: <S_l, S_w> - |S_w|^2 of the summed states S that predict the completion's tokens
    ches_per_token    (N,) the same with means instead of sums, so that length does not count
    """

    chosen: np.ndarray
    rejected: np.ndarray
    prompt: np.ndarray
    ches: np.ndarray
    ches_per_token: np.ndarray


def pair_states(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int = 8,
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> PairStates:
    """The states of every pair, in the order given, `batch_size` pairs at once, pairs of similar length together.

    CHES (arXiv 2410.08847, as in its authors' code) is high where the two answers are alike: there DPO's push away
    from the rejected one lowers the chosen one too. States that predict a completion's tokens are those of the prompt's
    last token and of all its own but the last. Raises `UserError` for a model whose head cannot be found.
    """
    order = sorted(range(len(examples)), key=lambda i: _longest(examples[i]))
    batches = [tuple(order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    found: dict[int, tuple[np.ndarray, ...]] = {}
    with dropout_off(model):
        for indices in progress(batches):
            for i, values in zip(indices, _batch_states(model, [examples[i] for i in indices]), strict=True):
                found[i] = values
    columns = [np.stack([found[i][part] for i in range(len(examples))]) for part in range(5)]
    return PairStates(*columns)


def _longest(example: Example) -> int:
    return len(example.prompt) + max(len(example.chosen), len(example.rejected))


def _batch_states(model: nn.Module, examples: Sequence[Example]) -> list[tuple[np.ndarray, ...]]:
    rows = [(example.prompt, ids) for example in examples for ids in (example.chosen, example.rejected)]
    width = -(-max(len(prompt) + len(ids) for prompt, ids in rows) // WIDTH) * WIDTH
    tokens = np.zeros((len(rows), width), np.int32)
    predicts, answers = np.zeros((2, len(rows), width), np.float32)
    last = np.zeros(len(rows), np.int32)
    for row, (prompt, ids) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(ids)
        tokens[row, :end] = np.concatenate([prompt, ids])
        answers[row, start:end] = 1
        predicts[row, max(0, start - 1) : end - 1] = 1
        last[row] = max(0, start - 1)
    states = normed_states(model, mx.array(tokens)).astype(mx.float32)
    count = mx.array(answers.sum(axis=1, keepdims=True))
    means = (mx.array(answers)[..., None] * states).sum(axis=1) / count
    sums = (mx.array(predicts)[..., None] * states).sum(axis=1)
    asked = states[mx.arange(len(rows)), mx.array(last)]
    pairs = lambda a: a.reshape(len(examples), 2, -1)  # noqa: E731
    ches, per_token = ches_scores(*pairs(sums).transpose(1, 0, 2), *pairs(mx.array(predicts.sum(axis=1))).T[0])
    mean, prompt = pairs(means), pairs(asked)[:, 0]
    mx.eval(mean, prompt, ches, per_token)
    columns = [np.array(a) for a in (mean[:, 0], mean[:, 1], prompt, ches, per_token)]
    return list(zip(*columns, strict=True))


def ches_scores(
    chosen: mx.array, rejected: mx.array, chosen_len: mx.array, rejected_len: mx.array
) -> tuple[mx.array, mx.array]:
    """CHES of summed states (B, D) each, and the same of means; lengths (B,) in states. arXiv 2410.08847."""
    both = lambda w, low: (low * w).sum(axis=1) - (w * w).sum(axis=1)  # noqa: E731
    return both(chosen, rejected), both(chosen / chosen_len[:, None], rejected / rejected_len[:, None])


def pair_embeddings(states: PairStates) -> np.ndarray:
    """(N, 3 D) what pairs are compared by: the prompt's last state, the mean states of both answers."""
    return np.concatenate([states.prompt, states.chosen, states.rejected], axis=1)


def answer_differences(states: PairStates) -> np.ndarray:
    """(N, D) the direction of the chosen answer's mean state less that of the rejected one's. Directions from the mean
    of all answers: a state's length says how common its tokens are."""
    middle = np.concatenate([states.chosen, states.rejected]).mean(axis=0)
    sides = [side - middle for side in (states.chosen, states.rejected)]
    chosen, rejected = (s / np.maximum(np.linalg.norm(s, axis=1, keepdims=True), 1e-12) for s in sides)
    return chosen - rejected


def audit_input(
    policy: Policy,
    adapter_digest: str | None,
    examples: Sequence[Example],
    group: Group,
    batch_size: int,
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> AuditInput:
    """What findings on pairs are made from. The log-probs go into the cache in which a training looks for them."""
    states = pair_states(policy.model, examples, batch_size, progress)
    batches = plan_straight(outline(examples, group), batch_size)
    scorer = make_scorer(policy.model)
    scoring = with_reference(examples, scorer, identity_of(policy.identity, adapter_digest), batches, batch_size)
    with dropout_off(policy.model):
        *_, (_, reference) = scoring
    assert reference is not None
    return AuditInput(
        pair_embeddings(states),
        answer_differences(states),
        states.ches_per_token,
        reference.astype(np.float64),
        np.array([example.scored for example in examples], np.float64),
    )
