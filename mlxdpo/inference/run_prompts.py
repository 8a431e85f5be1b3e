"""A run's own prompts: those held out from training, to measure with, and those trained on, to teach with.

Only files on this machine are read: the page fetches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxdpo.data.read import heldout_source, prompt_key, read_pairs, split_heldout
from mlxdpo.inference.trained_run import distinct_prompts, prompt_text
from mlxdpo.runs import Run
from mlxdpo.types import Message, Preference, Text, UserError

MOST = 300  # prompts in a list
SHORTEST, LONGEST = 16, 256  # tokens of an answer that the data suggest


class Gallery(NamedTuple):
    """`heldout` and `train` hold one row per prompt, at most `MOST`; `heldout_keys` all held-out prompts.

    `tokens` is about as long as held-out answers are; `note` says why there are no prompts.
    """

    heldout: tuple[Preference, ...]
    train: tuple[Preference, ...]
    heldout_rows: tuple[Preference, ...]
    tokens: int
    note: str = ""

    @property
    def heldout_keys(self) -> frozenset[bytes]:
        """The `prompt_key` of every held-out prompt."""
        return frozenset(prompt_key(row.prompt) for row in self.heldout_rows)


def gallery(run: Run) -> Gallery:
    """The prompts of a run's data; an empty gallery with a note where they are not on this machine."""
    try:
        train, heldout = _rows_of_run(run)
    except (UserError, OSError) as error:
        return Gallery((), (), (), 128, str(error))
    note = "" if heldout else "this run held out no prompts"
    unseen, seen = (tuple(distinct_prompts(rows, MOST)) for rows in (heldout, train))
    return Gallery(unseen, seen, tuple(heldout), _usual_tokens(heldout or train), note)


def _rows_of_run(run: Run) -> tuple[list[Preference], list[Preference]]:
    config = run.config()
    run.need("data.path", "data.eval")
    source = heldout_source(config.data)
    for path in (config.data.path, *(source[:1] if source else ())):
        if not Path(path).exists():
            raise UserError(
                f"the run's data {Path(path).name} are not at {path}, seen from where the app was started; start it in "
                f"the folder where you trained"
            )
    rows, _ = read_pairs(config.data)
    if source is not None:
        return rows, read_pairs(config.data, *source)[0]
    train, heldout = split_heldout(rows, config.data.eval_fraction, config.train.seed)
    return train, heldout


def _usual_tokens(rows: Sequence[Preference]) -> int:
    """Tokens that hold 95 % of the answers, taken at four characters each, in steps of 8."""
    sizes = [len(text_of(answer)) / 4 for row in rows for answer in (row.chosen, row.rejected)]
    usual = float(np.quantile(sizes, 0.95)) if sizes else 128.0
    return int(min(LONGEST, max(SHORTEST, 8 * round(usual / 8))))


def text_of(answer: Text) -> str:
    """An answer for a reader."""
    return answer if isinstance(answer, str) else "\n".join(turn.content for turn in answer)


def one_line(row: Preference, longest: int = 90) -> str:
    """A prompt on one line."""
    return short_line(prompt_text(row.prompt), longest)


def short_line(text: str, longest: int = 60) -> str:
    """A text on one line of at most `longest` characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def text_to_json(text: Text) -> str | list[dict[str, object]]:
    """Text as it stands in a data file."""
    return text if isinstance(text, str) else [turn.as_dict() for turn in text]


def text_from_json(value: object) -> Text:
    """What `text_to_json` wrote."""
    if isinstance(value, str):
        return value
    assert isinstance(value, list)
    return tuple(Message(turn["role"], turn["content"]) for turn in value)
