"""The gated delta rule in chunks against mlx-lm's loop over tokens: time and memory, value and gradient.

    python -m benchmarks.recurrence                      1,024 tokens, 4 heads of 128 x 128, decays by head and channel
    python -m benchmarks.recurrence --tokens 2048 --heads 32

Both take turns, so that what else the machine does hits both alike; printed are medians, their ratio, and the most
memory that MLX held beyond the inputs. Each turn computes y and all gradients of one layer's recurrence.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlxdpo  # isort: skip  # noqa: F401  (before mlx: it puts the fast BLAS in front)
import mlx.core as mx
import numpy as np
from mlx_lm.models.gated_delta import gated_delta_ops

from mlxdpo.forward.gated_delta import chunked_gated_delta
from mlxdpo.machine.openblas import single_blas


def layer_inputs(tokens: int, heads: int, size: int, channels: bool) -> list[mx.array]:
    """q, k, v, g and beta of one row: half as many heads of keys where decays are by head, as in Qwen3.5."""
    draw, of_keys = np.random.default_rng(0), heads if channels or heads < 2 else heads // 2
    q, k = (draw.normal(size=(1, tokens, of_keys, size)) for _ in range(2))
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    g = np.exp(-draw.uniform(0, 0.5, size=(1, tokens, heads, size)[: 4 if channels else 3]))
    beta = 1 / (1 + np.exp(-draw.normal(1, 1.5, size=(1, tokens, heads))))
    v = draw.normal(size=(1, tokens, heads, size))
    return [mx.array(a.astype(np.float32)) for a in (q * size**-0.5, k, v, g, beta)]


def one_turn(rule: Callable[..., Any], arrays: list[mx.array]) -> tuple[float, int, list[mx.array]]:
    """Seconds, bytes, and what was computed: the mean square of y, and its gradients."""
    both = mx.value_and_grad(lambda *given: rule(*given)[0].square().mean(), argnums=tuple(range(len(arrays))))
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    value, found = both(*arrays)
    mx.eval(value, found)
    return time.perf_counter() - start, mx.get_peak_memory() - before, [value, *found]


def apart(got: list[mx.array], want: list[mx.array]) -> float:
    """The largest relative distance of two results."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(got, want, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.recurrence", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--tokens", type=int, default=1024, help="of the row (default 1024)")
    add("--heads", type=int, default=4, help="of the values (default 4)")
    add("--size", type=int, default=128, help="of a head, keys and values (default 128)")
    add("--repeats", type=int, default=3, help="turns of each, after one that does not count (default 3)")
    asked = parser.parse_args()
    print("| decays | loop | chunks | times as fast | memory of the loop | of the chunks | ratio | apart |")
    print("|---|---|---|---|---|---|---|---|")
    rules = {"loop": gated_delta_ops, "chunks": chunked_gated_delta}
    for channels in (False, True):
        arrays = layer_inputs(asked.tokens, asked.heads, asked.size, channels)
        mx.eval(arrays)
        seconds: dict[str, list[float]] = {name: [] for name in rules}
        memory, found = dict.fromkeys(rules, 0), {}
        with single_blas():  # as in a step: the parts of a batch have a thread each
            for turn in range(asked.repeats + 1):
                for name, rule in rules.items():
                    took, peak, found[name] = one_turn(rule, arrays)
                    memory[name] = max(memory[name], peak)
                    if turn:
                        seconds[name].append(took)
        loop, chunks = (statistics.median(seconds[name]) for name in rules)
        print(
            f"| {'by channel' if channels else 'by head'} | {loop:.2f} s | {chunks:.3f} s | {loop / chunks:.1f} "
            f"| {memory['loop'] / 1e6:.0f} MB | {memory['chunks'] / 1e6:.0f} MB "
            f"| {memory['loop'] / memory['chunks']:.1f} | {apart(found['chunks'], found['loop']):.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
