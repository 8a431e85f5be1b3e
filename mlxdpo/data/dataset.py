"""From a recipe's `data` section to encoded training and held-out pairs, with everything that happened to the rows.

Rows stream: source → `Spool` → tokens in flat files (`examples.py`), which are cached by content (`cache.py`), so that
a second start opens them and reads nothing. All rows or all tokens are never in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlxdpo.config import DataConfig
from mlxdpo.data.cache import STAGING, Spool, encoding_key, pairs_folder, publish_dataset, source_key
from mlxdpo.data.encode import encode_stream
from mlxdpo.data.examples import Examples, open_examples, write_examples
from mlxdpo.data.read import heldout_prompts, heldout_source, stream_rows
from mlxdpo.data.report import Report
from mlxdpo.data.template import Writer, probe, template_digest
from mlxdpo.data.transforms import PAIRS, Transform
from mlxdpo.io.atomic import write_text
from mlxdpo.io.checksum import read_checksummed_json, with_checksum
from mlxdpo.io.staging import staging_folder
from mlxdpo.machine.device import cache_folder
from mlxdpo.types import Example, UserError

ELSEWHERE = 100  # training rows at hand while held-out ones are laid out
Made = TypeVar("Made")


@dataclass(frozen=True)
class Dataset:
    """Encoded pairs of a run and the reports on how they came about. `template` is the digest of what wrote them."""

    train: Examples
    heldout: Examples
    reports: dict[str, Report]
    overlap: int
    template: str

    @property
    def digest(self) -> str:
        """SHA-256 over every token id, in order, training and held-out."""
        return hashlib.sha256(f"{self.train.digest} {self.heldout.digest}".encode()).hexdigest()


class Clean(NamedTuple):
    """Rows that were read and cleaned, not yet encoded; `heldout` where the recipe names a set of them."""

    rows: Spool
    heldout: Spool | None
    reports: dict[str, Report]


class Split(NamedTuple):
    """The rows of a recipe. `clean` is None where they were read before: pairs made of them are kept under `key`."""

    key: str | None
    seed: int
    clean: Clean | None
    take: Transform


class Sofar(NamedTuple):
    """How far it is: "reading" or "encoding", rows done, of how many (None: nobody knows before the last one)."""

    doing: str
    done: int
    total: int | None


def token_counts(examples: Sequence[Example]) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) lengths of each pair, tokens."""
    return [(len(e.prompt), len(e.chosen), len(e.rejected)) for e in examples]


def ended(steps: Generator[Any, None, Made]) -> Made:
    """What `steps` returns in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def read_split(data: DataConfig, seed: int, take: Transform = PAIRS) -> Split:
    """Read and clean training and held-out rows and `take` what the stage needs of them, unless it was encoded before.

    Raises `UserError` when there are none, or not of the kind that is needed.
    """
    return ended(reading(data, seed, take))


def reading(data: DataConfig, seed: int, take: Transform) -> Generator[Sofar, None, Split]:
    """`read_split`, saying now and then how far it is."""
    if not data.path:
        raise UserError("no data given; pass --data with a file, a folder, or a Hub dataset id")
    key = _split_key(data, seed, take)
    known = key is not None and (pairs_folder() / key).exists()
    return Split(key, seed, None if known else (yield from _read_parts(data, take)), take)


def _split_key(data: DataConfig, seed: int, take: Transform) -> str | None:
    source = source_key(data, seed)
    return source if source is None or take is PAIRS else f"{source}-{take.name}"


def _read_parts(data: DataConfig, take: Transform) -> Generator[Sofar, None, Clean]:
    source, reports, spools = heldout_source(data), {}, []
    for name, place in (("data", ()), ("held-out data", source)):
        if place is None:
            continue
        rows, reports[name] = stream_rows(data, take.rows, *place)
        spools.append(Spool(cache_folder()))
        for _ in spools[-1].filling(rows):
            yield Sofar("reading", sum(spool.count for spool in spools), None)
    return Clean(spools[0], None if source is None else spools[1], reports)


def encode_split(split: Split, data: DataConfig, tokenizer: Any, eos_ids: frozenset[int]) -> Dataset:
    """Encode what `read_split` read, or open what is kept of it. No prompt is in both parts unless the user named both.

    Raises `UserError` when no training pair is left.
    """
    return ended(encoding(split, data, tokenizer, eos_ids))


def encoding(
    split: Split, data: DataConfig, tokenizer: Any, eos_ids: frozenset[int]
) -> Generator[Sofar, None, Dataset]:
    """`encode_split`, saying now and then how far it is. Closed before its end it leaves nothing behind."""
    template, writer = template_digest(tokenizer, data), probe(tokenizer, data, eos_ids)
    target = None if split.key is None else pairs_folder() / split.key / encoding_key(template, writer)
    if target and target.exists():
        return _open_dataset(target, template)
    clean = split.clean or (yield from _read_parts(data, split.take))
    with staging_folder(pairs_folder(), STAGING) as folder:
        yield from _write_dataset(folder, clean, split, data, writer)
        # A source that changed while it was read is not kept under the name it had.
        if target is None or _split_key(data, split.seed, split.take) != split.key:
            return _open_dataset(folder, template)  # files that are mapped outlive their names
        publish_dataset(folder, target)
    return _open_dataset(target, template)


def _write_dataset(folder: Path, clean: Clean, split: Split, data: DataConfig, writer: Writer) -> Iterator[Sofar]:
    total = clean.rows.count + (0 if clean.heldout is None else clean.heldout.count)
    reports = {**clean.reports, "encoding": Report(), "held-out encoding": Report()}
    if clean.heldout is None:
        held = heldout_prompts(clean.rows.prompts, data.eval_fraction, split.seed)
        train, heldout = clean.rows.rows(lambda key: key not in held), clean.rows.rows(held.__contains__)
    else:
        train, heldout = clean.rows.rows(), clean.heldout.rows()
    for name, rows, report in (("train", train, "encoding"), ("heldout", heldout, "held-out encoding")):
        encoded = encode_stream(rows, writer, data, reports[report])
        others = open_examples(folder / "train")[:ELSEWHERE] if name == "heldout" else []
        for _ in write_examples(folder / name, split.take.lay_out(encoded, data, reports[report], others)):
            yield Sofar("encoding", reports["encoding"].read + reports["held-out encoding"].read, total)
    if not reports["encoding"].kept:
        why = "; ".join(line for report in reports.values() for line in report.lines()) or "all were held out"
        raise UserError(f"{data.path}: no pair is left to train on ({why}); see `mlxdpo data check {data.path}`")
    overlap = 0 if clean.heldout is None else len(clean.rows.prompts & clean.heldout.prompts)
    told = {"overlap": overlap, "reports": {name: asdict(report) for name, report in reports.items()}}
    write_text(folder / "told.json", json.dumps(with_checksum(told)))  # escaped: a row's name may hold half a character


def _open_dataset(folder: Path, template: str) -> Dataset:
    try:
        told = read_checksummed_json(folder / "told.json")
        train, heldout = open_examples(folder / "train"), open_examples(folder / "heldout")
    except UserError as error:
        raise UserError(f"{error}; delete {folder}, and the data are read again") from None
    reports = {name: Report(**report) for name, report in told["reports"].items()}
    return Dataset(train, heldout, reports, told["overlap"], template)
