"""Groups of processes for tests: simulated by threads, or real ones as `mlx.launch` starts them."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxdpo.distributed.group import Group


def simulated(size, work):
    """What `work(peers)` gives in each of `size` threads whose `all_sum` adds up what all of them bring."""
    slots, results, barrier = [None] * size, [None] * size, threading.Barrier(size, timeout=600)

    def run(rank):
        def all_sum(array):
            slots[rank] = np.array(array)
            barrier.wait()
            total = sum(slots[1:], slots[0].copy()).astype(slots[0].dtype)
            barrier.wait()
            return mx.array(total)

        try:
            results[rank] = work(Group(rank, size, all_sum))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    return results


def free_ports(count):
    """Ports that nobody listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start_group(folder: Path, size: int, code: str, where=None):
    """Processes that run Python `code`, each a part of a ring on this machine, as `mlx.launch` sets it up."""
    hosts = folder / f"hosts-{free_ports(1)[0]}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    base = os.environ | {"MLX_HOSTFILE": str(hosts), "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=base | {"MLX_RANK": str(rank)},
            cwd=(where or {}).get(rank, folder),
        )
        for rank in range(size)
    ]


def command(*words, patch=""):
    """Python code that is `mlxdpo WORDS` after `patch`."""
    return f"import mlxdpo\n{patch}\nfrom mlxdpo.cli import main\nmain({list(map(str, words))!r})\n"


def ended(processes, seconds=600):
    """(status, output, errors without MLX's own lines) of each process."""
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=seconds)
        found.append((process.returncode, out, [x for x in errors.splitlines() if "[ring]" not in x]))
    return found
