"""A finished run, loaded to be judged: its tuned model, its locked reference, the pairs that were held out.

The reference is part of what a run is: implicit rewards against another one are other numbers (people who guessed it
got wrong ones), so it is compared with the manifest and nothing is scored when it differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.batching import collate
from mlxdpo.data.best_of_k import BestOfK, holds_best_of_k, read_best_of_k
from mlxdpo.data.encode import encode, encode_all
from mlxdpo.data.examples import largest_token, longest_row
from mlxdpo.data.fields import as_turns
from mlxdpo.data.planning import Group, Indices, outline, plan_straight
from mlxdpo.data.read import heldout_source, prompt_key, read_pairs, split_heldout
from mlxdpo.data.report import Report
from mlxdpo.data.sources import is_hub_dataset
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.forward.layer_plan import evaluate_batch
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.io.digest import folder_digest
from mlxdpo.model.adapters import adapters_off, dropout_off, load_arrays, load_run, load_start, read_settings
from mlxdpo.model.limits import check_takes
from mlxdpo.model.policy import Policy
from mlxdpo.runs import INPUTS, Run
from mlxdpo.training import checkpoint
from mlxdpo.training.reference import find_reference
from mlxdpo.types import Batch, Example, Preference, Text, UserError

ModelContext = Callable[[], contextlib.AbstractContextManager[nn.Module]]
"""Gives a model to run while the context lasts."""


class PairLogps(NamedTuple):
    """Summed completion log-probs of pairs under policy and reference, nats, and lengths in tokens: each (B,)."""

    chosen: np.ndarray
    rejected: np.ndarray
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    chosen_len: np.ndarray
    rejected_len: np.ndarray


def score_examples(
    examples: Sequence[Example],
    group: Group,
    batch_size: int,
    count: int,
    score: Callable[[Batch], mx.array],
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> np.ndarray:
    """(count, N) float64: what `score` makes of N examples, in the order given, `batch_size` of them at once.

    `score` gives (count, B) numbers of a batch, or (B,) where `count` is 1. `group` is `data.group`.
    `progress` wraps the batches, for a progress bar.
    """
    values = np.zeros((count, len(examples)))
    for indices in progress(plan_straight(outline(examples, group), batch_size)):
        batch = collate(examples, indices, batch_size)
        found = score(batch)
        evaluate_batch(batch, found)
        values[:, list(indices)] = np.array(found).reshape(count, -1)[:, : len(indices)]
    return values


def model_logps(
    model: nn.Module,
    examples: Sequence[Example],
    group: Group,
    batch_size: int,
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> np.ndarray:
    """(2, N) summed log-probs of chosen and rejected completions under one model without dropout, nats."""
    forward = forward_fns(model).score

    def score(batch: Batch) -> mx.array:
        """(2, B) of a batch."""
        pairs = score_pairs(model, batch, forward)
        return mx.stack([pairs.chosen, pairs.rejected])

    with dropout_off(model):
        return score_examples(examples, group, batch_size, 2, score, progress)


def logps_under_both(
    policy: nn.Module,
    reference: ModelContext,
    examples: Sequence[Example],
    group: Group,
    batch_size: int = 8,
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> PairLogps:
    """Log-probs of every pair under a policy and its reference, in the order given. `progress` as `score_examples`."""
    forward = forward_fns(policy).score
    with reference() as model:
        other = forward if model is policy else forward_fns(model).score

    def score(batch: Batch) -> mx.array:
        """(4, B) of a batch: chosen and rejected under the policy, then under the reference."""
        with dropout_off(policy) as model:
            tuned = score_pairs(model, batch, forward)
            evaluate_batch(batch, tuned.chosen, tuned.rejected)
        with reference() as model, dropout_off(model):  # evaluated here, while the reference's adapters are on
            base = score_pairs(model, batch, other)
            both = mx.stack([tuned.chosen, tuned.rejected, base.chosen, base.rejected])
            evaluate_batch(batch, both)
        return both

    values = score_examples(examples, group, batch_size, 4, score, progress)
    lengths = np.array([example.scored for example in examples], np.float64).reshape(-1, 2).T
    return PairLogps(*values, *lengths)


LOCKED = ("digest", "dtype", "quantization", "adapter")


class TrainedRun(NamedTuple):
    """A run's models: `policy` tuned; `start` as training found it; `reference` what rewards are measured against."""

    run: Run
    config: Config
    policy: Policy
    start: ModelContext
    reference: ModelContext


def open_trained_run(run: Run) -> TrainedRun:
    """Load a run's tuned model and its reference; one set of weights in memory where adapters can be switched off.

    Raises `UserError` when model or reference are not the ones in the run's manifest.
    """
    run.need(*(name for name in INPUTS if not name.startswith("data.")))
    config, policy = run.config(), load_run(run)
    bare = config.model.adapter is None and read_settings(run.adapter).method != "full"
    start: ModelContext = (
        partial(adapters_off, policy.model) if bare else partial(contextlib.nullcontext, load_start(run).model)
    )
    if config.reference.model is None:
        check_reference(run, policy, config.model.adapter)
        return TrainedRun(run, config, policy, start, start)
    other, adapter = find_reference(config, policy)
    check_reference(run, other, adapter)
    return TrainedRun(run, config, policy, start, partial(contextlib.nullcontext, other.model))


