"""One process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mlxdpo.types import UserError


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
