"""Kernels of a training step on Metal, counted in the compiled graph; nothing is computed, and no Mac is needed.

python -m benchmarks.kernels [--pairs 2 --prompt 256 --completion 128] [--checkpoint]

A step is log-probs, loss and gradient of one batch; the optimizer's part is the same for both trainers. mlx-lm-lora's
own functions are traced beside where they can be imported. What MLX has one fused kernel for on Metal (attention,
norms, rotary embeddings, cross entropy) counts as one, and one for each gradient of it that is used; what `mx.compile`
joined counts as one; views count nothing. The graph that MLX shows has no shapes, so bytes cannot be counted in it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.config import LoraConfig, LossConfig, ModelConfig
from mlxdpo.data.batching import collate
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.losses import resolve
from mlxdpo.machine import device
from mlxdpo.machine.device import Machine
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.training.step import make_gradient
from mlxdpo.types import Example

MAC = Machine("metal", "made up", 11 << 30, "Darwin")
VIEWS = {
    "Broadcast", "Reshape", "Flatten", "Unflatten", "Transpose", "ExpandDims", "Squeeze", "Slice", "Split", "Depends",
    "CustomTransforms", "StopGradient", "AsStrided", "View", "Copy",
}  # fmt: skip
MATMULS = {"Matmul", "AddMM", "QuantizedMatmul", "GatherMM"}
FUSED = ("scaled_dot_product_attention", "rms_norm", "layer_norm", "rope", "cross_entropy")


class Counted(NamedTuple):
    """Kernels of a step, and how many of them are matmuls, fused attention and its gradients, elementwise."""

    kernels: int
    matmuls: int
    names: Counter[str]


def counted(result: Any) -> Counted:
    """The kernels that a tree of arrays takes, none of which is computed yet."""
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *(array for _, array in tree_flatten(result)))
        found = re.findall(r'label ="(\w+)", shape=rectangle', Path(file.name).read_text())
    names = Counter(name for name in found if name not in VIEWS)
    return Counted(names.total(), sum(names[name] for name in MATMULS), names)


@contextmanager
def on_metal() -> Iterator[None]:
    """What is traced in here takes the branches of a Mac; each of `FUSED` is one kernel, as is each gradient of it."""
    before = {name: getattr(mx.fast, name) for name in FUSED}
    found, device._detect_machine = device._detect_machine, lambda: MAC
    for name in FUSED:
        setattr(mx.fast, name, _one_kernel(name == "cross_entropy"))
    try:
        yield
    finally:
        device._detect_machine = found
        for name, function in before.items():
            setattr(mx.fast, name, function)


def _one_kernel(by_row: bool) -> Callable[..., mx.array]:
    """Stands for a fused function of its first array: one kernel that waits for the other arrays."""

    def stand_in(*arguments: Any, **options: Any) -> mx.array:
        """The kernel; its gradient by an array has that array's shape."""
        arrays = [a for a in arguments if isinstance(a, mx.array)]

        def forward(*given: mx.array) -> mx.array:
            """As large as the first array, or a number for each of its rows."""
            first = given[0][..., 0] if by_row else given[0]
            return _after(first, given[1:])

        def backward(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
            """A kernel for each array."""
            return tuple(_after(a, [cotangent]) for a in primals)

        run = mx.custom_function(forward)
        run.vjp(lambda primals, cotangent, output: backward(_several(primals), cotangent, output))
        return run(*arrays)

    return stand_in


def _after(array: mx.array, others: Sequence[mx.array]) -> mx.array:
    """One kernel of the size of an array; it is no elementwise one, which `mx.compile` would join to others."""
    sorted_ = mx.sort(array, axis=-1)
    return mx.depends([sorted_], list(others))[0] if others else sorted_


def _several(primals: Any) -> Any:
    return primals if isinstance(primals, tuple | list) else (primals,)


def our_step(model: nn.Module, pairs: list[Example], checkpoint: bool) -> Any:
    """mlxdpo's step over a batch of the pairs, reference log-probs known: losses and gradients."""
    batch = collate(pairs, tuple(range(len(pairs))), len(pairs), np.zeros((len(pairs), 2), np.float32))
    mx.eval(list(batch[:-1]))
    gradient = make_gradient(model, resolve(LossConfig()), forward_fns(model, checkpoint).train)
    found = gradient(batch, mx.array(1 / len(pairs)))
    return found.losses, found.gradients


def peer_step(model: nn.Module, reference: nn.Module, pairs: list[Example]) -> Any:
    """mlx-lm-lora's, put together from its own functions as its `train_dpo` does: loss and gradients."""
    from mlx_lm_lora.trainer.dpo_trainer import compute_score, dpo_loss, get_token_scores

    rows, masks = {}, {}
    for name in ("chosen", "rejected"):
        whole = [np.concatenate([pair.prompt, getattr(pair, name)]) for pair in pairs]
        rows[name] = mx.array(np.stack(whole))
        masks[name] = mx.array(np.stack([np.arange(len(row)) >= len(pairs[0].prompt) for row in whole])).astype(
            mx.float32
        )
    mx.eval(rows, masks)

    def scores(side: nn.Module) -> dict[str, mx.array]:
        """(B,) of chosen and rejected."""
        return {n: compute_score(get_token_scores(side, rows[n], masks[n]), masks[n], "sigmoid") for n in rows}

    def loss(_: nn.Module) -> mx.array:
        """The mean of the batch."""
        policy, frozen = scores(model), {n: mx.stop_gradient(a) for n, a in scores(reference).items()}
        return dpo_loss(
            *policy.values(), *frozen.values(), masks["chosen"], masks["rejected"], 0.1, 50.0, loss_type="sigmoid"
        )[0]  # fmt: skip

    return mx.compile(lambda: nn.value_and_grad(model, loss)(model), inputs=[model.state, reference.state])()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=128)
    parser.add_argument("--checkpoint", action="store_true")
    asked = parser.parse_args()
    config = ModelConfig(path="smollm2", dtype="bfloat16")
    model: Any = attach_lora(load_policy(config).model, LoraConfig())
    draw = np.random.default_rng(0)
    lengths = (asked.prompt, asked.completion, asked.completion)
    pairs = [
        Example(*(draw.integers(100, 40_000, n).astype(np.int32) for n in lengths), where="")
        for _ in range(asked.pairs)
    ]
    with on_metal():
        found = {"mlxdpo": counted(our_step(model, pairs, asked.checkpoint))}
        try:
            found["mlx-lm-lora"] = counted(peer_step(model, load_policy(config).model, pairs))
        except ImportError as error:
            print(f"mlx-lm-lora is not traced: {error}\n")
    print("| | kernels | of them matmuls | most frequent |\n|---|---|---|---|")
    for name, one in found.items():
        most = ", ".join(f"{word[:24]} {count}" for word, count in one.names.most_common(6))
        print(f"| {name} | {one.kernels:,} | {one.matmuls:,} | {most} |")


if __name__ == "__main__":
    main()
