"""What a stage takes from a data set: pairs, completions to imitate, or completions with a thumb; and their layout.

An `Example` always has two completions. Where there is one, the second is the first again (the same row, computed
once) or what the objective needs beside it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.examples import Examples
from mlxdpo.data.read import Item, distinct_pairs, pairs_only, unpaired
from mlxdpo.data.report import BadRow, Report
from mlxdpo.types import Example, Extras, Preference, UnpairedExample, UserError

CHUNK = 1000  # rows among which the completion of another prompt is looked for
END = np.zeros(1, np.int32)  # any token: it stands for what would come next


class Transform(NamedTuple):
    """Which rows are taken, and how their examples are laid out; `name` is part of what encoded data are kept under.

    The last argument of `lay_out` are examples of another part of the data (training, for held-out ones).
    """

    name: str
    rows: Callable[[Iterable[Item], Report], Iterator[Item]]
    lay_out: Callable[[Iterable[Example], DataConfig, Report, Sequence[Example]], Iterable[Example]]


def as_encoded(
    examples: Iterable[Example], data: DataConfig, report: Report, others: Sequence[Example] = ()
) -> Iterable[Example]:
    """No change."""
    return examples


def with_end(
    examples: Iterable[Example], data: DataConfig, report: Report, others: Sequence[Example] = ()
) -> Iterator[Example]:
    """Each completion one token longer: a batch computes all tokens of a completion but its last, from which nothing
    is predicted, and the state of the last real token is what a reward model reads."""
    for e in examples:
        chosen, rejected = (np.concatenate([completion, END]) for completion in (e.chosen, e.rejected))
        masks = [None if m is None else np.append(m, True) for m in (e.chosen_mask, e.rejected_mask)]
        yield replace(e, chosen=chosen, rejected=rejected, chosen_mask=masks[0], rejected_mask=masks[1])


def demonstrations(items: Iterable[Item], report: Report) -> Iterator[UnpairedExample]:
    """The completions to imitate: the chosen one of a pair, single ones unless they have a thumb down; each once."""
    return _kept_once(_worth_imitating(items, report), report)


def _worth_imitating(items: Iterable[Item], report: Report) -> Iterator[UnpairedExample]:
    for item in items:
        if isinstance(item, Preference):
            same = (item.where, item.tools, item.columns, item.extras, item.context)
            yield UnpairedExample(item.prompt, item.chosen, True, *same)
        elif item.desirable:
            yield item
        else:
            report.refuse(item.where, BadRow("thumb down", "a completion with a thumb down is not imitated"), "skip")


def opinions(items: Iterable[Item], report: Report) -> Iterator[UnpairedExample]:
    """Completions with a thumb; a pair is two, the chosen one up and the rejected one down. Each opinion once."""
    single = (one for item in items for one in (unpaired([item]) if isinstance(item, Preference) else (item,)))
    return _kept_once(single, report)


def _kept_once(items: Iterable[UnpairedExample], report: Report) -> Iterator[UnpairedExample]:
    """A completion may stand in several pairs of its prompt."""
    return distinct_pairs(items, report, "the same completion as in an earlier pair")  # type: ignore[return-value]


def mismatched(
    examples: Iterable[Example], data: DataConfig, report: Report, others: Sequence[Example] = (), *, seed: int
) -> Iterator[Example]:
    """Put the completion of another prompt in the place of `rejected`: KTO's KL term is estimated from it (arXiv
    2402.01306 section 4.1; TRL rotates each batch by one, here it is a function of data and seed alone).

    It is one of the same thousand rows, or of `others` where those have one prompt alone; it is cut where it would
    exceed `data.max_length` behind its new prompt (counted). Raises `UserError` when there is no other prompt.
    """
    left, before = iter(examples), list(others)
    for number in itertools.count():
        chunk = list(itertools.islice(left, CHUNK))
        if not chunk:
            return
        order = np.random.default_rng([seed, number]).permutation(len(chunk))
        place = {int(i): at for at, i in enumerate(order)}
        ring = [chunk[i] for i in order]
        for i, example in enumerate(chunk):
            other = _of_another_prompt(example, [*ring[place[i] + 1 :], *ring[: place[i]], *before])
            room = data.max_length - len(example.prompt)
            if len(other.chosen) > room:
                report.change(example.where, "completion of another prompt (for the KL term) cut to fit")
            mask = None if other.chosen_mask is None else other.chosen_mask[:room]
            yield replace(example, rejected=other.chosen[:room], rejected_mask=mask)
        before = [*chunk[-1:], *others]


def _of_another_prompt(example: Example, others: Sequence[Example]) -> Example:
    for other in others:
        if not np.array_equal(other.prompt, example.prompt):
            return other
    raise UserError(
        f"{example.where}: all rows have the same prompt, but the KL term of this objective needs the completion of "
        f"another one; add rows, or use loss.name apo_zero_unpaired, which has no such term"
    )


def thumbs(examples: Examples) -> np.ndarray:
    """(N,) 1 for a thumb up, 0 for one down."""
    return examples.extras[:, Extras._fields.index("desirable")]


def balance(desirable: np.ndarray, up: float, down: float) -> str:
    """What the thumbs of a data set, (N,) 1 or 0, weighed by `up` and `down`, come to, and what KTO's authors advise.

    arXiv 2402.01306 section 4.2: weight_D n_D / (weight_U n_U) between 1 and 3/2.
    """
    ups, downs = int((desirable > 0.5).sum()), int((desirable <= 0.5).sum())
    counted = f"{ups} thumbs up and {downs} down"
    if not (ups and downs and up and down):
        return f"{counted}: KTO needs both kinds with weights above 0"
    ratio = up * ups / (down * downs)
    said = f"{counted}; with loss.desirable_weight {up:g} and undesirable_weight {down:g} they weigh {ratio:.2f} to 1"
    if 1 <= ratio <= 1.5:
        return said
    side, value = ("desirable", downs * down / ups) if ratio < 1 else ("undesirable", ups * up / downs / 1.5)
    return f"{said}; KTO's authors advise 1 to 1.5, as with loss.{side}_weight {value:.3g}"


PAIRS = Transform("pairs", pairs_only, as_encoded)
REWARDED = Transform("rewarded", pairs_only, with_end)
DEMONSTRATIONS = Transform("demonstrations", demonstrations, as_encoded)
THUMBS = Transform("thumbs", opinions, as_encoded)


def thumbs_with_kl(seed: int) -> Transform:
    """Rows whose examples carry the completion of another prompt."""
    return Transform(f"thumbs-{seed}", opinions, functools.partial(mismatched, seed=seed))
