"""The float64 side of the benchmark and ours take the same steps: what it says of long rows can be believed."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model
from tiny_tokenizers import base_tokenizer

from mlxdpo.platform import preload_blas

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers import adapter, workloads
from benchmarks.peers.environments import MODULES
from benchmarks.peers.measure import Entrant, measure
from benchmarks.peers.sides.protocol import Job
from benchmarks.peers.worker import Worker

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("shape", ["ranked", "hh"])
def test_losses_of_four_steps(shape, tmp_path):
    folder = write_model(tmp_path / "model", base_tokenizer(), "llama", seed=3)
    adapter.write_adapter(folder, tmp_path / "adapter.safetensors")
    text = np.random.default_rng(0).integers(3, 20, 400).tolist()
    plan = workloads.shape_plan(workloads.WORKLOADS[shape], text, 0.1, 4)
    (tmp_path / "pairs.json").write_text(json.dumps(plan.pairs))
    files = {"adapter": str(tmp_path / "adapter.safetensors"), "pairs": str(tmp_path / "pairs.json")}
    entrants, size = {}, plan.batch_size
    for side in ("exact", "mlxdpo"):
        (tmp_path / side).mkdir()
        job = Job(
            model=str(folder),
            batches=plan.steps[side],
            batch_size=size,
            switches=[],
            threads=1,
            blas=preload_blas().note,
            folder=str(tmp_path / side),
            rank=adapter.RANK,
            scale=adapter.SCALE,
            keys=list(adapter.KEYS),
            lr=1e-2,
            beta=workloads.BETA,
            **files,
        )
        start = lambda s=side: Worker([sys.executable, "-m", MODULES[s]], tmp_path / f"{s}.log", 1, 120)  # noqa: E731
        entrants[side] = Entrant(start, job._asdict(), [size] * 4)
    exact, ours = measure(entrants, print).values()
    assert exact.error is ours.error is None and exact.losses[0] == pytest.approx(math.log(2), abs=1e-12)
    assert exact.losses[3] < math.log(2) - 0.01  # it learns, or agreement would say nothing
    assert ours.losses == pytest.approx(exact.losses, abs=1e-5)
