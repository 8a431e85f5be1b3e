"""Which attention, SwiGLU and recurrences the layers of a model call: mlx-lm's, or this project's where those take less
memory.

mlx-lm finds each by name in a file. A name is replaced while it is needed and put back; nothing is changed on a class.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, bailing_hybrid, bailing_moe_linear, base, gated_delta

from mlxdpo.forward import metal_routing
from mlxdpo.forward.attention import Branches, chunked_attention, short_attention
from mlxdpo.forward.elementwise import swiglu
from mlxdpo.forward.gated_delta import chunked_gated_delta
from mlxdpo.machine.device import this_machine

UNFUSED_FROM = 1024  # keys: chunks are faster from here on where MLX has no fused kernel
SHORT = 512  # tokens: up to here a CPU had better keep the softmax
NAME = "scaled_dot_product_attention"


def chunking_is_faster(kind: str, keys: int, fused: bool) -> bool:
    """Whether chunks beat MLX's own attention: the one place of that rule.

    `kind` is `Machine.kind`, `keys` their number in tokens, `fused` whether MLX differentiates the call without
    storing its scores (`metal_routing.is_fused`; CUDA is taken to fuse what has no array mask). A CPU never does, and
    its softmax alone takes longer than all of this: a SmolLM2 step over rows of 384 tokens 5.1 -> 4.7 s, 1.9 -> 1.6 GB.
    """
    return kind == "cpu" or (not fused and keys >= UNFUSED_FROM)


def fused_here(q: mx.array, k: mx.array, v: mx.array, masked: bool) -> bool:
    """Whether this machine's MLX differentiates attention over q (B, H, L, D), k and v (B, K, T, D) without storing
    its scores; `masked` says that the mask is an array."""
    kind = this_machine().kind
    if kind != "metal":
        return kind == "cuda" and not masked
    sizes = q.shape[3], v.shape[3], q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    return metal_routing.is_fused(*sizes, q.dtype, "array" if masked else "causal", training=True)


def causal_mask(queries: int, offset: int, window: int | None, array: bool = False) -> mx.array | str:
    """The mask of `queries` tokens after `offset` others: "causal" wherever it says all, so that MLX keeps the
    attention that takes less memory; an array, True where a query may look, where a sliding window (tokens) cuts
    something off, or where an `array` is asked for."""
    if array or (window is not None and offset + queries > window):
        return base.create_causal_mask(queries, offset, window_size=window)
    return "causal"


def causal_window(mask: mx.array, queries: int, keys: int) -> int | None:
    """The window, in tokens, of a bool mask that is a causal sliding window of `queries` x `keys`; else None.

    Proved by value, not guessed: mlx-lm hands its layers a bare array. No tracing stands in the way, because such a
    mask is made of constants. Only where it is an argument of a function under `mx.checkpoint` inside `mx.compile`
    can it not be read, which gives None; a layer under a checkpoint must close over its mask. A full causal mask has
    window `keys`.
    """
    if mask.dtype != mx.bool_ or mask.size != queries * keys or keys < queries:
        return None
    mask = mask.reshape(queries, keys)
    try:
        window = int(mask[-1].sum().item())
    except ValueError:  # MLX's word for an array that is being traced
        return None
    expected = base.create_causal_mask(queries, keys - queries, window_size=window)
    return window if window and mx.array_equal(mask, expected).item() else None


def own_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """mlx-lm's `scaled_dot_product_attention`, in chunks for the calls where that is the same thing and faster.

    A mask that attends for itself (`packed.PackedMask`) is asked to.
    """
    if attend := getattr(mask, "attend", None):
        return attend(queries, keys, values, scale, sinks)
    mlx_lm = functools.partial(base.scaled_dot_product_attention, queries, keys, values, cache, scale, mask, sinks)
    if hasattr(cache, "bits") or sinks is not None or mask is None:
        return mlx_lm()
    masked, L, T = isinstance(mask, mx.array), queries.shape[2], keys.shape[2]
    if T < L or not chunking_is_faster(this_machine().kind, T, fused_here(queries, keys, values, masked)):
        return mlx_lm()
    window = causal_window(mask, L, T) if masked else T
    if window is None or not (masked or mask == "causal"):
        return mlx_lm()
    if window >= T and T <= SHORT and this_machine().kind == "cpu":
        return short_attention(queries, keys, values, scale=scale)
    return chunked_attention(queries, keys, values, scale=scale, window=window if window < T else None)


NAMES = (NAME, "swiglu", "gated_delta_ops", "recurrent_gla")
MLX_LM = (
    base.scaled_dot_product_attention,
    activations.swiglu,
    gated_delta.gated_delta_ops,
    bailing_moe_linear.recurrent_gla,
)
# The recurrence of bailing_moe_linear is that of bailing_hybrid, which mlx-lm computes in chunks.
OURS = (own_attention, swiglu, chunked_gated_delta, bailing_hybrid.recurrent_gla)
# Files whose functions go through a row token by token: all layers with such a recurrence look them up there.
LOOPS = (gated_delta, bailing_moe_linear)
# mlx-lm's files whose recurrence goes through a row token by token, and stays so.
UNROLLED = frozenset({"mamba", "jamba", "rwkv7", "recurrent_gemma"})


def tree_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    branches: Branches,
    window: int | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention in trees of tokens: queries (B, H, L, D) are the last L of the T tokens of keys and values
    (B, K, T, D) -> (B, H, L, D)."""
    L, T = queries.shape[2], keys.shape[2]
    if sinks is None and chunking_is_faster(this_machine().kind, T, fused_here(queries, keys, values, masked=True)):
        return chunked_attention(queries, keys, values, scale=scale, window=window, branches=branches)
    mask = branches.visible(T - L, T, 0, T, window)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


