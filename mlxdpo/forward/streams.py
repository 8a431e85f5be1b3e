"""Streams: parts of a batch computed at a time on a CPU, where MLX runs every kernel but the matmuls on one core.

A stream of MLX's CPU back end is one thread that takes kernel after kernel; only the BLAS uses more cores. So a batch
is cut between rows into parts (`Batch.parts`), and part n is computed in stream n, with a BLAS of one thread. A GPU has
one stream here, and nothing below does anything.

Two things make streams run at the same time rather than one after the other:

- MLX hands out about a hundred kernels ahead, in the order of its graph, so streams must alternate there: `interleave`
  ties them together behind every layer, and `openblas.look_wide` lets MLX walk its graph in breadth.
- What MLX calls in its backward pass must stay in its stream: `pin_to_stream` remembers it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx

Arrays = tuple[mx.array, ...]


def stream(number: int) -> AbstractContextManager[Any]:
    """Inside it operations go to that stream; stream 0 is where everything else is."""
    return mx.stream(_mlx_stream(number)) if number else contextlib.nullcontext()


@functools.cache
def _mlx_stream(number: int) -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)


def map_streams(function: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
    """`map`, the n-th call in stream n."""
    results = []
    for number, items in enumerate(zip(*columns, strict=True)):
        with stream(number):
            results.append(function(*items))
    return results


def interleave(states: Sequence[Arrays]) -> list[Arrays]:
    """The arrays of all streams, none of which can be used before all are there; the same for their gradients."""
    if len(states) == 1:
        return list(states)
    ends = [sum(map(len, states[: n + 1])) for n in range(len(states))]
    cuts = [slice(end - len(state), end) for end, state in zip(ends, states, strict=True)]

    def tie(*flat: mx.array) -> Arrays:
        """Each stream's arrays, dependent on all others."""
        tied = map_streams(lambda cut: mx.depends(list(flat[cut]), [*flat[: cut.start], *flat[cut.stop :]]), cuts)
        return tuple(array for arrays in tied for array in arrays)

    run = mx.custom_function(tie)
    run.vjp(lambda primals, cotangents, outputs: tie(*cotangents))
    flat = run(*(array for state in states for array in state))
    return [flat[cut] for cut in cuts]


def pin_to_stream(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose operations go to the stream that is current now, whenever it is called."""
    current = mx.default_stream(mx.default_device())

    @functools.wraps(function)
    def pinned(*args: Any) -> Any:
        """In the stream of then."""
        with mx.stream(current):
            return function(*args)

    return pinned
