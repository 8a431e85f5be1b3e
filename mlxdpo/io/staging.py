"""Folders that are whole or absent: written aside under a hidden name, then renamed; and one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mlxdpo.io.atomic import new_folder, sync_folder
from mlxdpo.types import UserError

RANDOM = "?" * 8  # what `new_folder` appends


@contextlib.contextmanager
def staging_folder(parent: Path, prefix: str, rescue: Callable[[Path], None] = lambda folder: None) -> Iterator[Path]:
    """A new folder below `parent`, removed afterwards unless it was renamed; those of killed processes go first.

    A folder in use is known by its lock, which the kernel drops when its process ends, however it ends. `rescue` gets
    each folder of a killed process before it is removed.
    """
    parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_folder(parent, fcntl.LOCK_EX)  # so that nobody sweeps a folder between its birth and its lock
    try:
        _sweep_staging(parent, prefix, rescue)
        folder = new_folder(parent, prefix)
        own = _lock_folder(folder, fcntl.LOCK_EX)
    finally:
        os.close(lock)
    try:
        yield folder
    finally:
        os.close(own)
        shutil.rmtree(folder, ignore_errors=True)


def publish_folder(folder: Path, target: Path) -> None:
    """Rename a complete staging folder to `target`. Raises `OSError` where another folder with content is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, target)
    sync_folder(target.parent)


def publish_new(folder: Path, target: Path) -> None:
    """`publish_folder` for a target that the user named. Raises `UserError` where something is there by now."""
    try:
        publish_folder(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(f"{target} was just created by another process; choose another --out") from None


def _sweep_staging(parent: Path, prefix: str, rescue: Callable[[Path], None]) -> None:
    for folder in parent.glob(glob.escape(prefix) + RANDOM):
        try:
            lock = _lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use, or just gone
            continue
        rescue(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _lock_folder(folder: Path, how: int) -> int:
    """A descriptor that holds the lock until it is closed. `filelock` locks files only."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
    except OSError:
        os.close(handle)
        raise
    return handle


@contextlib.contextmanager
def single_process(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file `lock` while the context lasts; the system lets go when the process ends, however it ends.

    The file stays. Raises `UserError` with the words `refusal` where another process holds it.
    """
    own = FileLock(lock, thread_local=False)
    try:
        own.acquire(blocking=False)
    except Timeout:
        raise UserError(refusal) from None
    try:
        yield
    finally:
        own.release()
