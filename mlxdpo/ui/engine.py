"""One thread owns MLX: it loads, answers and scores; whoever wants something sends a task and reads what comes back.

MLX's streams belong to a thread, and an array that is not computed yet cannot be computed by another one, while Gradio
runs handlers in a pool. Tasks are generators: the thread gives each one step in turn, so two users' answers grow side
by side and a long answer holds nobody up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
Task = Callable[[], Iterator[Any]]


@dataclass
class _Task:
    task: Task
    out: queue.SimpleQueue[tuple[str, Any]] = field(default_factory=queue.SimpleQueue)
    dropped: threading.Event = field(default_factory=threading.Event)
    running: Iterator[Any] | None = None


class Engine:
    """The thread. It ends with the process."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="mlx", daemon=True).start()

    def stream(self, task: Task) -> Iterator[Any]:
        """What the task yields, as it comes. Leaving early ends the task; its errors are raised here."""
        with self._begun(task) as out:
            while True:
                kind, value = out.get()
                if kind == "error":
                    raise value
                if kind == "end":
                    return
                yield value

    def latest(self, task: Task, seconds: float) -> Iterator[Any]:
        """`stream`, at most one value in so many seconds: the newest of those that have come, and always the last."""
        with self._begun(task) as out:
            yield from _latest(out, seconds)

    @contextmanager
    def _begun(self, task: Task) -> Iterator[queue.SimpleQueue[tuple[str, Any]]]:
        """What the task puts out; leaving the context ends it."""
        job = _Task(task)
        self._inbox.put(job)
        try:
            yield job.out
        finally:
            job.dropped.set()

    def call(self, function: Callable[[], T]) -> T:
        """The value of a function, computed on the thread."""

        def task() -> Iterator[T]:
            """The one value."""
            yield function()

        return next(iter(list(self.stream(task))))

    def begin(self, task: Task) -> None:
        """Start a task whose values nobody reads."""
        self._inbox.put(_Task(task))

    def _work(self) -> None:
        jobs: list[_Task] = []
        while True:
            while not jobs or not self._inbox.empty():
                jobs.append(self._inbox.get())
            jobs = [job for job in jobs if _run_one_step(job)]


def _run_one_step(job: _Task) -> bool:
    """One step of a job; whether it has more."""
    if job.running is None:
        job.running = iter(job.task())
    try:
        if job.dropped.is_set():
            job.running.close()  # type: ignore[attr-defined]
            return False
        job.out.put(("value", next(job.running)))
        return True
    except StopIteration:
        job.out.put(("end", None))
    except Exception as error:  # whatever went wrong belongs to who asked; the thread must live on
        job.out.put(("error", error))
    return False


def _latest(out: queue.SimpleQueue[tuple[str, Any]], seconds: float) -> Iterator[Any]:
    shown, kind = 0.0, "value"
    waiting: list[Any] = []
    while kind == "value":
        kind, value = _get(out, max(0.0, shown + seconds - time.monotonic()) if waiting else None)
        if kind == "error":
            raise value
        if kind == "value":
            waiting = [value]
        kind = "value" if kind == "nothing" else kind
        if waiting and (kind == "end" or time.monotonic() >= shown + seconds):
            yield waiting.pop()
            shown = time.monotonic()


def _get(out: queue.SimpleQueue[tuple[str, Any]], timeout: float | None) -> tuple[str, Any]:
    try:
        return out.get(timeout=timeout)
    except queue.Empty:
        return "nothing", None
