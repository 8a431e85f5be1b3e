"""From a recipe's `data` section to encoded training and held-out pairs, with everything that happened to the rows.

Rows stream: source → `Spool` → tokens in flat files (`examples.py`), which are cached by content, so that a second
start opens them and reads nothing: cache/pairs/<sources and settings>/<tokenizer and template>/ appears under its name
when it is complete. All rows or all tokens are never in memory.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode_stream
from mlxdpo.data.examples import Examples, open_examples, write_examples
from mlxdpo.data.read import heldout_prompts, heldout_source, prompt_key, stream_rows
from mlxdpo.data.report import Report
from mlxdpo.data.sources import fingerprint
from mlxdpo.data.template import Writer, probe, template_digest
from mlxdpo.data.transforms import PAIRS, Transform
from mlxdpo.io.atomic import naming, write_text
from mlxdpo.io.checksum import read_checksummed_json, with_checksum
from mlxdpo.io.digest import json_digest
from mlxdpo.io.staging import publish_folder, staging_folder
from mlxdpo.machine.device import cache_folder, version_of
from mlxdpo.types import Example, Extras, Message, Preference, Text, UnpairedExample, UserError

# Clean rows between reading and encoding, in a nameless temporary file.
#
# Which rows are held out is known after the last one, and token ids are known after the model is loaded; so the rows
# wait on disk, and a source is read once (a pipe, or a Hub data set that streams, cannot be read twice).

PORTION = 1000
KINDS = {kind.__name__: kind for kind in (Preference, UnpairedExample)}
FIELDS = {
    "Preference": ("prompt", "chosen", "rejected", "where", "tools", "extras", "context"),
    "UnpairedExample": ("prompt", "completion", "desirable", "where", "tools", "extras", "context"),
}


class Spool:
    """Rows that can be walked through again and again, without their other columns.

    `prompts` are the distinct `prompt_key`s: 16 bytes each, all that stays in memory. `count` is the number of rows.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)  # not the system's /tmp: that may be memory
        self._folder = folder
        with naming(folder):
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the object lives)
        self.prompts: set[bytes] = set()
        self.count = 0

    def filling(self, rows: Iterable[Preference | UnpairedExample]) -> Iterator[None]:
        """Take up rows, pausing after every `PORTION` for a caller who shows how far it is, or stops it."""
        for row in rows:
            key = prompt_key(row.prompt)
            self.prompts.add(key)
            kind = type(row).__name__
            line = [key.hex(), kind, *(getattr(row, name) for name in FIELDS[kind])]
            # What JSON has no form of (a date out of Parquet in a tool call) becomes the text a template would write.
            with naming(self._folder):
                self._file.write(json.dumps(line, default=str).encode() + b"\n")
            self.count += 1
            if self.count % PORTION == 0:
                yield

    def rows(self, wanted: Callable[[bytes], bool] = lambda key: True) -> Iterator[Preference | UnpairedExample]:
        """The rows whose prompt's key is wanted, in order."""
        with naming(self._folder):  # what is still to be written is written now
            self._file.seek(0)
        for line in self._file:
            key, kind, *fields = json.loads(line)
            if wanted(bytes.fromhex(key)):
                yield KINDS[kind](
                    **{name: _back(name, value) for name, value in zip(FIELDS[kind], fields, strict=True)}
                )


def _back(name: str, value: Any) -> Any:
    """A field out of JSON, which knows lists alone."""
    if name in ("prompt", "chosen", "rejected", "completion"):
        return _key_text(value)
    return {"tools": tuple, "extras": lambda numbers: Extras(*numbers)}.get(name, lambda same: same)(value)


def _key_text(value: Any) -> Text:
    return value if isinstance(value, str) else tuple(Message(*turn) for turn in value)


LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


def source_key(data: DataConfig, seed: int) -> str | None:
    """A name for the rows that `data` gives: its sources' contents, all settings that change a token, the code.

    None where a source's content cannot be named before it is read (a pipe; the Hub when it does not answer): such
    a data set is read again at every start. The seed counts only where it draws the held-out prompts.
    """
    named = heldout_source(data)
    sources = [fingerprint(data.path, data.split), [] if named is None else fingerprint(*named)]
    if None in sources:
        return None
    libraries = {name: version_of(name) for name in LIBRARIES}
    drawn = named is None and data.eval_fraction > 0
    # A day changes tokens only where a template asks for it, and is in the template's digest then.
    settings = data.model_dump(mode="json", exclude={"path", "eval", "group", "date"})
    return json_digest([sources, settings, seed if drawn else None, _code_digest(), libraries])[:32]


def encoding_key(template: str, writer: Writer) -> str:
    """A name for what turns text into ids: the template's digest and the tokens that end a completion."""
    return json_digest([template, sorted(writer.ends), writer.eos])[:32]


STAGING = ".draft-"  # in front of the names of folders that are not complete


def pairs_folder() -> Path:
    """Where encoded data sets are kept."""
    return cache_folder() / "pairs"


def publish_dataset(path: Path, target: Path) -> None:
    """Give a complete draft its name; where another process was first, its equal stays."""
    try:
        publish_folder(path, target)
    except OSError:
        if not target.exists():
            raise


@functools.cache
def _code_digest() -> str:
    """Digest of this room's own source: changed code cannot find what the old code made."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


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
        raise UserError(f"{data.path}: no pairs left to train on ({why}); see `mlxdpo data check {data.path}`")
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
