"""Where training starts: from weights or an adapter, against which reference, and the proof that it starts right."""

from __future__ import annotations

import time
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.batch_shapes import SAMPLE
from mlxdpo.data.batching import collate
from mlxdpo.data.dataset import Dataset
from mlxdpo.data.examples import largest_token, longest_row
from mlxdpo.forward.choose_forward import ForwardFns, agreeing_level, detailed_fns, forward_fns
from mlxdpo.forward.levels import PLAIN, Level, offered_levels
from mlxdpo.forward.logprobs import float32_activations, rounding_tolerance, score_pairs
from mlxdpo.forward.patch_mlx_lm import unrolled_in
from mlxdpo.forward.router_balance import check_routers
from mlxdpo.io.progress import clock
from mlxdpo.losses import Loss
from mlxdpo.model.adapters import adapters_off, dropout_off
from mlxdpo.model.limits import check_takes
from mlxdpo.model.policy import Policy
from mlxdpo.training.distributed import first_pairs
from mlxdpo.training.plan import PlanSummary, TrainPlan, checked_pairs, planned_batches, summarize_plan
from mlxdpo.training.step import TrainState
from mlxdpo.types import Batch, Example, Pairs, UserError


def check_heldout(config: Config, data: Dataset) -> None:
    """Raise `UserError` for a setting that looks at held-out pairs when there are none."""
    train = config.train
    for name, value in (
        ("keep_model", train.keep_model if train.keep_model == "best" else None),
        ("patience", train.patience),
    ):
        if value is not None and not data.heldout:
            raise UserError(f"train.{name} {value} needs held-out pairs; give data.eval, or raise data.eval_fraction")


def check_rows_fit(data: Dataset, *policies: Policy) -> int:
    """Tokens of the longest row. Raises `UserError` for rows or token ids that one of the models cannot take."""
    parts = (data.train, data.heldout)
    longest, largest = longest_row(*parts), largest_token(*parts)
    for policy in policies:
        check_takes(policy, longest, largest)
    return longest


def choose_forward(model: nn.Module, data: Dataset, plan: TrainPlan, config: Config) -> tuple[ForwardFns, str]:
    """How to run the model, and why not in the fastest way: each is asked for the plain way's log-probs on real rows,
    and for its gradients on the beginning of one.

    Raises `UserError` when the recipe wants gradient checkpointing and no way with it is exact.
    """
    checkpoint, name = config.train.gradient_checkpointing, type(model).__module__.rsplit(".", 1)[-1]
    offered = _offered_for(model, config)
    if checkpoint or not offered[0].plain:
        offered += [PLAIN] * (checkpoint and not offered[0].plain)
        batch = collate(data.train, checked_pairs(plan, data.train), 1)
        short = collate([_beginning(data.train[plan.training[0][0]])], (0,), 1)
        level = agreeing_level(model, offered, batch, short, checkpoint)
        if checkpoint and not level.agrees:
            raise UserError(
                f"{name}: with train.gradient_checkpointing {level.why}; set train.gradient_checkpointing false"
            )
    else:
        level = offered[0]
    return forward_fns(model, checkpoint, level), f"{name}: {LOST[level.name]}: {level.why}" if level.why else ""


# What is computed where a faster level was not to be had.
LOST = {
    "prefix": "rows are padded to one length",
    "head": "each row is computed with its whole prompt",
    "plain": "full rows and full logits are computed",
}
LONGEST = 64, 32  # tokens of a prompt, and of a completion, whose gradient is compared


def _offered_for(model: nn.Module, config: Config) -> list[Level]:
    """The levels that the model's code allows and the recipe leaves. Raises `UserError` for routers that cannot be
    balanced, and for gradient checkpointing beside them: watched inside a checkpoint they have no gradient outside."""
    if not config.train.router_aux_loss_coef:
        return offered_levels(model)
    check_routers(model)
    if config.train.gradient_checkpointing:
        raise UserError(
            "train.gradient_checkpointing and train.router_aux_loss_coef exclude each other: routers cannot be read "
            "inside a checkpoint; set one of them to false or 0"
        )
    return [PLAIN._replace(why="train.router_aux_loss_coef reads the routers of full rows")]


def _beginning(example: Example) -> Example:
    """So much of a pair as a comparison of gradients needs: no length decides whether a gradient is whole."""
    prompt, completion = LONGEST
    masks = (example.chosen_mask, example.rejected_mask)
    cut = [None if mask is None or not mask[:completion].any() else mask[:completion] for mask in masks]
    return replace(
        example,
        prompt=example.prompt[-prompt:],
        chosen=example.chosen[:completion],
        rejected=example.rejected[:completion],
        chosen_mask=cut[0],
        rejected_mask=cut[1],
    )


def recurrence_note(model: nn.Module, summary: PlanSummary) -> str:
    """What a recurrence that goes token by token will cost, measured on two short rows; empty for other models.

    A step takes about three forward passes. Such a model keeps every state for the backward pass besides.
    """
    slow = unrolled_in(model)
    if slow is None:
        return ""
    short, long = (_seconds(model, length) for length in (8, 24))
    a_token = max(long - short, 0.0) / 16
    return (
        f"{slow}: mlx-lm computes its recurrence token by token, slowly and with much memory: "
        f"a pass of {summary.tokens} tokens takes about {clock(3 * a_token * summary.tokens)} here; shorter rows "
        f"(data.max_length) and a smaller train.batch_size need less memory"
    )


def _seconds(model: nn.Module, length: int) -> float:
    """Of one forward pass over a row of `length` tokens, after a first one."""
    row = mx.zeros((1, length), mx.int32)
    for _ in range(2):
        start = time.perf_counter()
        mx.eval(model(row))
    return time.perf_counter() - start


