"""Files that are whole or absent: written aside, flushed to the disk, renamed; lines appended in one piece."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
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
    handle, temporary = _new_draft(path)
    os.close(handle)
    try:
        with asking_why(temporary):
            write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _new_draft(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open for writing, with the rights that the umask leaves (tempfile's has others)."""
    while True:
        # The suffix stays last: mx.save_safetensors appends one that is missing.
        draft = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
        try:
            return os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), draft
        except FileExistsError:
            continue


def new_folder(parent: Path, prefix: str) -> Path:
    """A new folder below `parent`, `prefix` and eight signs, with the rights that the user's umask leaves."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


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
    handle, draft = _new_draft(path)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
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
    """Append one JSON line in a single write, flushed to disk; what a killed writer left of a last line is cut off.

    Raises `OSError` naming `path` when the line is not on the disk.
    """
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with naming(path):
        _finish_last_line(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if (done := os.write(handle, line)) < len(line):  # a disk that fills up takes a part, and says nothing
                os.write(handle, line[done:])
            os.fsync(handle)
        finally:
            os.close(handle)


def _finish_last_line(path: Path) -> None:
    """A last line without its newline gets one where it is whole (an editor left it out), and goes where it is torn."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        kept = file.read()
        start = kept.rfind(b"\n") + 1
        if is_object(kept[start:]):
            file.write(b"\n")
        else:
            file.truncate(start)


def is_object(line: bytes) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
