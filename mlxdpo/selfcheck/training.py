"""Does a step do what it should: where it starts, where it goes, how often it is traced, what is on disk afterwards."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.config import LossConfig, OptimConfig
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.losses.loss import resolve
from mlxdpo.machine.device import cache_folder, most_traces
from mlxdpo.model.adapters import load_arrays, save_adapter
from mlxdpo.selfcheck.golden_model import LORA, arithmetic_model
from mlxdpo.selfcheck.material import BETA, batch, examples, model, reference
from mlxdpo.selfcheck.numbers import limit_of
from mlxdpo.selfcheck.registry import REPORT, Finding, self_check
from mlxdpo.training.step import make_gradient, make_optimizer, make_update
from mlxdpo.types import Batch

STEPS = 8
SLOWEST = 1.0  # seconds a step of the tiny model may take: a CPU core needs 0.02
SHAPES = ((0, 1), (2,))  # pairs of two batches whose arrays have other shapes


def training_steps() -> tuple[list[float], list[float]]:
    """Losses (nats) and seconds of `STEPS` optimizer steps from fresh adapters on the golden pairs."""
    tuned = arithmetic_model(moved=False)
    gradient = make_gradient(tuned, resolve(LossConfig(name="sigmoid", beta=BETA)), forward_fns(tuned).train)
    rate = 1e-2
    optim = OptimConfig(lr=rate)
    update, rows, share = make_update(tuned, make_optimizer(optim)), batch(reference()), mx.array(1 / len(examples()))
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        found = gradient(rows, share)
        update(found.gradients, 1.0, rate)
        losses.append(float(found.losses.mean().item()))
        seconds.append(time.perf_counter() - start)
    return losses, seconds


@self_check("training starts at ln 2 and falls", REPORT)
def training_falls() -> Finding:
    """A policy that is its reference has loss ln 2 (arXiv 2305.18290 eq. 7 with all ratios 1); then it must fall."""
    losses, _ = training_steps()
    start, limit = abs(losses[0] - math.log(2)), limit_of("float32")
    ok = start <= limit and losses[-1] < losses[0] - 0.01
    return Finding(ok, f"{losses[0]:.5f} to {losses[-1]:.5f}", f"{math.log(2):.5f} at first, 0.01 less at last")


@self_check("a tiny step", "check for other busy programs (Activity Monitor, top), then run this again")
def tiny_step() -> Finding:
    """Seconds of a training step of the tiny model, median after the first, which is traced."""
    seconds = statistics.median(training_steps()[1][1:])
    return Finding(seconds <= SLOWEST, f"{seconds * 1000:.0f} ms", f"{SLOWEST * 1000:.0f} ms")


def count_traces(compile_: Callable[..., Any] = mx.compile) -> int:
    """How often a compiled scoring pass is traced when batches of `SHAPES` take turns three times.

    Tracing happens at the call; nothing is evaluated, because a CPU would need a compiler for that.
    """
    tuned, traced = model(), []
    way = forward_fns(tuned).score

    def score(rows: Batch) -> Any:
        """Runs in Python only while it is traced."""
        traced.append(rows.rest.shape)
        return score_pairs(tuned, rows, way)

    compiled = compile_(score, inputs=[tuned.state])
    for _ in range(3):
        for indices in SHAPES:
            compiled(batch(indices=indices))
    return len(traced)


def compiles() -> bool:
    """Whether `mx.compile` does anything: MLX leaves functions as they are on a CPU without g++, or when told to."""
    called: list[int] = []
    function = mx.compile(lambda x: called.append(1) or x + 1)
    for _ in range(2):
        function(mx.array(1.0))
    return len(called) == 1


@self_check("one trace for each shape", f"expect memory and time of a long run to grow; {REPORT}")
def traces() -> Finding:
    """MLX keeps every trace for good, so their number must stay that of the shapes."""
    count, most = count_traces(), most_traces()
    if most is None and not compiles():
        return Finding(count == 3 * len(SHAPES), "mx.compile does nothing here, so nothing is kept", "-")
    where = "steps run uncompiled on a CPU" if most is None else f"a run has {most} shapes at most"
    return Finding(count == len(SHAPES), f"{count} for {len(SHAPES)} shapes; {where}", f"{len(SHAPES)}")


@self_check("safetensors round trip", "check the disk of the cache folder (and $MLXDPO_CACHE); no run is safe on it")
def round_trip() -> Finding:
    """An adapter written in the cache folder and read back, and arrays of other dtypes: every bit the same."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        tuned, other, file = model(), arithmetic_model(moved=False), Path(folder, "more.safetensors")
        save_adapter(tuned, LORA, Path(folder))
        load_arrays(other, Path(folder))
        wanted, got = (dict(tree_flatten(m.trainable_parameters())) for m in (tuned, other))
        dtypes = (mx.bfloat16, mx.float16, mx.uint32)
        more = {str(dtype): mx.arange(300).astype(dtype) for dtype in dtypes}
        mx.save_safetensors(str(file), more)
        back: Any = mx.load(str(file))
        pairs = [(wanted[n], got[n]) for n in wanted] + [(more[n], back[n]) for n in more]
        different = sum(not _identical(a, b) for a, b in pairs)
    return Finding(different == 0, f"{different} of {len(pairs)} arrays differ", "0")


def _identical(a: mx.array, b: mx.array) -> bool:
    """The same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(_bits(a), _bits(b)))


def _bits(a: mx.array) -> np.ndarray:
    return np.array(a.view(mx.uint8))
