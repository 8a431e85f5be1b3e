"""Encoded pairs as one sequence over flat files that are mapped into memory: a million pairs cost what is looked at.

A folder holds, N pairs long and little-endian:

    tokens  int32         each pair's prompt, chosen and rejected ids, one after the other; -1 - id where not scored
    spans   (N, 6) int32  the lengths of these three, tokens, of `where`, bytes, and of the two scored parts, tokens
    where   UTF-8         where the rows stand, one after the other
    rows    (N, 2, 16)    `row_digest` of each pair's chosen and rejected row
    prompts (N, 16)       `prompt_digest` of each pair
    extras  (N, 4) float32  what each row says besides its texts (`types.Extras`)
    digest  SHA-256       over all token ids, and the extras of rows that say something, hexadecimal
    sums    JSON          SHA-256 of each of these files
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from mlxdpo.io.checksum import DamagedError, read_checksummed_json, write_checksummed_json
from mlxdpo.types import NO_EXTRAS, Example, Extras

FLUSH = 1000  # pairs in memory while writing


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """An immutable sequence of encoded pairs in flat arrays, in memory or on disk (see the top of this file).

    Lengths and digests are vectors: planning a run touches no token.
    """

    tokens: np.ndarray
    spans: np.ndarray
    where: np.ndarray
    rows: np.ndarray
    prompts: np.ndarray
    extras: np.ndarray
    digest: str

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """The same pairs in memory; as they are when they are `Examples` already."""
        if isinstance(examples, Examples):
            return examples
        files, hashed = _pack(examples)
        arrays = {name: _typed(np.frombuffer(raw, np.uint8), name) for name, raw in files.items()}
        return cls(**arrays, digest=hashlib.sha256(hashed).hexdigest())

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(N, 3) int32: tokens of prompt, chosen and rejected."""
        return np.array(self.spans[:, :3])

    @functools.cached_property
    def scored(self) -> np.ndarray:
        """(N, 2) int32: scored tokens of chosen and rejected."""
        return np.array(self.spans[:, 4:])

    @functools.cached_property
    def row_lengths(self) -> np.ndarray:
        """(N,) int32: tokens of the longer of each pair's two rows."""
        return self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1, initial=0)

    @functools.cached_property
    def row_numbers(self) -> np.ndarray:
        """(N, 2) int64: the same number for the same completion of the same prompt."""
        return _numbered(self.rows)

    @functools.cached_property
    def prompt_numbers(self) -> np.ndarray:
        """(N,) int64: the same number for the same prompt."""
        return _numbered(self.prompts)

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """(N + 1, 2) int64: where each pair begins in `tokens` and in `where`."""
        sizes = np.stack([self.spans[:, :3].sum(axis=1, dtype=np.int64), self.spans[:, 3]], axis=1)
        return np.concatenate([np.zeros((1, 2), np.int64), sizes.cumsum(axis=0)])

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        (at, name), (end, name_end) = self._starts[index], self._starts[index + 1]
        prompt, chosen, rejected, _, *scored = self.spans[index].tolist()
        ids, masks = self.tokens[at:end], (None, None)
        where = self.where[name:name_end].tobytes().decode("utf-8", "surrogatepass")
        extras = Extras(*self.extras[index].tolist())
        if [chosen, rejected] != scored:
            mask = ids >= 0
            ids, masks = np.where(mask, ids, ~ids), (mask[prompt : prompt + chosen], mask[prompt + chosen :])
        return Example(ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :], where, extras, *masks)


def largest_token(*parts: Sequence[Example]) -> int:
    """The largest token id of all pairs."""
    tokens = [Examples.of(part).tokens for part in parts]
    return max(max(int(ids.max(initial=0)), ~int(ids.min(initial=-1))) for ids in tokens)


def longest_row(*parts: Sequence[Example]) -> int:
    """Tokens of the longest row of all pairs, prompt and completion together."""
    return max(int(Examples.of(part).row_lengths.max(initial=0)) for part in parts)


def _numbered(digests: np.ndarray) -> np.ndarray:
    """(..., 16) uint8 -> (...): equal digests have equal numbers, counted from 0 in the order they appear."""
    keys = np.ascontiguousarray(digests).view("S16")[..., 0]
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number].reshape(keys.shape)


def prompt_digest(prompt: np.ndarray) -> bytes:
    """16 bytes for a prompt's token ids."""
    return hashlib.blake2b(prompt.astype("<i4").tobytes(), digest_size=16).digest()