def preview_plan(data: Dataset, plan: TrainPlan, level: Level) -> PlanSummary:
    """What the first pass amounts to; of a long one, its first `SAMPLE` batches."""
    return summarize_plan(plan, data.train, planned_batches(data.train, plan.training[:SAMPLE], level, plan.shapes))


def _first_batch(state: TrainState) -> Batch:
    """The first batch of a run."""
    return state.train.batch(state.plan.training[0], state.config.train.batch_size)


def check_start(state: TrainState) -> None:
    """Before the first step policy and reference agree, so the objective has a known value (sigmoid: ln 2).

    Raises `UserError` naming the cause when it has not. Dropout is off here: it may differ by design. Where no
    reference is asked there is nothing to agree with, but a reward model's rewards are all 0.
    """
    if "reference" not in state.loss.needs:
        _check_alone(state)
        return
    batch, wanted = _first_batch(state), state.loss.start()
    with dropout_off(state.model):
        pairs = _score_first(state, batch)
        gaps, tokens = _reference_gaps(pairs)
        # Rows scored beside others are rounded otherwise in 16 bits: by how much is asked only where it matters.
        if (gaps <= rounding_tolerance(tokens)).all() or (gaps <= _rounding(state, batch, pairs)).all():
            _check_value(state, pairs, wanted)
            return
        cause = _cause(state, batch, pairs)
    instead = "" if wanted is None else f" instead of {wanted:.6f}"
    raise UserError(
        f"before the first step the loss is {_value(state, pairs):.6f}{instead} "
        f"and a log-prob is {gaps.max():.4f} nats from its reference: {cause}"
    )


def _score_first(state: TrainState, batch: Batch) -> Pairs:
    """The pairs of a batch, without those that only fill it."""
    return first_pairs(score_pairs(state.model, batch, state.forward.score), int(batch.weight.sum().item()))


def _rounding(state: TrainState, batch: Batch, pairs: Pairs) -> np.ndarray:
    """How far each of `_reference_gaps` may be off by rounding in the model's dtype: what float32 changes of the rows,
    a token, as a root mean square over them."""
    with float32_activations(state.model):
        exact = _score_first(state, batch)
    moved, tokens = _reference_gaps(
        exact._replace(ref_chosen=pairs.chosen, ref_rejected=pairs.rejected, ref_shared=pairs.shared)
    )
    if not np.isfinite(moved).all():
        return np.zeros(moved.shape)
    return rounding_tolerance(tokens, float(np.sqrt(np.mean(moved**2 / tokens))))


def _check_alone(state: TrainState) -> None:
    """A loss that asks no reference and still has a known first value."""
    if (wanted := state.loss.start()) is None:
        return
    batch = _first_batch(state)
    with dropout_off(state.model):
        pairs = _score_first(state, batch)
    if abs((value := _value(state, pairs)) - wanted) > 1e-4 * max(1.0, wanted):
        raise UserError(
            f"before the first step the loss is {value:.6f} instead of {wanted:.6f}: the head does not start at zero; "
            f"please report this with the recipe"
        )


def _check_value(state: TrainState, pairs: Pairs, wanted: float | None) -> None:
    """The loss of a policy that is its reference, to the bit: rounding in 16 bits is not asked about here."""
    ref = {"chosen": pairs.ref_chosen, "rejected": pairs.ref_rejected, "shared": pairs.ref_shared}
    value = _value(state, pairs._replace(**ref))
    if wanted is not None and abs(value - wanted) > 1e-4 * max(1.0, abs(wanted)):
        raise UserError(
            f"where policy and reference agree the loss is {value:.6f} instead of {wanted:.6f}: "
            f"{state.config.loss.name} is computed wrongly here; please report this with the recipe"
        )


def _value(state: TrainState, pairs: Pairs) -> float:
    """Mean loss, before weights of pairs."""
    losses = state.loss(pairs._replace(weight=mx.ones_like(pairs.chosen)))
    return float(losses.mean())


def with_details(ways: ForwardFns, loss: Loss, config: Config) -> ForwardFns:
    """The ways of a model, giving more than summed log-probs where a modifier of the loss asks for it."""
    return detailed_fns(ways, config.train.gradient_checkpointing) if loss.needs & {"shared", "squares"} else ways


def _reference_gaps(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Distances between a policy's and a reference's log-probs, nats, NaN as infinite; and tokens of each."""
    lengths = [np.array(pairs.chosen_len), np.array(pairs.rejected_len)]
    gaps = [np.array(pairs.chosen - pairs.ref_chosen), np.array(pairs.rejected - pairs.ref_rejected)]
    if pairs.shared is not None and pairs.ref_shared is not None:
        gaps += list(np.array(pairs.shared - pairs.ref_shared))
        lengths += [np.minimum(*lengths)] * 2
    return np.nan_to_num(np.abs(np.stack(gaps)), nan=np.inf, posinf=np.inf), np.stack(lengths)


def _cause(state: TrainState, batch: Batch, pairs: Pairs) -> str:
    """What makes policy and reference differ. A fresh adapter of zeros changes no bit of the same rows."""
    if not np.isfinite(np.array(batch.ref)).all():
        return "the reference's log-probs are not finite numbers; look at the weights, or set model.dtype float32"
    if state.config.model.adapter is None and state.config.lora.method != "full":
        with adapters_off(state.model):
            bare = _score_first(state, batch)
        moved, tokens = _reference_gaps(
            bare._replace(ref_chosen=pairs.chosen, ref_rejected=pairs.rejected, ref_shared=None)
        )
        if (moved > rounding_tolerance(tokens)).any():
            return "the fresh adapter is not zero"
    return "the reference was scored with other weights than training starts from; score it again with an empty cache"
