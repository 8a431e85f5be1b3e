"""Are the numbers right on this machine: against stored golden ones, and one way through the model against another."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.config import LossConfig
from mlxdpo.forward.choose_forward import ForwardFns, forward_fns
from mlxdpo.forward.levels import offered_levels
from mlxdpo.forward.logprobs import fast_forward, plain_forward, score_pairs
from mlxdpo.losses.loss import resolve
from mlxdpo.machine.device import float32_matmul, this_machine
from mlxdpo.model.adapters import adapters_off
from mlxdpo.selfcheck.material import BETA, apart, batch, examples, golden, gradient, model, reference, weighted
from mlxdpo.selfcheck.registry import REPORT, Finding, self_check
from mlxdpo.training.step import make_gradient

# Nats that a summed log-prob of up to 16 tokens may be off. A CPU showed 1e-5, 0.04 and 0.006.
LIMITS = {"float32": {"cpu": 2e-4, "gpu": 1e-3, "TF32": 3e-2}, "bfloat16": 0.4, "float16": 0.05}
SLOPE = {"cpu": 1e-4, "gpu": 1e-3, "TF32": 3e-2}  # relative distance of gradients
AGREE = {"cpu": 1e-4, "gpu": 1e-3, "TF32": 3e-2}  # nats between two exact ways, of a sum over a batch


def limit_of(dtype: str) -> float:
    """How far a log-prob may be from its golden value, nats."""
    found = LIMITS[dtype]
    return found[_precision()] if isinstance(found, dict) else found


def _fastest(tuned: nn.Module) -> ForwardFns:
    """The fastest level, whether it agrees with the plain way or not: that is asked here."""
    return forward_fns(tuned, level=offered_levels(tuned)[0])


def off_golden(dtype: str) -> float:
    """The largest distance of any golden log-prob, of policy and reference, nats."""
    tuned = model(dtype)
    score, wanted = _fastest(tuned).score, golden()
    policy = score_pairs(tuned, batch(), score)
    with adapters_off(tuned):
        frozen = score_pairs(tuned, batch(), score)
    got = [np.stack([np.array(pairs.chosen), np.array(pairs.rejected)], axis=1) for pairs in (policy, frozen)]
    return float(np.abs(np.array(got) - np.array([wanted["policy"], wanted["reference"]])).max())


def _log_probs(dtype: str) -> Finding:
    gap, limit = off_golden(dtype), limit_of(dtype)
    return Finding(gap <= limit, f"{gap:.2g} nats off", f"{limit:.2g} nats")


@self_check("log-probs float32 = golden", REPORT)
def log_probs_float32() -> Finding:
    """Summed log-probs of policy and reference against float64 numpy."""
    return _log_probs("float32")


@self_check("log-probs bfloat16 = golden", f"set model.dtype float32, and {REPORT}")
def log_probs_bfloat16() -> Finding:
    """The same with weights in bfloat16."""
    return _log_probs("bfloat16")


@self_check("log-probs float16 = golden", f"set model.dtype float32, and {REPORT}")
def log_probs_float16() -> Finding:
    """The same with weights in float16."""
    return _log_probs("float16")


@self_check("loss and gradient = golden", REPORT)
def loss_and_gradient() -> Finding:
    """DPO's loss (arXiv 2305.18290 eq. 7) and entries of its gradient against float64 numpy."""
    tuned, rows, wanted = model(), batch(reference()), golden()
    step = make_gradient(tuned, resolve(LossConfig(name="sigmoid", beta=BETA)), _fastest(tuned).train)
    found = step(rows, mx.array(1 / len(examples())))
    gap = abs(float(found.losses.mean().item()) - wanted["loss"])
    arrays = dict(tree_flatten(found.gradients))
    got = [np.array(arrays[_parameter_name(key)]).ravel()[wanted["probed"]] for key in wanted["gradient"]]
    slope, limit = apart(np.concatenate(got), np.concatenate(list(wanted["gradient"].values()))), SLOPE[_precision()]
    ok = gap <= limit_of("float32") and slope <= limit
    return Finding(ok, f"{gap:.2g} nats, gradient {slope:.2g}", f"{limit_of('float32'):.2g} nats, {limit:.2g}")


def _parameter_name(key: str) -> str:
    layer, module, side = key.split()
    return f"model.layers.{layer}.self_attn.{module}.lora_{side}"


def _precision() -> str:
    """Which limits hold for float32 here."""
    return "cpu" if this_machine().kind == "cpu" else "TF32" if float32_matmul() == "TF32" else "gpu"


def _same(value: tuple[float, np.ndarray], wanted: tuple[float, np.ndarray]) -> Finding:
    """Whether a value and its gradient agree with those of another way."""
    gap, slope, limits = (
        abs(value[0] - wanted[0]),
        apart(value[1], wanted[1]),
        (AGREE[_precision()], SLOPE[_precision()]),
    )
    ok = gap <= limits[0] and slope <= limits[1]
    return Finding(ok, f"{gap:.2g} nats, gradient {slope:.2g}", f"{limits[0]:.2g} nats, {limits[1]:.2g}")


@self_check("fused = plain", f"training still works where its own start-up check finds the plain way; {REPORT}")
def fused_is_plain() -> Finding:
    """Shared prefix, distinct rows and fused head against full rows and full logits: value and gradient."""
    plain = gradient(model(), weighted(plain_forward, batch()))
    return _same(_at_level("prefix"), plain)


@self_check("checkpoint = not", f"leave train.gradient_checkpointing false, and {REPORT}")
def checkpoint_is_not() -> Finding:
    """Layers computed again in the backward pass against layers kept: value and gradient."""
    return _same(_at_level("packed", checkpoint=True), _at_level("packed"))


@self_check("packed = padded", REPORT)
def packed_is_padded() -> Finding:
    """Distinct tokens without padding against padded rows: value and gradient."""
    return _same(_at_level("packed"), _at_level("prefix"))


def _at_level(name: str, checkpoint: bool = False) -> tuple[float, np.ndarray]:
    """Value and gradient of the golden batch. Raises `StopIteration` where this MLX cannot trace the level."""
    tuned = model()
    level = next(level for level in offered_levels(tuned) if level.name == name)
    return gradient(tuned, weighted(fast_forward(level, checkpoint), batch()))
