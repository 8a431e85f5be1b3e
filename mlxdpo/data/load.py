"""From a recipe's `data` section to encoded training and held-out pairs, with everything that happened to the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode_all, template_digest
from mlxdpo.data.read import heldout_source, prompts_in_both, read_pairs, split_heldout
from mlxdpo.data.report import Report
from mlxdpo.types import Example, Preference, UserError


@dataclass(frozen=True)
class Dataset:
    """Encoded pairs of a run and the reports on how they came about. `template` is the digest of what wrote them."""

    train: list[Example]
    heldout: list[Example]
    reports: dict[str, Report]
    overlap: int
    template: str

    @property
    def digest(self) -> str:
        """SHA-256 over every token id, in order, training and held-out."""
        parts = [digest_examples(self.train), digest_examples(self.heldout)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


class Split(NamedTuple):
    """Rows read, not yet encoded."""

    train: list[Preference]
    heldout: list[Preference]
    reports: dict[str, Report]


def digest_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids of pairs, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, example.chosen, example.rejected):
            digest.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    return digest.hexdigest()


def token_counts(examples: Sequence[Example]) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) lengths of each pair, tokens."""
    return [(len(e.prompt), len(e.chosen), len(e.rejected)) for e in examples]


def read_split(data: DataConfig, seed: int) -> Split:
    """Training and held-out rows, no prompt in both unless the user named both sets.

    Raises `UserError` when there are none or they are not pairs.
    """
    if not data.path:
        raise UserError("no data given; pass --data with a file, a folder, or a Hub dataset id")
    rows, report = read_pairs(data)
    reports = {"data": report}
    if (source := heldout_source(data)) is None:
        train, heldout = split_heldout(rows, data.eval_fraction, seed)
    else:
        train = rows
        heldout, reports["held-out data"] = read_pairs(data, *source)
    return Split(train, heldout, reports)


def encode_split(split: Split, data: DataConfig, tokenizer: Any, eos_ids: frozenset[int]) -> Dataset:
    """Encode what `read_split` read. Raises `UserError` when no training pair is left."""
    train_rows, heldout_rows, reports = split.train, split.heldout, dict(split.reports)
    train, reports["encoding"] = encode_all(train_rows, tokenizer, data, eos_ids=eos_ids)
    heldout, reports["held-out encoding"] = encode_all(heldout_rows, tokenizer, data, eos_ids=eos_ids)
    if not train:
        why = "; ".join(line for report in reports.values() for line in report.lines()) or "all were held out"
        raise UserError(f"{data.path}: no pair is left to train on ({why}); see `mlxdpo data check {data.path}`")
    overlap = prompts_in_both(train_rows, heldout_rows)
    return Dataset(train, heldout, reports, overlap, template_digest(tokenizer, data))
