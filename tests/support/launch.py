"""A process of its own for the fault tests: the command line, or votes written one after the other.

python launch.py cli ARGUMENTS...     the command line, saving the reference's table after every batch
python launch.py slow ARGUMENTS...    the same, resting after each checkpoint: a signal meets it before its end
python launch.py tight MB ARGUMENTS...  the command line, with this much more address space from the second step on
python launch.py stopped STEP ARGUMENTS...  the command line; macOS stops its work on the GPU in this step
python launch.py votes RUN FIRST      votes FIRST, FIRST + 1, ... each number printed when it is on the disk
"""

import itertools
import resource
import sys
import time
from pathlib import Path

import mlxdpo  # noqa: F401
from mlxdpo.cli import main
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint, loop, reference

WATCHDOG = (
    "[METAL] Command buffer execution failed: Impacting Interactivity "
    "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
)


def rest_after_checkpoints(seconds: float) -> None:
    """A tiny run is over before a busy machine lets the test look at it."""
    plain = checkpoint.save

    def save(*arguments, **named):
        found = plain(*arguments, **named)
        time.sleep(seconds)
        return found

    checkpoint.save = save


def limit_memory(megabytes: float) -> None:
    """Let the process have `megabytes` more than it has after its second step, and no more."""
    plain, calls = checkpoint.save, itertools.count(1)

    def save(*arguments, **named):
        found = plain(*arguments, **named)
        if next(calls) == 2:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + int(megabytes * 1e6)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return found

    checkpoint.save = save


def stop_at(step: int) -> None:
    """Let step `step`, counted from 0, end as one does whose work macOS stopped."""
    plain = loop.train_step

    def train_step(state, fns, batches, number, *more):
        if number == step:
            raise RuntimeError(WATCHDOG)
        return plain(state, fns, batches, number, *more)

    loop.train_step = train_step


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "slow":
        rest_after_checkpoints(0.25)
    if what in ("cli", "slow"):
        reference.SAVE_SECONDS = 0.0  # a tiny reference is scored within the usual half minute
        main(arguments)
    if what == "stopped":
        stop_at(int(arguments[0]))
        main(arguments[1:])
    if what == "tight":
        limit_memory(float(arguments[0]))
        main(arguments[1:])
    from mlxdpo.ui.vote.tab import append_vote

    run, first = Run.open(arguments[0]), int(arguments[1])
    for number in itertools.count(first):
        words = "again and again " * 40
        append_vote(run, {"id": str(number), "winner": "a", "prompt": words, "a": words, "b": words, "tuned": "a"})
        print(number, flush=True)
