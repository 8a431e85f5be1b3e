"""A scalar head on a language model: one number for a whole answer, read off the state of its last token.

The head is a child of the model, so whatever trains, saves and restores the trainable arrays of a run (optimizer,
checkpoints) takes it along; a finished run keeps it beside the adapter, whose folder stays one that mlx-lm reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.forward.find_head import NoFastWay, find_head
from mlxdpo.forward.shared_prefix import whole_states
from mlxdpo.io.checksum import load_checksummed, save_checksummed
from mlxdpo.types import UserError

NAME, FILE = "reward_head", "head.safetensors"


def attach_head(model: nn.Module) -> nn.Module:
    """Give `model` a head of zeros, float32, trainable; returns the model.

    Zeros and not noise (arXiv 2009.01325 appendix B draws from N(0, 1/(D+1))): all rewards start equal, so the loss
    before the first step is known, and with it whether the run is what it seems. Differences of states are the head's
    first gradient; from its second step on the trunk has one too.
    """
    head = nn.Linear(normed_states(model, mx.zeros((1, 1), mx.int32)).shape[-1], 1, bias=False)
    head.weight = mx.zeros_like(head.weight)
    model[NAME] = head
    return model


def detach_head(model: nn.Module) -> nn.Module:
    """Take the head off again and return it."""
    return model.pop(NAME)


def normed_states(model: Any, tokens: mx.array) -> mx.array:
    """(R, T) token ids -> (R, T, D): what enters the model's own head, the states behind the last norm.

    Raises `UserError` for a model whose head cannot be found.
    """
    try:
        return whole_states(model, find_head(model), tokens)
    except NoFastWay as error:
        name = type(model).__module__.rsplit(".", 1)[-1]
        raise UserError(f"{name}: a reward head cannot be attached ({error}); use another model") from None


def rewards(model: nn.Module, states: mx.array) -> mx.array:
    """(N, D) normed states -> (N,) float32."""
    return model[NAME](states.astype(mx.float32))[..., 0]


def save_head(model: nn.Module, folder: Path) -> None:
    """Write the head into `folder`, whole or not at all."""
    arrays = {"weight": model[NAME].weight}
    save_checksummed(folder / FILE, arrays, {"format": "mlx"})


def load_head(model: nn.Module, folder: Path) -> nn.Module:
    """Give `model` the head in `folder`. Raises `UserError` when there is none or it is another model's."""
    file = folder / FILE
    if not file.exists():
        raise UserError(f"{file}: missing; expected the run directory of a finished run with `stage: reward`")
    head = attach_head(model)[NAME]
    weight = load_checksummed(file).get("weight", mx.zeros((0,)))  # another file of that name has another shape
    if weight.shape != head.weight.shape:
        raise UserError(f"{file}: made for states of {weight.size} numbers, the model's have {head.weight.size}")
    head.weight = weight
    head.freeze()
    return model
