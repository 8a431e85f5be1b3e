"""A reference that follows the policy (TR-DPO, arXiv 2404.09656): every some steps w_ref = mix w + (1 - mix) w_ref.

What is mixed are *weights*. Of low-rank adapters that is not a mixture of their matrices but of their products, and it
is kept exactly: the mixture of two products of rank r is one product of rank 2r, their matrices side by side. DoRA's
normed weights have no such form, so there the policy can only replace the reference (mix 1).

Log-probs of the new reference are not scored ahead for the whole data set: each batch is scored when it comes up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxdpo.config import Config
from mlxdpo.forward.layer_plan import evaluate_batch
from mlxdpo.forward.logprobs import Forward, RowDetails
from mlxdpo.io.checksum import load_checksummed, save_checksummed
from mlxdpo.losses import Loss
from mlxdpo.model.adapters import dropout_off
from mlxdpo.types import Batch, UserError

Arrays = dict[str, mx.array]
FILE = "reference.safetensors"


def check_reference_sync(config: Config, loss: Loss) -> None:
    """Raise `UserError` where a moving reference cannot be had."""
    every, mix = config.reference.sync_every, config.reference.sync_alpha
    if every is None:
        return
    if config.reference.model is not None:
        raise UserError(
            f"reference.sync_every {every} mixes the policy into the weights it starts from, not into "
            f"{config.reference.model}; drop reference.model or reference.sync_every"
        )
    if "reference" not in loss.needs:
        raise UserError(f"reference.sync_every {every} has no effect: {config.loss.name} asks no reference here")
    if config.lora.method == "dora" and mix != 1:
        raise UserError(
            f"reference.sync_alpha {mix:g}: DoRA's weights are normed and cannot be mixed exactly; "
            f"set reference.sync_alpha 1, or lora.method lora"
        )


class ReferenceSync:
    """The reference of a run with `reference.sync_every`; `arrays` are what it has in place of the trained ones.

    Until the first update it is where training starts: the log-probs scored there are still right.
    """

    def __init__(self, model: nn.Module, config: Config, score: Forward):
        self.model, self.score = model, score
        self.every, self.mix, self.method = config.reference.sync_every, config.reference.sync_alpha, config.lora.method
        # A fresh adapter's product is zero: nothing to mix. A reference that stays needs no second set of weights.
        fresh = self.method != "full" and config.model.adapter is None
        self.arrays: Arrays = {} if fresh or self.every is None else trained_arrays(model)
        self.moved = False

    def due(self, step: int) -> bool:
        """Whether it moves after optimizer step `step` (from 1)."""
        return self.every is not None and step % self.every == 0

    def move(self) -> None:
        """Take over the policy's weights by their share."""
        policy = trained_arrays(self.model)
        self.arrays = policy if self.mix == 1 else self._mixed(policy)
        self.moved = True
        mx.eval(self.arrays)

    def _mixed(self, policy: Arrays) -> Arrays:
        if self.method == "full":
            return {name: self.mix * array + (1 - self.mix) * self.arrays[name] for name, array in policy.items()}
        return {name: _beside(name, self.arrays.get(name), array, self.mix) for name, array in policy.items()}

    def refreshed(self, batch: Batch) -> Batch:
        """The batch with this reference's log-probs."""
        if not self.moved:
            return batch
        with swapped_in(self.model, self.arrays), dropout_off(self.model):
            found = self.score(self.model, batch)
            evaluate_batch(batch, found)
        if isinstance(found, RowDetails):
            return batch._replace(ref=found.logps, ref_shared=found.shared)
        return batch._replace(ref=found)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint that is being made."""
        if self.arrays:
            marked = self.arrays | {"moved": mx.array(self.moved)}
            save_checksummed(folder / FILE, marked)

    def restore(self, folder: Path) -> None:
        """Bring it back to what it was at a checkpoint, to the bit."""
        if (folder / FILE).exists():
            saved: Arrays = load_checksummed(folder / FILE)
            self.moved = bool(saved.pop("moved").item())
            self.arrays = saved


def trained_arrays(model: nn.Module) -> Arrays:
    """The trained arrays by name. Updates replace arrays and never change one, so they need no copy."""
    return dict(tree_flatten(model.trainable_parameters()))


def _beside(name: str, old: mx.array | None, new: mx.array, mix: float) -> mx.array:
    """The matrices of two low-rank products side by side; the second ones carry the shares."""
    second = name.endswith("lora_b")
    share = mix if second else 1.0
    if old is None:
        return new * share
    axis = {(False, 2): 1, (False, 3): 1, (True, 2): 0, (True, 3): 2}[second, new.ndim]  # 3: one matrix per expert
    return mx.concatenate([old * (1 - mix) if second else old, new * share], axis=axis)


@contextlib.contextmanager
def swapped_in(model: nn.Module, arrays: Mapping[str, mx.array]) -> Iterator[Any]:
    """The model with other arrays in place of its trained ones, while the context lasts."""
    own = list(trained_arrays(model).items())
    model.load_weights(list(arrays.items()), strict=False)
    try:
        yield model
    finally:
        model.load_weights(own, strict=False)
