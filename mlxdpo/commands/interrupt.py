"""Ctrl-C, SIGTERM and a closed terminal ask a long job to stop at a safe place; a second one stops it at once.

And what stops a command though its input is right (a full disk, a folder that is read only, memory), in one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import signal
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlxdpo.machine.device import cache_folder


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


def error_message(error: BaseException, words: Sequence[str] = ()) -> str | None:
    """The sentence, with the next step; None for everything else, which is a fault of the program.

    `words` are the command line: what goes on depends on the command, and not on whose file it was.
    """
    if isinstance(error, OSError) and error.errno in REMEDIES:
        # Of two files (a copy), the second is the one that was written.
        file = error.filename2 or error.filename
        where = "standard output" if file is None else STAGED.sub(r"\1", os.fsdecode(file))
        elsewhere = f", or set MLXDPO_CACHE to another folder ({cache_folder()} now)" if _in_cache(file) else ""
        return f"{where}: {error.strerror}; {REMEDIES[error.errno]}{elsewhere}{_then(file, words)}"
    short = isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)
    if short or isinstance(error, MemoryError):
        detail = " ".join(str(error).split()) or "Python could not allocate"
        return (
            f"not enough memory ({detail}); close some programs, lower train.batch_size or data.max_length, or set "
            f"train.gradient_checkpointing true (mlxdpo plan tells what a run needs){_then(None, words)}"
        )
    return None


STAGED = re.compile(r"\.([^/]+)-draft-[^/]{8}(?=/|$)")
"""A folder that is renamed when it is complete: what is said names it as the user did."""


def _in_cache(file: str | bytes | None) -> bool:
    return file is not None and Path(os.fsdecode(file)).is_relative_to(cache_folder())


def _then(file: str | bytes | None, words: Sequence[str]) -> str:
    """The command that goes on: a training's own, where it has begun a run; else the same one again."""
    if words[:1] != ["train"]:
        return f", then run it again: {shlex.join(['mlxdpo', *words])}" if words else ""
    given = [value for name, _, value in _given_options(words) if name in ("--out", "--resume")]
    folders = [*map(Path, given), *([] if file is None else Path(os.fsdecode(file)).parents)]
    run = next((folder for folder in folders if (folder / "config.yaml").exists()), None)
    if run is None:
        return f", then run it again: {shlex.join(['mlxdpo', *words])}"
    return f", then go on from the last checkpoint with: {shlex.join(['mlxdpo', 'train', '--resume', str(run)])}"


def _given_options(words: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Options with their values, as --name value or --name=value."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        yield word.partition("=") if "=" in word else (word, "=", following)
