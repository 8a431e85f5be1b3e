"""What a measured process says and hears: JSON lines, one command at a time. Standard library only.

    {"do": "load", "job": {...}}   -> {"ok": "load", "versions": {...}, "notes": [...], "reference_seconds": 0.0}
    {"do": "step"}                 -> {"ok": "step", "seconds": s, "loss": l, "peak_bytes": b, "peak_rss_bytes": r}
    {"do": "stop"}                 -> ends

A trainer that owns its loop is driven from inside: wherever it asks for its next batch, `Channel.go` waits for the
next step command. Any other command leaves the trainer by way of `Finished`.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Job(NamedTuple):
    """What one side has to do.

    model       folder with Hugging Face weights, float32
    adapter     safetensors file: `x.lora_a` (in, rank), `x.lora_b` (rank, out), the same start for all sides
    pairs       JSON file: a list of {"prompt": ids, "chosen": ids, "rejected": ids}
    batches     the pairs of each step, as indices; a side that plans for itself needs only their number
    batch_size  pairs of a full batch
    switches    what is switched on or off for this side, e.g. ["checkpoint"]
    threads     processor threads
    blas        a BLAS library to load before MLX, or None
    folder      an empty folder the side may write to
    """

    model: str
    adapter: str
    pairs: str
    batches: list[list[int]]
    batch_size: int
    switches: list[str]
    threads: int
    blas: str | None
    folder: str
    rank: int
    scale: float
    keys: list[str]
    lr: float
    beta: float

    def read_pairs(self) -> list[dict[str, list[int]]]:
        """The token ids of every pair."""
        with open(self.pairs, encoding="utf-8") as file:
            return json.load(file)

    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) for p in self.read_pairs())


def placed(arrays: dict[str, Any], model: Any) -> list[tuple[str, Any]]:
    """The adapter's `arrays` under the names that an mlx-lm model has for them: the same, or those inside a wrapper.

    Raises `RuntimeError` unless they are all that the model trains.
    """
    from mlx.utils import tree_flatten

    known = {name for name, _ in tree_flatten(model.trainable_parameters())}
    found = [(next((k for k in known if k == name or k.endswith(f".{name}")), name), a) for name, a in arrays.items()]
    if {name for name, _ in found} != known:
        odd = min({name for name, _ in found} ^ known)
        raise RuntimeError(f"the model and the adapter differ, e.g. by {odd}")
    return found


class Finished(BaseException):  # not an Exception: a trainer may catch those
    """Leaves a trainer's loop; carries the command that ended it."""

    def __init__(self, command: dict[str, Any]):
        super().__init__(command["do"])
        self.command = command


class Channel:
    """The two pipes of a measured process and the clock of its current step."""

    def __init__(self) -> None:
        # Trainers print to standard output: what they print goes to the log, and answers keep the pipe to themselves.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._started = 0.0

    def read(self) -> dict[str, Any]:
        """The next command; a closed pipe is `stop`."""
        line = sys.stdin.readline()
        return json.loads(line) if line else {"do": "stop"}

    def loaded(self, packages: list[str], notes: list[str], reference_seconds: float = 0.0) -> None:
        """Answer `load`: everything is ready for the first step."""
        versions = {name: importlib.metadata.version(name) for name in packages}
        self._answer(ok="load", versions=versions, notes=notes, reference_seconds=reference_seconds)

    def go(self) -> None:
        """Wait for the next step and start its clock. Raises `Finished` for any other command."""
        command = self.read()
        if command["do"] != "step":
            raise Finished(command)
        self._started = time.perf_counter()

    def done(self, loss: float, peak_bytes: int | None) -> None:
        """Stop the clock and answer `step`."""
        seconds = time.perf_counter() - self._started
        self._answer(ok="step", seconds=seconds, loss=loss, peak_bytes=peak_bytes, peak_rss_bytes=peak_rss())

    def _answer(self, **values: Any) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def peak_rss() -> int:
    """The most memory this process has had in RAM, bytes. macOS counts in bytes, Linux in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve(run: Callable[[Job, Channel], None]) -> None:
    """Take jobs until told to stop. `run` loads a job and steps until `Channel.go` ends it."""
    channel = Channel()
    command = channel.read()
    while command["do"] == "load":
        try:
            run(Job(**command["job"]), channel)
        except Finished as end:
            command = end.command
            gc.collect()  # a trainer's models hang in circles
        else:
            raise RuntimeError("the trainer ended before it was told to")