def marked(completion: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """A completion's ids in one vector with what is scored of it: -1 - id where `mask` is False."""
    return completion if mask is None else np.where(mask, completion, ~completion)


def row_digest(prompt: np.ndarray, completion: np.ndarray, mask: np.ndarray | None = None) -> bytes:
    """16 bytes for a row: its token ids, where its completion begins, and what `mask` says is scored of it."""
    ids = np.concatenate([[len(prompt)], prompt, marked(completion, mask)]).astype("<i4")
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def write_examples(folder: Path, examples: Iterable[Example]) -> Iterator[None]:
    """Write pairs as they come, never holding more than a few; `open_examples` reads them.

    Pauses after every `FLUSH` pairs for a caller who shows how far it is, or stops it; all is written when it ends. The
    caller sees to it that `folder` is not found before that.
    """
    folder.mkdir()
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in _LAYOUT}
        sums = {name: hashlib.sha256() for name in _LAYOUT}
        for some in _flush_chunks(examples):
            parts, hashed = _pack(some)
            digest.update(hashed)
            for name, raw in parts.items():
                files[name].write(raw)
                sums[name].update(raw)
            if len(some) == FLUSH:
                yield
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    (folder / "digest").write_text(digest.hexdigest())
    told = {name: sum.hexdigest() for name, sum in sums.items()}
    write_checksummed_json(folder / "sums", told | {"digest": hashlib.sha256(digest.hexdigest().encode()).hexdigest()})


def open_examples(folder: Path) -> Examples:
    """The pairs that `writing` wrote. Raises `DamagedError` when a file is not what was written.

    Every byte is read for that once, about a second for a gigabyte: a wrong token would be trained on and not seen.
    """
    _check_sums(folder)
    arrays = {name: _typed(_mapped(folder / name), name) for name in _LAYOUT}
    return Examples(**arrays, digest=(folder / "digest").read_text())


def _check_sums(folder: Path) -> None:
    for name, then in read_checksummed_json(folder / "sums").items():
        try:
            with (folder / name).open("rb") as file:
                now = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            now = error.strerror
        if now != then:
            raise DamagedError(f"{folder}: the cached tokens are corrupted (checksum mismatch in `{name}`)")


_LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "tokens": ("<i4", (-1,)),
    "spans": ("<i4", (-1, 6)),
    "where": ("u1", (-1,)),
    "rows": ("u1", (-1, 2, 16)),
    "prompts": ("u1", (-1, 16)),
    "extras": ("<f4", (-1, 4)),
}


def _typed(raw: np.ndarray, name: str) -> np.ndarray:
    dtype, shape = _LAYOUT[name]
    return raw.view(dtype).reshape(shape)


def _mapped(file: Path) -> np.ndarray:
    if not file.stat().st_size:  # nothing cannot be mapped
        return np.zeros(0, np.uint8)
    return np.asarray(np.memmap(file, np.uint8, "r"))


def _flush_chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    left = iter(examples)
    while some := list(itertools.islice(left, FLUSH)):
        yield some


def _pack(examples: Sequence[Example]) -> tuple[dict[str, bytes], bytes]:
    """The bytes that go to each file, and what the digest goes over: every vector's ids behind their count."""
    parts = [(e.prompt, marked(e.chosen, e.chosen_mask), marked(e.rejected, e.rejected_mask)) for e in examples]
    ids = [[vector.astype("<i4").tobytes() for vector in part] for part in parts]
    where = [e.where.encode("utf-8", "surrogatepass") for e in examples]
    spans = [(*map(len, p), len(name), *e.scored) for p, name, e in zip(parts, where, examples, strict=True)]
    files = {
        "tokens": b"".join(itertools.chain.from_iterable(ids)),
        "spans": np.array(spans, "<i4").tobytes(),
        "where": b"".join(where),
        "rows": b"".join(row_digest(prompt, completion) for prompt, *both in parts for completion in both),
        "prompts": b"".join(prompt_digest(prompt) for prompt, *_ in parts),
        "extras": np.array([e.extras for e in examples], "<f4").tobytes(),
    }
    said = [b"" if e.extras == NO_EXTRAS else np.array(e.extras, "<f4").tobytes() for e in examples]
    counted = (part + ([extras] if extras else []) for part, extras in zip(ids, said, strict=True))
    return files, b"".join((len(raw) // 4).to_bytes(4, "little") + raw for part in counted for raw in part)
