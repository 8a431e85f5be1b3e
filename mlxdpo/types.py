"""The vocabulary of the project: what a row, a pair, a batch and an event are. Read this file first.

Shape legend, used in every signature and comment:

    G  prompts in a batch          T  tokens of a row
    R  rows: one row is one completion of one prompt
    B  pairs, as index vectors into the rows (plain pair data: R = 2B)
    P  shared-prefix tokens        D  hidden size          V  vocabulary

Log-probabilities are natural (nats), float32, summed over the completion's tokens unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # this file imports nothing heavy: `mlxdpo --help` reads it
    import mlx.core as mx
    import numpy as np


LONGEST_SENTENCE = 480  # characters


class UserError(Exception):
    """The user's input is wrong: a sentence with the values and the next step. The CLI prints it and exits 2.

    Where several things are wrong, such as keys of a recipe, it has a sentence for each, one a line. Values come from
    files and strangers: line ends, control and half characters are escaped, and of a sentence that they make very long
    the middle is left out.
    """

    def __init__(self, *sentences: str):
        super().__init__("\n".join(_escaped_line(sentence) for sentence in sentences))


def _escaped_line(sentence: str) -> str:
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence.strip())
    return f"{line[:260]} … {line[-200:]}" if len(line) > LONGEST_SENTENCE else line


class Message(NamedTuple):
    """One turn of a conversation. `extra` holds what some templates read besides (tool calls, names, reasoning)."""

    role: str
    content: str
    extra: Mapping[str, Any] = {}

    def as_dict(self) -> dict[str, Any]:
        """The mapping chat templates expect."""
        return {"role": self.role, "content": self.content, **self.extra}


Text = str | tuple[Message, ...]
"""Plain text, or the turns of a conversation."""


class Extras(NamedTuple):
    """Numbers of a row besides its texts, or (B,) vectors of a batch. The defaults change no loss.

    label      the probability that `chosen` is the better completion (a soft label)
    weight     what the pair's loss is multiplied by
    margin     by how much reward the chosen completion should win (reward units: beta * nats)
    desirable  1 for a thumb up, 0 for a thumb down; of unpaired rows only
    """

    label: Any = 1.0
    weight: Any = 1.0
    margin: Any = 0.0
    desirable: Any = 1.0


NO_EXTRAS = Extras()


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a better and a worse completion.

    `prompt` is plain text or the turns before the completion. `chosen` and `rejected` are one answer each: plain
    text, or a tuple of one assistant `Message`. `where` names the source for error messages ("pairs.jsonl:37").
    `columns` keeps the row's other columns.

    In a trajectory `chosen` and `rejected` are several turns, and `prompt` those before the first assistant turn. The
    first `context` turns of both come before what is judged; of the others each assistant turn is. None: no trajectory.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    extras: Extras = NO_EXTRAS
    context: int | None = None


@dataclass(frozen=True, slots=True)
class UnpairedExample:
    """One prompt with one completion and a thumb up or down (KTO, arXiv 2402.01306). `context` as in `Preference`."""

    prompt: Text
    completion: Text
    desirable: bool
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    extras: Extras = NO_EXTRAS
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A `Preference` as token ids (int32 vectors). The prompt is the same for both completions, token by token.

    Scored tokens are exactly `chosen` and `rejected`: the completion through its end-of-turn token. In a trajectory a
    completion has turns that are not judged (earlier turns, tool output): `chosen_mask` and `rejected_mask` are then
    bool vectors, True at the tokens that are scored; None scores all.

    An unpaired row (KTO) is laid out as a pair: `chosen` is its completion, `extras.desirable` its thumb, `rejected`
    the completion of another prompt from which the KL term is estimated (arXiv 2402.01306 section 4.1), or `chosen`
    again for an objective without that term: the same row, computed once.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    where: str
    extras: Extras = NO_EXTRAS
    chosen_mask: np.ndarray | None = None
    rejected_mask: np.ndarray | None = None

    @property
    def scored(self) -> tuple[int, int]:
        """Scored tokens of chosen and of rejected."""
        masks = ((self.chosen, self.chosen_mask), (self.rejected, self.rejected_mask))
        chosen, rejected = (len(ids) if mask is None else int(mask.sum()) for ids, mask in masks)
        return chosen, rejected


class TokenTree(NamedTuple):
    """The tokens behind the shared prefix once for each prompt, depth first: what attention goes over where rows
    branch more than once. A token sees the tokens on its way from the root: key j is seen by the queries j <= i <
    until[j] of its prompt.

    order  (G, W) int32, which of `Batch.rest` follow one another, padded on the right
    home   (M,) int32, where in the flattened (G, W) `order` each of `rest` stands
    until  (G, W) int32, the column behind the last one that sees this one
    """

    order: mx.array
    home: mx.array
    until: mx.array


class Batch(NamedTuple):
    """Distinct tokens, the rows that index them, and the pairs that index those.

    Every row's first P tokens stand once per prompt in `prefix`. Behind it comes the row's *suffix*: the rest of its
    prompt and its completion without the last token. `rest` holds each distinct token of all suffixes once, M of
    them, without padding; `rows` lays them out. Rows of a trajectory share their tokens up to where they branch. N is
    the number of scored tokens. M, S and N are rounded up, so that few shapes occur: a step is traced once for each.

    prefix     (G, P) int32, the beginning of each prompt; P may be 0
    rest       (M,) int32, the other distinct tokens
    place      (M,) int32, how many tokens stand before each in its row
    rows       (R, S) int32, which of `rest` each row's suffix consists of, padded on the right
    home       (M,) int32, where in the flattened (R, S) rows each of `rest` stands (the first of its places)
    group      (R,) int32, the prompt of each row; the rows of a prompt are adjacent
    targets    (N,) int32, the scored tokens
    positions  (N,) int32, which of `rest` predicts each target
    owner      (N,) int32, the row of each target
    scored     (N,) float32, 1, or 0 for a target that only fills the shape
    length     (R,) float32, scored completion tokens
    ref        (R,) float32, the reference's summed completion log-probs, nats
    chosen     (B,) int32, row index of each pair's chosen completion; rejected likewise
    weight     (B,) float32, 1, or 0 for a pair that only fills the batch
    per_prompt how many rows each prompt has, 0 when they differ; static
    extras     numbers of the pairs' rows besides their texts, each field (B,) float32
    ref_shared (2, B) float32, the reference's log-probs of the first min(|chosen|, |rejected|) tokens of each pair's
               two completions, nats; None unless the objective asks (LD-DPO)
    tree       how attention goes over tokens instead of rows, where that is less; else None
    parts      the same rows in their order as several batches, which a CPU computes side by side; () where it is
               computed whole
    """

    prefix: mx.array
    rest: mx.array
    place: mx.array
    rows: mx.array
    home: mx.array
    group: mx.array
    targets: mx.array
    positions: mx.array
    owner: mx.array
    scored: mx.array
    length: mx.array
    ref: mx.array
    chosen: mx.array
    rejected: mx.array
    weight: mx.array
    per_prompt: int
    extras: Extras | None = None
    ref_shared: mx.array | None = None
    tree: TokenTree | None = None
    parts: tuple[Batch, ...] = ()

    @property
    def suffix(self) -> mx.array:
        """(R, S) int32: the token ids of each row behind the shared prefix, padded with some token."""
        return self.rest[self.rows]


class Pairs(NamedTuple):
    """What a paired objective sees: each (B,), log-probs in nats summed over the completion, lengths in tokens.

    The first six are always there; the others where data or a modifier provides them, otherwise None:

    label, weight, margin, desirable  see `Extras`
    shared    (2, B) log-probs of the first min(|chosen|, |rejected|) tokens of both completions; ref_shared likewise
    squares   (2, B) sum over each completion's tokens of log sum_v p_v^2: how concentrated the policy is (WPO)
    """

    chosen: mx.array
    rejected: mx.array
    ref_chosen: mx.array
    ref_rejected: mx.array
    chosen_len: mx.array
    rejected_len: mx.array
    label: mx.array | None = None
    weight: mx.array | None = None
    margin: mx.array | None = None
    desirable: mx.array | None = None
    shared: mx.array | None = None
    ref_shared: mx.array | None = None
    squares: mx.array | None = None


class Unpaired(NamedTuple):
    """What an unpaired objective sees: each (B,). `desirable` is 1 or 0, `kl` the log-ratio of a completion of
    another prompt (nats), of which the KL term is the mean."""

    logps: mx.array
    ref_logps: mx.array
    length: mx.array
    desirable: mx.array
    kl: mx.array


class Event(NamedTuple):
    """Something that happened in a run, yielded by the trainer; the caller decides what to do with it.

    kind is "reading" (of many rows), "start", "reference", "referenced", "resumed", "probe", "step", "eval",
    "answers", "checkpoint", "note", "interrupted" or "done". Of an "eval" `pairs` holds (N,) numbers of the N
    held-out pairs, in the data's order: `loss`, of pairs also `accuracy` (1 where chosen is ranked above rejected, 1/2
    for a tie) and `margin` (of implicit rewards).
    """

    kind: str
    step: int
    values: Mapping[str, Any]
    pairs: Mapping[str, Any] | None = None
