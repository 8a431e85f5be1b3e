"""Processes that the page starts, each with a folder: neither a closed tab nor a closed app stops them.

FOLDER/lock is held by the process while it lives, whoever started it; `job.json` has the process and its command,
`log.txt` what it says, `ended.json` its exit status, if the app was there to see it.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from html import escape
from os.path import isfile
from pathlib import Path
from typing import Any

from mlxdpo.io.atomic import write_json
from mlxdpo.io.json_file import read_json
from mlxdpo.io.names import without_tokens
from mlxdpo.types import UserError
from mlxdpo.ui.runs.run_list import busy

LOG_TAIL = 16 * 1024  # bytes


def spawn(folder: Path, command: Sequence[str], busy_words: str) -> None:
    """Run `command`, `mlxdpo` and its words, in a session of its own. It inherits the lock, and so holds it exactly as
    long as it lives. Raises `UserError` with `busy_words` where another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as lock, (folder / "log.txt").open("ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy_words) from None
        log.write(f"$ {shlex.join(command)}\n".encode())
        log.flush()
        for name in ("asked", "ended.json"):
            (folder / name).unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlxdpo.cli", *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            pass_fds=(lock.fileno(),),
        )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(folder / "job.json", {"pid": process.pid, "command": list(command), "started": now})
    # Somebody has to ask for the exit status, or a finished process stays in the process table.
    threading.Thread(target=_await_end, args=(process, folder.absolute()), daemon=True).start()


def _await_end(process: subprocess.Popen[bytes], folder: Path) -> None:
    status = process.wait()
    if folder.is_dir():  # the run may have been removed meanwhile
        write_json(folder / "ended.json", {"status": status})


def exit_status(folder: Path) -> int | None:
    """The exit status of a folder's last process; None while it runs, and where nobody saw it end."""
    try:
        status = read_json(folder / "ended.json").get("status") if isfile(folder / "ended.json") else None
    except UserError:
        return None
    return status if isinstance(status, int) else None


def read_job(folder: Path) -> dict[str, Any]:
    """The last process of a folder. Raises `UserError` where its file names none."""
    file = folder / "job.json"
    found = read_json(file) if isfile(file) else {}
    pid = found.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid < 2:
        raise UserError(f"{file}: does not say which process it is; stop it in a terminal")
    return found


def written_at(file: Path) -> int:
    """When a file was written last, nanoseconds; 0 where there is none."""
    return file.stat().st_mtime_ns if isfile(file) else 0


def job_html(folder: Path, title: str, most: int = 12) -> str:
    """How a folder's last process stands, with its last lines; empty where the page started none."""
    log = log_tail(folder, most)
    if not log:
        return ""
    status = exit_status(folder)
    words = "at work; this page may be closed" if busy(folder / "lock") else "ended" if status is None else "finished"
    if status:
        words = f"stopped with exit status {status}; the last lines say why"
    return (
        f'<p role="status"><strong>{escape(title)}: {words}.</strong></p>'
        f'<pre class="log" tabindex="0" aria-label="Log">{escape(log)}</pre>'
    )


def log_tail(folder: Path, most: int = 40) -> str:
    """The last lines that a folder's processes said, empty for one that was started elsewhere."""
    file = folder / "log.txt"
    if not isfile(file):
        return ""
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - LOG_TAIL))
        text = stream.read().decode("utf-8", errors="replace")
    return without_tokens("\n".join(text.splitlines()[-most:]))
