"""Files that are whole or absent: written aside, flushed to the disk, renamed; lines appended in one piece."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # what is the disk's doing, whatever was under way
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what a file system without hard links says (exFAT)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it over `path`.

    A reader sees the old file or the new one, never a part, whenever the process or the machine stops.
    Raises `OSError` naming `path` where it cannot be written (a full disk, a folder that is read only).
    """
    with naming(path):
        _write_atomic(path, write)


def _write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: mx.save_safetensors appends one that is missing.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with asking_why(temporary):
            write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def asking_why(place: Path) -> Iterator[None]:
    """MLX says that it could not write and not why: the system says so when asked for a little more, in the file or
    folder `place`."""
    try:
        yield
    except RuntimeError as error:
        if "[write]" in str(error):
            file = place / ".more" if place.is_dir() else place
            try:
                with file.open("ab", buffering=0) as more:
                    more.write(bytes(1 << 20))
                    os.fsync(more.fileno())
            except OSError as why:
                raise OSError(why.errno, why.strerror, str(place)) from error
            finally:
                if place.is_dir():
                    file.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of the system names `path`, and not a draft of it or nothing at all."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write text atomically, UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_text(text, "utf-8"))  # type: ignore[arg-type,return-value]


def write_first(path: Path, text: str) -> None:
    """Write text whole where nothing is yet. Raises `FileExistsError` when another process was first."""
    with naming(path):
        _write_first(path, text)


def _write_first(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o644)
        _link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _link(draft: Path, path: Path) -> None:
    try:
        os.link(draft, path)  # renaming would replace what is there
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists", str(path)) from None
        os.rename(draft, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, so that every reader can parse it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write, flushed to disk; an unfinished last line is cut off first.

    Raises `OSError` naming `path` when the line is not on the disk.
    """
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with naming(path):
        _cut_torn_line(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if (done := os.write(handle, line)) < len(line):  # a disk that fills up takes a part, and says nothing
                os.write(handle, line[done:])
            os.fsync(handle)
        finally:
            os.close(handle)


def _cut_torn_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
