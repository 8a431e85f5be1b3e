"""What a plan of batches amounts to before anything is computed: shapes, steps, distinct rows, padding.

Everything comes from the lengths and row numbers of the encoded pairs; no token is touched, so a million pairs take
seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.batching import bucket, shared_prefix
from mlxdpo.data.planning import Indices, outline, plan_epoch, plan_straight
from mlxdpo.data.store import Examples
from mlxdpo.loop import total_steps
from mlxdpo.memory import Layout
from mlxdpo.model.packed import pays


class Drawn(NamedTuple):
    """A batch's shape, its pairs, its distinct rows and the distinct tokens that are really there."""

    layout: Layout
    pairs: int
    tokens: int


class Outlook(NamedTuple):
    """One pass, or as much of it as the run takes.

    steps        optimizer steps of the run
    pairs, rows  pairs of the pass and the distinct rows they come to within their batches (at most 2 * pairs)
    tokens       distinct tokens of the pass
    waste        share of the computed tokens that are padding or repeated, 0..1
    shapes       distinct batch shapes of the pass: each is traced once
    longest      tokens of the longest row, prompt and completion together
    """

    steps: int
    pairs: int
    rows: int
    tokens: int
    waste: float
    shapes: int
    longest: int


def layout_of(examples: Examples, indices: Indices, packs: bool) -> Drawn:
    """The shape that `data.batching.collate` gives these pairs; `packs` says whether the model can run them packed."""
    index = np.array(indices)
    _, first = np.unique(examples.row_numbers[index].ravel(), return_index=True)
    completion = examples.lengths[index, 1:].ravel()[first]
    prompt = np.repeat(examples.lengths[index, 0], 2)[first]
    prompts, of = np.unique(np.repeat(examples.prompt_numbers[index], 2)[first], return_index=True)
    shared = shared_prefix(int(prompt.min()))
    behind = int((prompt[of] - shared).sum() + (completion - 1).sum())
    width = bucket(int((prompt - shared + completion).max()) - 1)
    count, rows, rest = len(prompts), len(first), bucket(behind)
    packed = packs and pays((count, shared), (rows, width), rest)
    layout = Layout(count, shared, rows, width, rest, bucket(int(completion.sum())), packed)
    return Drawn(layout, len(indices), count * shared + behind)


def drawn(examples: Examples, batches: Iterable[Indices], packs: bool, plain: bool) -> list[Drawn]:
    """`layout_of` each batch; `plain` for a model whose parts are not known."""
    found = [layout_of(examples, indices, packs) for indices in batches]
    return [one._replace(layout=one.layout._replace(plain=True)) for one in found] if plain else found


def training_batches(config: Config, examples: Examples) -> list[Indices]:
    """The batches of the first pass, or of as much of it as the run takes."""
    pairs, train = outline(examples, config.data.group), config.train
    plan = plan_epoch(pairs, train.batch_size, train.accumulate, train.seed, 0)
    return [batch for window in plan.windows[: total_steps(config, pairs)] for batch in window]


def heldout_batches(config: Config, examples: Examples) -> list[Indices]:
    """The batches of a held-out evaluation."""
    return plan_straight(outline(examples, config.data.group), config.train.batch_size)


def look_ahead(config: Config, examples: Examples, found: Sequence[Drawn]) -> Outlook:
    """The numbers of a plan whose batches were `drawn`."""
    tokens, computed = sum(one.tokens for one in found), sum(one.layout.tokens for one in found)
    return Outlook(
        steps=total_steps(config, outline(examples, config.data.group)),
        pairs=sum(one.pairs for one in found),
        rows=sum(one.layout.rows for one in found),
        tokens=tokens,
        waste=1 - tokens / computed,
        shapes=len({one.layout for one in found}),
        longest=int(examples.row_lengths.max(initial=0)),
    )
