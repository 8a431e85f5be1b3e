"""The fidelity gate: does the artefact, loaded again, behave like the run on pairs that training never saw?

Three numbers. Token KL(run || artefact) against KL(run || reference): what was lost beside what was learned. The slope
of the artefact's DPO margins over the run's: 1 when the preference is all there, 0 when the export is the base model.
Their correlation: how much of it is noise. The limits stand here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.data.distinct_rows import DistinctRow
from mlxdpo.exporters.record import Fidelity
from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.elementwise import exp
from mlxdpo.forward.next_token import Logits, logits_at
from mlxdpo.inference.trained_run import TrainedRun
from mlxdpo.io.progress import Say, time_left
from mlxdpo.machine.device import this_machine
from mlxdpo.model.adapters import adapters_off
from mlxdpo.model.policy import cast
from mlxdpo.types import Example, UserError

MOST_KL = 0.05  # of KL(run || reference)
LEAST_SLOPE = 0.9
# Nats a token: what rounding alone makes of equal weights in another order. Errors e of logits cost about e^2 / 2.
ROUNDING = {mx.float32: 1e-6, mx.float16: 2e-5, mx.bfloat16: 1e-3}
LOGITS = 128 << 20  # bytes of float32 logits of one model at a time


class VerifiedRows(NamedTuple):
    """Padded rows: `inputs` (R, T) tokens; `at` (2, n) row and column of each scored position; `targets` (n,)."""

    which: tuple[int, ...]
    inputs: mx.array
    at: np.ndarray
    targets: mx.array


class RunReference(NamedTuple):
    """The run on held-out pairs: per batch its logits; `logps` and `ref_logps` (2B,) summed nats, chosen first."""

    batches: list[VerifiedRows]
    logits: list[Logits]
    logps: np.ndarray
    ref_logps: np.ndarray
    kl: float
    tokens: int
    beta: float
    dtype: mx.Dtype
    say: Say


def run_reference(trained: TrainedRun, examples: Sequence[Example], say: Say = lambda text: None) -> RunReference:
    """Score the run and its reference once; artefacts are then held against them one at a time.

    `say` is told every ten seconds, of the artefacts' scoring too, how long the rest will take.

    Where the model's head can be found, its last states are kept, so that an artefact costs one forward pass.
    """
    model = trained.policy.model
    dtype = getattr(mx, trained.policy.identity["dtype"])
    vocabulary = trained.policy.config.get("vocab_size") or len(trained.policy.tokenizer)
    batches = list(_batches(examples, vocabulary))
    logits = [_logits_again(model, rows) for rows in batches]
    logps = _sums(batches, logits, len(examples), say)
    ref_logps, kl = _diverge(batches, logits, lambda rows: _of_reference(trained, rows), len(examples), say)
    tokens = sum(rows.at.shape[1] for rows in batches)
    return RunReference(batches, logits, logps, ref_logps, kl, tokens, trained.config.loss.beta, dtype, say)


def measure_fidelity(reference: RunReference, artefact: nn.Module, force: bool = False) -> Fidelity:
    """How an artefact behaves; it is run in the run's number type, so that only what was written differs."""
    artefact = _as_the_run(reference, artefact)
    logps, kl = _artefact_logps(reference, artefact)
    own, other = (_margins(values, reference.ref_logps, reference.beta) for values in (reference.logps, logps))
    slope, _ = slope_and_correlation(own, other)
    return _fidelity(reference, kl, own, other, why_failed(kl, reference.kl, slope, ROUNDING[reference.dtype]), force)


def measure_on_packed_base(reference: RunReference, artefact: nn.Module, force: bool = False) -> Fidelity:
    """The same of an adapter on a packed base, with that base as the artefact's reference.

    What packing did to the base is no loss of the tune, so the slope alone decides; the token KL, which holds both, is
    shown.
    """
    artefact = _as_the_run(reference, artefact)
    logps, kl = _artefact_logps(reference, artefact)
    with adapters_off(artefact):
        base = _artefact_logps(reference, artefact)[0]
    own, other = (_margins(reference.logps, reference.ref_logps, reference.beta), _margins(logps, base, reference.beta))
    slope, _ = slope_and_correlation(own, other)
    return _fidelity(reference, kl, own, other, why_failed(0.0, reference.kl, slope), force)


