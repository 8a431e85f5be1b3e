"""Files from a repository that a stranger may have written: names and bytes are checked before anything uses them.

Names come from a server, so one that leaves its folder condemns the whole listing; only names on our own list are asked
for; every file is held against the digest in the listing; weights are safetensors with a sane header, never pickles.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlxdpo.exporters.client import About, Say, ask
from mlxdpo.io.names import is_plain_name
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HEADER_LIMIT = 100_000_000  # bytes; what safetensors' own reader allows
LONGEST_PATH = 1024  # bytes of a name with its folders
SIDE_LIMIT = 64 * 2**20  # bytes of anything that is not weights


class Entry(NamedTuple):
    """A file in a listing: its name, size in bytes, and the digest that its bytes must have.

    `sha256` is known for large files; others have `blob`, git's id: SHA-1 over "blob <size>\\0" and the bytes.
    """

    name: str
    size: int
    blob: str
    sha256: str | None


class Listing(NamedTuple):
    """The files of one commit of a repository."""

    repo: str
    commit: str
    entries: dict[str, Entry]


def list_repository(api: HfApi, repo: str, revision: str | None, say: Say) -> Listing:
    """The files of `revision`. Raises `UserError` for a name that leaves its folder, and whatever the Hub refuses."""

    def request() -> Listing:
        """The commit first, then its files, so that both are of one moment."""
        commit = api.repo_info(repo, revision=revision).sha
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError("the commit has no id")
        found = [_entry(file) for file in api.list_repo_tree(repo, recursive=True, revision=commit) if _is_file(file)]
        return Listing(repo, commit, {entry.name: entry for entry in found})

    listing = ask(About(repo, "listing its files", revision), request, say)
    for name in listing.entries:
        check_name(name, repo)
    return listing


def _is_file(file: Any) -> bool:
    from huggingface_hub import RepoFile

    return isinstance(file, RepoFile)


def _entry(file: Any) -> Entry:
    sha256 = None if file.lfs is None else file.lfs.sha256
    if not (isinstance(file.path, str) and isinstance(file.size, int) and isinstance(file.blob_id, str)):
        raise ValueError("a file has no name, size or digest")
    return Entry(file.path, file.size, file.blob_id, sha256)


def check_name(name: str, repo: str) -> None:
    """Raise `UserError` unless `name` stays below the folder that it is written into, on every system."""
    if not all(map(is_plain_name, name.split("/"))) or len(name.encode()) > LONGEST_PATH:
        shown = repr(name if len(name) <= 80 else f"{name[:80]}…")
        raise UserError(
            f"{repo} lists a file named {shown}, which leaves its folder or is no name on some system; "
            "nothing was taken from it"
        )


def download(api: HfApi, listing: Listing, names: Sequence[str], folder: Path, say: Say) -> None:
    """Bring `names` into `folder` under the same names, byte for byte what the listing says.

    Raises `UserError` for a file that is too large for its kind, arrives changed, or is no safetensors file.
    """
    from huggingface_hub import hf_hub_download

    for name in names:
        entry = listing.entries[name]
        if entry.size > SIDE_LIMIT and not name.endswith(".safetensors"):
            raise UserError(f"{listing.repo}: {name} has {entry.size / 1e6:.0f} MB, too many for a settings file")

        def request(name: str = name) -> str:
            """Where the client put the file."""
            return hf_hub_download(listing.repo, name, revision=listing.commit, endpoint=api.endpoint)

        source = Path(ask(About(listing.repo, f"downloading {name}"), request, say))
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        check_bytes(target, entry, listing.repo)
        if name.endswith(".safetensors"):
            check_safetensors(target, f"{listing.repo}: {name}")


def check_bytes(file: Path, entry: Entry, repo: str) -> None:
    """Raise `UserError` unless the file has the size and the digest of the listing."""
    digest = hashlib.sha256() if entry.sha256 else hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    if file.stat().st_size != entry.size or digest.hexdigest() != (entry.sha256 or entry.blob):
        raise UserError(f"{repo}: {entry.name} arrived with other bytes than the repository lists; pull it again")


def check_safetensors(file: Path, name: str) -> None:
    """Raise `UserError` unless the file is laid out as safetensors: 8 bytes of length, a JSON header, the arrays."""
    size = file.stat().st_size
    with file.open("rb") as content:
        first = content.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else HEADER_LIMIT + 1
        header = content.read(length) if length <= min(HEADER_LIMIT, size - 8) else b""
    try:
        arrays = {key: value for key, value in json.loads(header.decode("utf-8")).items() if key != "__metadata__"}
        inside = all(0 <= a["data_offsets"][0] <= a["data_offsets"][1] <= size - 8 - length for a in arrays.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        inside = False
    if not inside:
        raise UserError(f"{name} is not a safetensors file; mlxdpo reads no other weights")
