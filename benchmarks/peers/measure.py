"""One workload on several sides at once: all loaded, then one step of one side at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peers.worker import Gone, Worker

Say = Callable[[str], None]


@dataclass
class Record:
    """What one side did. `seconds`, `losses` and `pairs` hold one value for each step, the first one included.

    seconds            of each optimizer step
    losses             mean loss of each step's pairs, before its update, nats
    pairs              how many pairs each step took
    reference_seconds  spent on reference log-probs before the first step
    peak_bytes         the most memory a step had: MLX's allocator, or for torch the process's
    peak_rss_bytes     the most memory the process had in RAM
    error              why it stopped early, or None
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    reference_seconds: float = 0.0
    peak_bytes: int = 0
    peak_rss_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the JSON file."""
        return asdict(self)


@dataclass
class Entrant:
    """A side about to be measured: how to start it, its job, and the pairs of each of its steps.

    `warm` is another job, one step of which comes before: MLX's first step on a processor calls a compiler.
    """

    start: Callable[[], Worker]
    job: dict[str, Any]
    sizes: list[int]
    warm: dict[str, Any] | None = None


def measure(entrants: dict[str, Entrant], say: Say) -> dict[str, Record]:
    """Load every side, then give the turn to the one that has done the fewest pairs, until all are through.

    A side that fails keeps what it had; the others go on.
    """
    records = {name: Record() for name in entrants}
    with ExitStack() as stack:
        workers = {}
        for name, entrant in entrants.items():
            worker = entrant.start()
            stack.callback(worker.close)
            if _warmed(worker, entrant, records[name], say, name):
                workers[name] = worker
        while turn := next_turn(records, {name: entrants[name].sizes for name in workers}):
            if not _ask(workers[turn], records[turn], say, turn, do="step"):
                workers.pop(turn).close()
                continue
            record = records[turn]
            record.pairs.append(entrants[turn].sizes[len(record.pairs)])
            say(f"{turn}: step {len(record.pairs)}, {record.seconds[-1]:.2f} s, loss {record.losses[-1]:.6f}")
    return records


def next_turn(records: dict[str, Record], sizes: dict[str, list[int]]) -> str | None:
    """The side with the fewest pairs done; among equals the order moves on by one with each round."""
    names = list(records)

    def key(name: str) -> tuple[int, int]:
        """Pairs done, then the place in this round's order."""
        record = records[name]
        return sum(record.pairs), (names.index(name) - len(record.pairs)) % len(names)

    return min((n for n in sizes if len(records[n].pairs) < len(sizes[n])), key=key, default=None)


def _warmed(worker: Worker, entrant: Entrant, record: Record, say: Say, name: str) -> bool:
    """Load a side, after a step of its warm-up job if it has one; False when it is gone."""
    if entrant.warm:
        trial = Record()  # its figures do not count
        asked = ({"do": "load", "job": entrant.warm}, {"do": "step"})
        if not all(_ask(worker, trial, lambda line: None, name, **command) for command in asked):
            record.error = trial.error
            say(f"{name}: {trial.error}")
            return False
    return _ask(worker, record, say, name, do="load", job=entrant.job)


def _ask(worker: Worker, record: Record, say: Say, name: str, **command: Any) -> bool:
    """Ask and note the answer in `record`; False when the process is gone."""
    try:
        answer = worker.ask(**command)
    except Gone as gone:
        record.error = str(gone)
        say(f"{name}: {gone}")
        return False
    if answer["ok"] == "load":
        record.versions, record.notes = answer["versions"], answer["notes"]
        record.reference_seconds = answer["reference_seconds"]
        say(f"{name}: loaded" + "".join(f"; {note}" for note in answer["notes"]))
        return True
    record.seconds.append(answer["seconds"])
    record.losses.append(answer["loss"])
    record.peak_bytes = max(record.peak_bytes, answer["peak_bytes"])
    record.peak_rss_bytes = max(record.peak_rss_bytes, answer["peak_rss_bytes"])
    return True
