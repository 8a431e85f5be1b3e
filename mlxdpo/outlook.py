"""What a plan of batches amounts to before anything is computed: shapes, steps, distinct rows, padding.

Everything comes from the lengths and row numbers of the encoded pairs; no token is touched, so a million pairs take
seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlxdpo import lanes
from mlxdpo.config import Config
from mlxdpo.data.cutting import cut_by_prompts
from mlxdpo.data.frames import Frame, choose_frame, need_of
from mlxdpo.data.planning import Indices, first_epoch, outline, plan_straight
from mlxdpo.data.store import Examples
from mlxdpo.loop import total_steps
from mlxdpo.memory import Layout
from mlxdpo.model.packed import pays


class Drawn(NamedTuple):
    """A batch's shape, its pairs, its distinct rows and the distinct tokens that are really there."""

    layout: Layout
    pairs: int
    rows: int
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


def layout_of(examples: Examples, indices: Indices, packs: bool, frames: Sequence[Frame] = ()) -> Drawn:
    """The shape that `data.batching.collate` gives these pairs; `packs` says whether the model can run them packed."""
    need = need_of(examples, indices)
    frame = choose_frame(need, frames, len(indices))
    packed = packs and pays((frame.prompts, frame.shared), (frame.rows, frame.width), frame.rest)
    index = np.array(indices)
    numbers = (examples.prompt_numbers[index], examples.row_numbers[index], examples.lengths[index])
    parts = len(cut_by_prompts(*numbers, lanes.count()))
    layout = Layout(frame.prompts, frame.shared, frame.rows, frame.width, frame.rest, frame.scored, packed, parts=parts)
    return Drawn(layout, len(indices), need.rows, need.distinct)


def drawn(
    examples: Examples, batches: Sequence[Indices], packs: bool, plain: bool, frames: Sequence[Frame] = ()
) -> list[Drawn]:
    """`layout_of` each batch; `plain` for a model whose parts are not known."""
    found = [layout_of(examples, indices, packs, frames) for indices in batches]
    return [one._replace(layout=one.layout._replace(plain=True)) for one in found] if plain else found


def training_batches(config: Config, examples: Examples) -> list[Indices]:
    """The batches of the first pass, or of as much of it as the run takes: a short run needs no more."""
    pairs, train = outline(examples, config.data.group), config.train
    plan = first_epoch(examples, config.data.group, train.batch_size, train.accumulate, train.seed)
    return [batch for window in plan.windows[: total_steps(config, pairs)] for batch in window]


def heldout_batches(config: Config, examples: Examples) -> list[Indices]:
    """The batches of a held-out evaluation."""
    return plan_straight(outline(examples, config.data.group), config.train.batch_size)


def sentence(outlook: Outlook) -> str:
    """What a person wants to know of a plan before it is carried out."""
    return (
        f"a pass: {outlook.pairs} pairs as {outlook.rows} distinct rows of at most {2 * outlook.pairs}, "
        f"{outlook.tokens} distinct tokens; {outlook.waste:.1%} of what is computed is padding or repeated; "
        f"{outlook.shapes} batch shapes"
    )


def look_ahead(config: Config, examples: Examples, found: Sequence[Drawn]) -> Outlook:
    """The numbers of a plan whose batches were `drawn`."""
    tokens, computed = sum(one.tokens for one in found), sum(one.layout.tokens for one in found)
    return Outlook(
        steps=total_steps(config, outline(examples, config.data.group)),
        pairs=sum(one.pairs for one in found),
        rows=sum(one.rows for one in found),
        tokens=tokens,
        waste=1 - tokens / computed,
        shapes=len({one.layout for one in found}),
        longest=int(examples.row_lengths.max(initial=0)),
    )
