"""Ctrl-C, SIGTERM and a closed terminal ask a long job to stop at a safe place; a second one stops it at once."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
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