_users: Counter[ModuleType] = Counter()
_lock = threading.Lock()


def layer_types(model: nn.Module) -> set[type]:
    """The classes of the model and of all its layers. MLX's `modules()` takes milliseconds, and each batch asks."""
    found, left = set(), [model]
    while left:
        part = left.pop()
        if isinstance(part, nn.Module):
            found.add(type(part))
        if isinstance(part, dict):  # a module is one
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
    return found


def attention_files(model: nn.Module) -> list[ModuleType]:
    """The mlx-lm model files whose layers `model` is made of and that call `scaled_dot_product_attention` by name.

    Not a file that defines another function under that name, nor one that writes its attention out (gemma2): their
    attention stays what it is.
    """
    names = {parent.__module__ for layer in layer_types(model) for parent in layer.__mro__}
    ours = (base.scaled_dot_product_attention, own_attention)
    files = [sys.modules[name] for name in sorted(names)]
    return [file for file in files if file is not base and vars(file).get(NAME) in ours]


def unrolled_in(model: nn.Module) -> str | None:
    """The file of `UNROLLED` that layers of `model` come from, or None."""
    return min(UNROLLED & {layer.__module__.rpartition(".")[2] for layer in layer_types(model)}, default=None)


@contextmanager
def chunked_attention_on(model: nn.Module, longest: int) -> Iterator[bool]:
    """While it lasts, `model` attends in chunks wherever `chunking_is_faster`; `longest` is its longest row in tokens.

    Yields whether anything was replaced. Another model of the same file attends so too (same values, other order of
    sums); one of another file does not. A function compiled inside keeps what it was traced with, so trace
    inside.
    """
    files = attention_files(model) if chunking_is_faster(this_machine().kind, longest, fused=False) else []
    del model  # or this generator would keep it in memory: a reference is dropped once it is scored
    with patched(files):
        yield bool(files)


@contextmanager
def patched(files: Sequence[ModuleType]) -> Iterator[None]:
    """While it lasts, the layers of mlx-lm's model `files` call `own_attention` and `swiglu`, and the recurrences of
    every model go through rows in chunks.

    It replaces names in each file and puts them back, also after an exception; it can be nested, and left in any
    order from several threads.
    """
    files = [*files, *(loop for loop in LOOPS if loop not in files)]
    with _lock:
        for file in files:
            _users[file] += 1
            _replace_names(file, MLX_LM, OURS)
    try:
        yield
    finally:
        with _lock:
            for file in files:
                _users[file] -= 1
                if not _users[file]:
                    _replace_names(file, OURS, MLX_LM)


def _replace_names(file: ModuleType, before: Sequence[Any], after: Sequence[Any]) -> None:
    for name, old, new in zip(NAMES, before, after, strict=True):
        if vars(file).get(name) is old:
            setattr(file, name, new)
