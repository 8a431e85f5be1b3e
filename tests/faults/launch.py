"""A process of its own for the fault tests: the command line, or votes written one after the other.

python launch.py cli ARGUMENTS...     the command line, saving the reference's table after every batch
python launch.py votes RUN FIRST      votes FIRST, FIRST + 1, ... each number printed when it is on the disk
"""

import itertools
import sys

import mlxdpo  # noqa: F401
from mlxdpo import reference
from mlxdpo.cli import main
from mlxdpo.runs import Run

if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "cli":
        reference.SAVE_SECONDS = 0.0  # a tiny reference is scored within the usual half minute
        main(arguments)
    from mlxdpo.ui.votes import append_vote

    run, first = Run.open(arguments[0]), int(arguments[1])
    for number in itertools.count(first):
        words = "again and again " * 40
        append_vote(run, {"id": str(number), "winner": "a", "prompt": words, "a": words, "b": words, "tuned": "a"})
        print(number, flush=True)
