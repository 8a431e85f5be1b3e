"""Command lines run one after the other, each in a fork with limits: a crash or a hang ends that one alone.

python forking.py   reads a JSON list of words a line; writes {"status", "said", "seconds"}, status < 0 for a signal
"""

import json
import os
import resource
import signal
import sys
import time

SECONDS, BYTES = 30, 6 << 30  # by the clock: a busy machine takes its time, and a hang takes all of it


def one(words):
    """Fork, run, and say what came of it. Nothing has been computed in this process, so a fork of it can compute."""
    reading, writing = os.pipe()
    began = time.monotonic()
    if (child := os.fork()) == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))  # a hang of 10 s
        signal.alarm(SECONDS)
        from mlxdpo.cli import run

        try:
            status = run(words)
        except BaseException as error:
            print(f"traceback: {error!r}", flush=True)
            status = 99
        sys.stdout.flush()
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as said:
        text = said.read().decode("utf-8", "replace")
    _, status = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(status), "said": text[-600:], "seconds": time.monotonic() - began}


if __name__ == "__main__":
    import transformers  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(one(json.loads(line))), flush=True)
