"""Our side: the product's own loop over the job's pairs, its parts switched off one by one on request.

Switches: `checkpoint` as a run has it; the others each undo one part of the step, for the ablation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlxdpo  # noqa: F401  first: it loads the fast BLAS

# isort: split
import mlx.core as mx
import numpy as np

from benchmarks.peers.sides.protocol import Channel, Job, placed, serve
from mlxdpo.config import Config
from mlxdpo.data import batching
from mlxdpo.data.planning import Indices, outline, plan_epoch
from mlxdpo.forward import fused_head, levels, patch_mlx_lm
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.forward.find_head import NoFastWay
from mlxdpo.forward.levels import PLAIN
from mlxdpo.losses import resolve
from mlxdpo.machine import openblas
from mlxdpo.machine.device import this_machine
from mlxdpo.machine.openblas import preload_blas
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.training import loop
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.plan import make_plan
from mlxdpo.training.reference import with_reference
from mlxdpo.training.stages import stage_of
from mlxdpo.training.step import ReferencedPairs, TrainState, make_optimizer, make_scorer
from mlxdpo.types import Event, Example

NEVER = 10**9


class Switch:
    """A part of the step exchanged for `stand_in`, wherever `module` looks for it under `name`."""

    def __init__(self, module: ModuleType, name: str, stand_in: Callable[..., Any]):
        self.module, self.name, self.stand_in, self.calls = module, name, stand_in, 0

    def turn(self) -> None:
        """Exchange it, for the rest of this process. Raises `AttributeError` for a name that is not there."""
        getattr(self.module, self.name)
        setattr(self.module, self.name, self)

    def __call__(self, *args: Any) -> Any:
        """What is called instead; counted, because a part that has moved elsewhere would be measured as it is."""
        self.calls += 1
        return self.stand_in(*args)


class Swiglu(Switch):
    """MLX's SwiGLU: it is exchanged among the names of `patch_mlx_lm`."""

    def turn(self) -> None:
        """Exchange it, for the rest of this process."""
        attention, _, *rest = patch_mlx_lm.OURS
        patch_mlx_lm.OURS = (attention, self, *rest)


def _rows_of_each_pair(pairs: list[Example]) -> tuple[list[batching.DistinctRow], np.ndarray]:
    """Two rows for each pair, whatever it shares with others: stands in for `batching.distinct_rows`."""
    rows = [batching.DistinctRow(p.prompt, *side, i) for i, p in enumerate(pairs) for side in _sides(p)]
    return rows, np.arange(len(rows), dtype=np.int32).reshape(-1, 2)


def _sides(pair: Example) -> tuple[tuple[np.ndarray, np.ndarray | None], ...]:
    """Both completions of a pair, each with its mask."""
    return (pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask)


def _refuse(*_: Any) -> Any:
    """Stands for the level above `prefix`."""
    raise NoFastWay("packing is switched off")


SWITCHES: dict[str, Switch] = {
    "no-lanes": Switch(openblas, "stream_count", lambda: 1),
    "no-packing": Switch(levels, "packed_states", _refuse),
    "chunked-head": Switch(fused_head, "is_frozen", lambda head: False),
    "ungrouped": Switch(batching, "distinct_rows", _rows_of_each_pair),
    "mlx-attention": Switch(patch_mlx_lm, "chunking_is_faster", lambda kind, keys, fused: False),
    "mlx-swiglu": Swiglu(patch_mlx_lm, "OURS", patch_mlx_lm.MLX_LM[1]),
}


def configure(job: Job) -> Config:
    """The job as a recipe."""
    return Config.model_validate(
        {
            "model": {"path": job.model, "dtype": "float32"},
            "data": {"max_length": NEVER},
            "loss": {"name": "sigmoid", "beta": job.beta},
            "lora": {"rank": job.rank, "scale": job.scale, "keys": job.keys},
            "optim": {"name": "adamw", "lr": job.lr, "schedule": "constant", "warmup": 0, "max_grad_norm": 0},
            "train": {
                "batch_size": job.batch_size,
                "gradient_accumulation": 1,
                "epochs": len(job.batches) + 2,  # more than will be asked for: the last step would save a checkpoint
                "save_every": NEVER,
                "gradient_checkpointing": "checkpoint" in job.switches,
            },
        }
    )


def run(job: Job, channel: Channel) -> None:
    """Load as `mlxdpo train` does, score the reference, then a step for each command."""
    os.environ["MLXDPO_CACHE"] = job.folder  # an empty one: the reference is really scored
    for name in SWITCHES.keys() & set(job.switches):
        SWITCHES[name].turn()
    config = configure(job)
    policy = load_policy(config.model)
    plain = PLAIN if "plain" in job.switches else None
    ways = forward_fns(policy.model, config.train.gradient_checkpointing, plain)
    arrays = ([np.array(p[k], np.int32) for k in ("prompt", "chosen", "rejected")] for p in job.read_pairs())
    examples = [Example(*ids, where=f"pair {i}") for i, ids in enumerate(arrays)]
    # What `light_attention` does; asked for MLX's attention, it must still exchange the other part.
    lighter = "mlx-attention" in job.switches or patch_mlx_lm.chunking_is_faster(
        this_machine().kind, job.longest(), fused=False
    )
    with patch_mlx_lm.patched(patch_mlx_lm.attention_files(policy.model) if lighter else []):
        started = time.perf_counter()
        ref = _reference(examples, make_scorer(policy.model, ways.score), config, len(job.batches))
        seconds = time.perf_counter() - started
        attach_lora(policy.model, config.lora)
        policy.model.load_weights(placed(mx.load(job.adapter), policy.model), strict=False)
        parts = ReferencedPairs(examples, ref), ReferencedPairs([], np.zeros((0, 2), np.float32))
        made = make_optimizer(config.optim), resolve(config.loss), make_plan(config, examples, [])
        state = TrainState(config, stage_of(config), policy.model, *made, *parts, Path(job.folder), ways)
        _step(loop.run_loop(state, Progress(), lambda: False), channel, seconds, job.switches)


def _reference(examples: list[Example], scorer: Callable, config: Config, steps: int) -> np.ndarray:
    """(N, 2) log-probs of the pairs that `steps` steps will visit, NaN for the rest."""
    plan = plan_epoch(outline(examples, config.data.group), config.train.batch_size, 1, config.train.seed, 0)
    batches: list[Indices] = [batch for window in plan.windows[:steps] for batch in window]
    *_, (_, ref) = with_reference(examples, scorer, {"made": "for a benchmark"}, batches, config.train.batch_size)
    assert ref is not None  # the last thing it yields
    return ref


def _step(events: Iterator[Event], channel: Channel, reference_seconds: float, switches: list[str]) -> None:
    mx.clear_cache()
    mx.reset_peak_memory()
    blas = preload_blas()
    channel.loaded(["mlx", "mlx-lm"], [] if blas.fast else [blas.note], reference_seconds)
    while True:
        channel.go()
        event = next(event for event in events if event.kind == "step")
        if idle := [name for name in SWITCHES.keys() & set(switches) if not SWITCHES[name].calls]:
            raise RuntimeError(f"{idle[0]}: nothing asked {SWITCHES[idle[0]].name}, so nothing was switched")
        channel.done(event.values["loss"], mx.get_peak_memory())


if __name__ == "__main__":
    serve(run)
