"""One thread owns MLX: it loads, answers and scores; whoever wants something sends a task and reads what comes back.

MLX's streams belong to a thread, and an array that is not computed yet cannot be computed by another one, while Gradio
runs handlers in a pool. Tasks are generators: the thread gives each one step in turn, so two users' answers grow side
by side and a long answer holds nobody up. `AppState` is what the tabs of a process share: the folder of runs, this
thread with what is loaded on it, who asked to stop.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlxdpo.inference.run_prompts import Gallery, gallery
from mlxdpo.ui.runs.run_list import run_named, tuned_runs_in
from mlxdpo.ui.variants import LoadedVariants, RunVariants, Variant

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


NOBODY, CHECKPOINT, OTHER = "none", "checkpoint: ", "run: "


@dataclass
class AppState:
    """One per process. `first` is the run that the page opens with."""

    runs: Path
    first: str | None = None
    engine: Engine = field(default_factory=Engine)
    variants: LoadedVariants = field(default_factory=LoadedVariants)
    stops: dict[str, threading.Event] = field(default_factory=dict)
    galleries: dict[str, Gallery] = field(default_factory=dict)

    def load(self, name: str | None) -> RunVariants:
        """The variants of a run, loaded when first asked for. Raises `UserError` for one that cannot answer."""
        run = run_named(self.runs, name)
        return self.engine.call(lambda: self.variants.load(run))

    def warm(self) -> None:
        """Load the run the page opens with, before anybody asks; what goes wrong is said to whoever asks."""
        for name in self.names()[:1]:
            run = run_named(self.runs, name)
            self.engine.begin(lambda run=run: iter((self.variants.load(run),)))

    def at_strength(self, loaded: RunVariants, strength: float) -> RunVariants:
        """A run's variants with the tuned one at a strength."""
        return loaded._replace(after=self.engine.call(lambda: self.variants.at_strength(loaded, strength)))

    def third(self, loaded: RunVariants, choice: str) -> Variant | None:
        """The variant of the third column, chosen from `thirds`."""
        if choice.startswith(CHECKPOINT):
            return self.engine.call(lambda: self.variants.checkpoint(loaded, choice.removeprefix(CHECKPOINT)))
        if choice.startswith(OTHER):
            other = run_named(self.runs, choice.removeprefix(OTHER))
            return self.engine.call(lambda: self.variants.other_run(loaded, other))
        return None

    def gallery(self, name: str) -> Gallery:
        """The prompts of a run."""
        if name not in self.galleries:
            self.galleries[name] = gallery(run_named(self.runs, name))
        return self.galleries[name]

    def names(self) -> list[str]:
        """The runs that can answer; the one the page opens with first."""
        found = list(tuned_runs_in(self.runs))
        return sorted(found, key=lambda name: name != self.first)

    def thirds(self, name: str | None) -> list[str]:
        """Who could answer in the third column beside a run."""
        from mlxdpo.training import checkpoint

        others = [other for other in self.names() if other != name]
        kept = checkpoint.steps(run_named(self.runs, name).checkpoints) if name else []
        return [NOBODY, *(CHECKPOINT + folder.name for folder in reversed(kept)), *(OTHER + other for other in others)]

    @contextmanager
    def stoppable(self, session: str) -> Iterator[threading.Event]:
        """An event that `stop(session)` sets while the context lasts."""
        event = self.stops[session] = threading.Event()
        try:
            yield event
        finally:
            if self.stops.get(session) is event:
                del self.stops[session]

    def stop(self, session: str) -> bool:
        """Stop what a session has under way; whether there was something."""
        event = self.stops.get(session)
        if event is not None:
            event.set()
        return event is not None
