"""What a stranger wrote and has to be run (a template, a pattern), in a process with limits of time and memory.

Whatever it does there, only that process ends. The time is processor time, so a busy machine changes nothing.

python -P -m mlxdpo.machine.limited MODULE:FUNCTION     a JSON value comes in, the function's value goes out
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds by the clock, whatever the limits: somebody waits
LOOK = 0.2  # seconds between looks at a process's memory, where the system sets it no limit
OUT_OF_MEMORY = 77  # exit status


class LimitReached(Exception):
    """A process was ended; the text says what it took too much of, as in "more than 5 s"."""


def call_limited(function: str, argument: Any, seconds: int, megabytes: int) -> Any:
    """The value of `function` ("module:name") of `argument`, both JSON, in a process of its own.

    The function calls `start_limits` with the same numbers once its imports are done. Raises `LimitReached` when the
    process had to be ended, or crashed.
    """
    command = [sys.executable, "-P", "-m", "mlxdpo.machine.limited", function]
    began, data = time.monotonic(), json.dumps(argument).encode()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while True:
            try:
                out, _ = process.communicate(data, timeout=LOOK)
                break
            except subprocess.TimeoutExpired:
                data = None  # it is on its way already
                if time.monotonic() > began + PATIENCE:
                    process.kill()
                if sys.platform == "darwin" and _resident(process.pid) > (megabytes + 1000) << 20:  # 1000: libraries
                    process.kill()
                    raise LimitReached(f"more than {megabytes} MB") from None
    if process.returncode == 0:
        return json.loads(out)
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise LimitReached(f"more than {seconds} s")
    if process.returncode in (OUT_OF_MEMORY, -signal.SIGABRT):  # tokenizers, in Rust, aborts where it gets no memory
        raise LimitReached(f"more than {megabytes} MB")
    raise LimitReached(f"the process down (exit status {process.returncode})")


def start_limits(seconds: int, megabytes: int) -> None:
    """From here on, this process may take so much more processor time and memory."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)
    statm = Path("/proc/self/statm")  # macOS has none, and no such limit either: `call_limited` looks from outside
    if statm.exists():
        pages = int(statm.read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + (megabytes << 20))


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    with contextlib.suppress(ValueError):  # a lower limit is in force already
        resource.setrlimit(kind, (most, hard))


def _resident(pid: int) -> int:
    """Memory of a process, bytes; 0 for one that is gone."""
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return int(said) * 1024 if said.strip().isdigit() else 0


def main(function: str) -> None:
    """Read the argument, call the function, write its value; whatever is printed meanwhile goes nowhere."""
    argument, answer = json.load(sys.stdin), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module, _, name = function.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(argument)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    with os.fdopen(answer, "w") as file:
        json.dump(value, file)


if __name__ == "__main__":
    main(sys.argv[1])