def at_checkpoints(trained: TrainedRun) -> Iterator[str]:
    """Put the weights of each kept checkpoint into `trained.policy`, oldest first, and yield its name meanwhile.

    Afterwards the run's own adapter is back, also when the caller stops half-way.
    """
    try:
        for folder in checkpoint.steps(trained.run.checkpoints):
            load_arrays(trained.policy.model, folder)
            yield folder.name
    finally:
        load_arrays(trained.policy.model, trained.run.adapter)


def check_reference(run: Run, reference: Policy, adapter: str | None) -> None:
    """Raise `UserError` unless `reference` with the adapter folder `adapter` is what the manifest names."""
    then = run.manifest()["reference"]
    now = {**reference.identity, "adapter": None if adapter is None else folder_digest(Path(adapter))}
    for name in LOCKED:
        if then[name] != now[name]:
            raise UserError(
                f"{run.path}: its reference had {name} {_short_identity(then[name])}, the one here has "
                f"{_short_identity(now[name])}; "
                f"rewards need the same reference; restore {run.manifest()['reference_source']}"
            )


def _short_identity(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def heldout_pairs(run: Run, data: str | None = None, read: Any = read_pairs) -> tuple[list[Any], Report, str]:
    """Pairs that training never saw, what became of the rows, and where they come from in words.

    Those of `data` when given, else of the recipe's `data.eval`, else the prompts that the recipe's
    `data.eval_fraction` held out; with `read` of `read_preferences` also rows with one answer. Raises `UserError` when
    there are none.
    """
    config = run.config()
    if data is not None:
        rows, report = read(config.data, data)
        return rows, report, _called(data)
    run.need("data.eval" if config.data.eval else "data.path", instead=", or name held-out pairs with --data")
    if (source := heldout_source(config.data)) is not None:
        rows, report = read(config.data, *source)
        return rows, report, _called(source[0])
    rows, report = read(config.data)
    rows = split_heldout(rows, config.data.eval_fraction, config.train.seed)[1]
    if not rows:
        raise UserError(f"{run.path}: its recipe held out no pairs; pass some with --data")
    return rows, report, f"the {config.data.eval_fraction:.0%} of {_called(config.data.path)} that training held out"


def heldout_records(run: Run, data: str) -> tuple[list[BestOfK], Report, str] | None:
    """Best-of-k records of `data`, what became of the rows, and the source in words; None where it holds pairs.

    Raises `UserError` for a source that cannot be read, and when none of its records can be used.
    """
    config = run.config().data
    if not holds_best_of_k(data, config.split):
        return None
    records, report = read_best_of_k(data, config.split, config.on_bad_row)
    if not records:
        raise UserError(f"{data}: none of its {report.read} records can be used; {'; '.join(report.lines())}")
    return records, report, _called(data)


def _called(source: str) -> str:
    """A file by its name alone: reports are handed on, folders of this machine are nobody's business."""
    return source if is_hub_dataset(source) else Path(source).name


def encode_pairs(trained: TrainedRun, rows: Sequence[Preference]) -> tuple[list[Preference], list[Example], Report]:
    """Rows and their token ids, one for one, without those that do not fit (counted in the report)."""
    tokenizer, eos, data = trained.policy.tokenizer, trained.policy.eos_ids, trained.config.data
    examples, report = encode_all(rows, tokenizer, data, eos_ids=eos)
    check_takes(trained.policy, longest_row(examples), largest_token(examples))
    if len(examples) == len(rows):
        return list(rows), examples, report
    counted = Report()  # row by row, to know which ones are left
    found = [(row, encode(row, tokenizer, data, counted, eos_ids=eos)) for row in rows]
    fitting = [(row, example) for row, example in found if example is not None]
    return [row for row, _ in fitting], [example for _, example in fitting], report


def pair_logps(
    trained: TrainedRun,
    examples: Sequence[Example],
    batch_size: int = 8,
    progress: Callable[[Sequence[Indices]], Iterable[Indices]] = iter,
) -> PairLogps:
    """Log-probs of every pair, in the order given, `batch_size` pairs at once. `progress` wraps the batches."""
    policy, group = trained.policy.model, trained.config.data.group
    return logps_under_both(policy, trained.reference, examples, group, batch_size, progress)


def prompt_name(prompt: Text) -> str:
    """What a prompt is called in result files: a digest of its roles and words."""
    return prompt_key(prompt).hex()


def prompt_text(prompt: Text) -> str:
    """A prompt for a reader: plain text as it stands, a conversation as `role: content` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    turns = as_turns(prompt)
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].content
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)


def distinct_prompts(rows: Sequence[Preference], count: int) -> list[Preference]:
    """The first row of each of the first `count` distinct prompts."""
    first: dict[bytes, Preference] = {}
    for row in rows:
        first.setdefault(prompt_key(row.prompt), row)
    return list(first.values())[:count]