def _as_the_run(reference: RunReference, artefact: nn.Module) -> nn.Module:
    cast(artefact, reference.dtype)
    if this_machine().kind == "cpu":  # its packed matmuls are fifty times slower, and give the same numbers
        artefact = _unpacked(artefact)
    return artefact.train()  # as the run was scored; only dropout would differ, and it is off


def _artefact_logps(reference: RunReference, artefact: nn.Module) -> tuple[np.ndarray, float]:
    scored: Callable[[VerifiedRows], mx.array] = partial(_scored_logits, artefact)
    return _diverge(reference.batches, reference.logits, scored, len(reference.logps) // 2, reference.say)


def _fidelity(
    reference: RunReference, kl: float, own: np.ndarray, other: np.ndarray, reason: str | None, force: bool
) -> Fidelity:
    slope, correlation = slope_and_correlation(own, other)
    return Fidelity(
        pairs=len(own),
        tokens=reference.tokens,
        token_kl=kl,
        policy_reference_kl=reference.kl,
        slope=slope,
        correlation=correlation,
        accuracy_run=_accuracy(own),
        accuracy_artefact=_accuracy(other),
        passed=reason is None,
        reason=reason,
        forced=force and reason is not None,
    )


def _unpacked(model: nn.Module) -> nn.Module:
    from mlx_lm.utils import dequantize_model

    return dequantize_model(model)


def why_failed(
    kl: float, reference_kl: float, slope: float | None, rounding: float = ROUNDING[mx.float32]
) -> str | None:
    """Why an artefact is not the run, in a sentence; None when it is. `rounding` is nats a token that mean nothing."""
    limit = max(MOST_KL * reference_kl, rounding)
    if not kl <= limit:  # also when it is no number
        return (
            f"token KL to the run is {kl:.3g} nats, more than {limit:.3g} ({MOST_KL:.0%} of the {reference_kl:.3g} "
            f"that training moved the model)"
        )
    if slope is not None and not slope >= LEAST_SLOPE:
        return f"margins keep {slope:.2f} of their slope, less than {LEAST_SLOPE}"
    return None


def slope_and_correlation(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float | None]:
    """Least-squares slope of y on x, and their correlation; None where either has no spread."""
    dx, dy = x - x.mean(), y - y.mean()
    sx, sy = float(dx @ dx), float(dy @ dy)
    if len(x) < 2 or sx <= 1e-12 * max(1.0, float(x @ x)):
        return None, None
    return float(dx @ dy) / sx, None if sy == 0 else float(dx @ dy) / (sx * sy) ** 0.5


def _margins(logps: np.ndarray, reference: np.ndarray, beta: float) -> np.ndarray:
    """(B,) arXiv 2305.18290 equation 7, against the run's reference on both sides."""
    rewards = beta * (logps - reference)
    half = len(rewards) // 2
    return rewards[:half] - rewards[half:]


def _accuracy(margins: np.ndarray) -> float:
    return float(((np.sign(margins) + 1) / 2).mean())


def _batches(examples: Sequence[Example], vocabulary: int) -> Iterator[VerifiedRows]:
    """Rows of like length, as many as `LOGITS` allows; row i is a chosen completion, row B + i its rejected one."""
    pairs = [DistinctRow(e.prompt, e.chosen, e.chosen_mask, 0) for e in examples]
    pairs += [DistinctRow(e.prompt, e.rejected, e.rejected_mask, 0) for e in examples]
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].prompt) - len(pairs[i].completion))
    while order:
        longest = len(pairs[order[0]].prompt) + len(pairs[order[0]].completion) - 1
        count = max(1, LOGITS // (4 * vocabulary * longest))
        here, order = order[:count], order[count:]
        yield _padded_rows(tuple(here), [pairs[i] for i in here], longest)


def _padded_rows(which: tuple[int, ...], pairs: list[DistinctRow], longest: int) -> VerifiedRows:
    inputs, at, targets = np.zeros((len(pairs), longest), np.int32), [], []
    for number, row in enumerate(pairs):
        ids = np.concatenate([row.prompt, row.completion])
        inputs[number, : len(ids) - 1] = ids[:-1]
        columns = len(row.prompt) - 1 + row.scored
        columns = columns[columns >= 0]  # without a prompt nothing predicts the first token
        at += [(number, column) for column in columns.tolist()]
        targets.append(ids[columns + 1])
    return VerifiedRows(which, mx.array(inputs), np.array(at).T, mx.array(np.concatenate(targets)))


def _scored_logits(model: nn.Module, rows: VerifiedRows) -> mx.array:
    """(n, V) float32 logits, computed here, while adapters are on or off as they are."""
    logits = _logits_again(model, rows)()
    mx.eval(logits)
    return logits


def _of_reference(trained: TrainedRun, rows: VerifiedRows) -> mx.array:
    with trained.reference() as model:
        return _scored_logits(model, rows)


def _logits_again(model: nn.Module, rows: VerifiedRows) -> Logits:
    """The same to be asked again, with the states at the scored positions kept where the head can be found."""
    return logits_at(model, rows.inputs, *(mx.array(index) for index in rows.at))


def _sums(batches: list[VerifiedRows], logits: list[Logits], pairs: int, say: Say) -> np.ndarray:
    sums = np.zeros(2 * pairs)
    for rows, ask in time_left(zip(batches, logits, strict=True), len(batches), "scored batches of pairs", say):
        _add(sums, rows, heads.target_logps(ask(), rows.targets))
    return sums


def _add(sums: np.ndarray, rows: VerifiedRows, logps: mx.array) -> None:
    np.add.at(sums, np.array(rows.which)[rows.at[0]], np.array(logps, np.float64))


def _diverge(
    batches: list[VerifiedRows],
    own: list[Logits],
    other: Callable[[VerifiedRows], mx.array],
    pairs: int,
    say: Say,
) -> tuple[np.ndarray, float]:
    """(2B,) summed log-probs under `other`, and the mean token KL(own || other), nats."""
    sums, total, count = np.zeros(2 * pairs), 0.0, 0
    for rows, ask in time_left(zip(batches, own, strict=True), len(batches), "compared batches of pairs", say):
        mine = ask()
        mx.eval(mine)  # before the reference, which may be the same model with its adapters off
        theirs = other(rows)
        if theirs.shape != mine.shape:
            raise UserError(f"the artefact has {theirs.shape[-1]} words, the run {mine.shape[-1]}; another model?")
        divergence, logps = token_kl(mine, theirs, rows.targets)
        mx.eval(divergence, logps)
        _add(sums, rows, logps)
        total += float(np.array(divergence, np.float64).sum())
        count += len(divergence)
    return sums, total / count


def token_kl(own: mx.array, other: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """(n, V), (n, V) float32 logits, (n,) tokens -> KL(softmax(own) || softmax(other)) (n,), log other(targets) (n,).

    Nats, the divergence at least 0. sum_v p log(p / q) with sum_v (q - p) = 0 added: what the normalisers are rounded
    by, as much as a faithful artefact diverges, then enters squared.
    """
    (p_log, p), (q_log, q) = _softmax_pair(own), _softmax_pair(other)
    divergence = (p * (p_log - q_log) + q - p).sum(axis=-1)
    return mx.maximum(divergence, 0.0), mx.take_along_axis(q_log, targets[:, None], axis=-1)[:, 0]


def _softmax_pair(z: mx.array) -> tuple[mx.array, mx.array]:
    """(n, V) -> log-softmax and softmax, with one exponential; summed in two sweeps, as `heads` does."""
    shifted = z - mx.max(z, axis=-1, keepdims=True)
    e = exp(shifted)
    total = heads.in_blocks(e).sum(axis=-1).sum(axis=-1, keepdims=True)
    return shifted - mx.log(total), e / total
