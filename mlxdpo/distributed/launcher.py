"""Whether this process was started with others, by `mlx.launch` or `mpirun`: read from the environment, without mlx."""

from __future__ import annotations

import json
import os
from pathlib import Path

RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK")
SIZES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
FILES = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # the ring's addresses, jaccl's devices: one entry per process
COORDINATORS = ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")


def process_rank() -> int:
    """The number of this process among those started together, from 0."""
    return next((int(os.environ[name]) for name in RANKS if os.environ.get(name)), 0)


def process_count() -> int:
    """How many processes were started together; 1 for one that was started alone."""
    if not any(os.environ.get(name) for name in RANKS):
        return 1
    for name in SIZES:
        if size := os.environ.get(name):
            return int(size)
    return max([1, *(len(_entries(name)) for name in FILES)])


def address_of_first() -> str:
    """Where the other processes reach process 0; "" where the launcher did not say."""
    if entries := _entries("MLX_HOSTFILE"):
        first = entries[0] if isinstance(entries[0], str) else entries[0][0]
        return first.rpartition(":")[0]
    given = next((os.environ[name] for name in COORDINATORS if os.environ.get(name)), "")
    return given.partition(":")[0]


def _entries(name: str) -> list:
    """The JSON list in the file that a variable names; `mlx.launch -n 1` leaves it empty."""
    file = os.environ.get(name)
    text = Path(file).read_text("utf-8").strip() if file else ""
    return json.loads(text) if text else []
