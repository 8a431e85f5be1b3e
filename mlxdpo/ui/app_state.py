"""What the tabs of a process share: the folder of runs, the MLX thread with what is loaded on it, who asked to stop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mlxdpo.inference.run_prompts import Gallery, gallery
from mlxdpo.ui.engine import Engine
from mlxdpo.ui.runs.run_list import run_named, tuned_runs_in
from mlxdpo.ui.variants import LoadedVariants, RunVariants, Variant

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
