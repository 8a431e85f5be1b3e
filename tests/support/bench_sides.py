"""Measured processes of the benchmark over a tiny llama."""

import json
import sys

import numpy as np
from tiny_models import write_model
from tiny_tokenizers import base_tokenizer

from mlxdpo.machine.openblas import preload_blas  # before what may import mlx

# isort: split
from benchmarks.peers import adapter, workloads
from benchmarks.peers.environments import MODULES
from benchmarks.peers.measure import Entrant
from benchmarks.peers.sides.protocol import Job
from benchmarks.peers.worker import Worker

JOB = Job("m", "", "", [], 2, [], 1, None, "", 8, 2.0, list(adapter.KEYS), 1e-4, workloads.BETA)._asdict()


def tiny_entrants(folder, shape, steps, sides):
    """Entrants for so many steps of a tenth of that workload; `sides` gives a name each trainer and its switches."""
    model = write_model(folder / "model", base_tokenizer(), "llama", seed=3)
    adapter.write_adapter(model, folder / "adapter.safetensors")
    text = np.random.default_rng(0).integers(3, 20, 400).tolist()
    plan = workloads.shape_plan(workloads.WORKLOADS[shape], text, 0.1, steps)
    (folder / "pairs.json").write_text(json.dumps(plan.pairs))
    files = {"model": str(model), "adapter": str(folder / "adapter.safetensors"), "pairs": str(folder / "pairs.json")}
    blas, entrants = preload_blas(), {}
    for name, (trainer, switches) in sides.items():
        (folder / name).mkdir()
        plans = {"batches": plan.steps[trainer], "batch_size": plan.batch_size, "lr": 1e-2, "switches": switches}
        job = JOB | files | plans | {"blas": blas.note, "folder": str(folder / name)}
        command = [sys.executable, "-m", MODULES[trainer]]
        start = lambda c=command, n=name: Worker(c, folder / f"{n}.log", 1, 600)  # noqa: E731
        entrants[name] = Entrant(start, job, [plan.batch_size] * steps)
    return entrants
