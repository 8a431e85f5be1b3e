"""The other end of `sides/protocol.py`: one measured process, asked one thing at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]


class Gone(Exception):
    """A measured process gave no answer; the text says how it ended."""


class Worker:
    """A measured process. It is started at once; `ask` raises `Gone` when it has died or takes too long."""

    def __init__(self, command: list[str], log: Path, threads: int, timeout: float):
        self.log, self.timeout = log, timeout
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log: TextIO = log.open("w", encoding="utf-8")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self._log, text=True, env=environment(threads)
        )
        if sys.platform == "linux":  # short of memory, the system shall end a measured process, not this one
            Path(f"/proc/{self.process.pid}/oom_score_adj").write_text("1000")

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Gone(self._ending()) from None
        if not select.select([self.process.stdout], [], [], self.timeout)[0]:
            self.process.kill()
            raise Gone(f"no answer within {self.timeout:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Gone(self._ending())
        return json.loads(line)

    def close(self) -> None:
        """End the process and wait for it."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._log.close()

    def _ending(self) -> str:
        code = self.process.wait(30)
        if code == -9:
            return "killed by the system: out of memory"
        lines = [line for line in self.log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        return f"ended with {code}: {lines[-1].strip() if lines else 'no message'}"[:200]


def environment(threads: int) -> dict[str, str]:
    """The same threads for every library, and no network: all a side needs is on disk."""
    counts = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return os.environ | counts | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
