"""Ctrl-C, SIGTERM and a closed terminal ask a long job to stop at a safe place; a second one stops it at once.

And what stops a command though its input is right (a full disk, a folder that is read only, memory), in one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """A function that says whether the user asked to stop while the context lasts."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: Any) -> None:
        """A signal has come."""
        if number == signal.SIGHUP:
            _let_go_of_the_terminal()
        elif asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    wanted = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under `nohup` it stays ignored
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in wanted}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def outliving_the_terminal() -> Iterator[None]:
    """What is shown in here may fail because the terminal was closed a moment ago: the signal that says so is on its
    way, and the job stops by that, not by a line that nobody can read."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO or not any(map(_is_terminal, (1, 2))):
            raise
        _let_go_of_the_terminal()


def _let_go_of_the_terminal() -> None:
    """After a hangup every write to the terminal fails, and would stop the job before it has saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in filter(_is_terminal, (1, 2)):
        os.dup2(nowhere, number)
    os.close(nowhere)


def _is_terminal(number: int) -> bool:
    """`os.isatty` says no once it has been hung up."""
    try:
        return stat.S_ISCHR(os.fstat(number).st_mode)
    except OSError:  # closed
        return True


REMEDIES = {
    errno.ENOSPC: "free some space on this disk",
    errno.EDQUOT: "free some of your quota on this disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may write",
    errno.EPERM: "choose a folder that you may write",
    errno.EIO: "look at the disk, or at the terminal if it was closed",
    errno.EPIPE: "keep what reads the output open",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "close some programs, or lower train.batch_size",
}
NO_MEMORY = ("malloc", "allocate", "Insufficient Memory")  # what MLX says: it has one kind of error for everything


def error_message(error: BaseException) -> str | None:
    """The sentence, with the next step; None for everything else, which is a fault of the program."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = "standard output" if error.filename is None else str(error.filename)
        return f"{where}: {error.strerror}; {REMEDIES[error.errno]}{_then(error.filename)}"
    short = isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)
    if short or isinstance(error, MemoryError):
        detail = " ".join(str(error).split()) or "Python could not allocate"
        return (
            f"not enough memory ({detail}); close some programs, lower train.batch_size or data.max_length, or set "
            f"train.gradient_checkpointing true (mlxdpo plan tells what a run needs){_then(None)}"
        )
    return None


def _then(file: str | bytes | None) -> str:
    """How to go on: the run directory that a file belongs to is named."""
    parents = [] if file is None else Path(str(file)).parents
    run = next((folder for folder in parents if (folder / "config.yaml").exists()), None)
    return "" if run is None else f", then go on from the last checkpoint with: mlxdpo train --resume {run}"
