"""Parts of a batch side by side on the cores of a CPU, where MLX runs every kernel but the matmuls on one core.

A stream of MLX's CPU back end is one thread that takes kernel after kernel; only the BLAS uses more cores. So a batch
is cut by prompts into parts (`Batch.parts`), and part n is computed in *lane* n, a stream of its own, each with a BLAS
of one thread. Nothing here happens on a GPU, which has one lane.

Three things make lanes run at the same time rather than one after the other:

- MLX hands out about a hundred kernels ahead, in the order of its graph, so lanes must alternate there: `abreast` ties
  them together behind every block of the model, and `platform.look_wide` lets MLX walk its graph in breadth.
- What a gradient of our own computes must stay in its lane: `here` remembers in which one a function was written down.
- Two matmuls at a time would fight for the BLAS's threads: `evaluate` gives each lane one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import mlx.core as mx

from mlxdpo.machine.openblas import single_blas

# The way of a batch through a model's blocks, written down before it is gone, so that several can be gone abreast.


class LayerPlan(NamedTuple):
    """What enters the first block, each block as a function of what enters it, and how to read the states at the end.

    The arrays of a state are (..., D) hidden states; every block gives as many as it takes.
    """

    enter: State
    blocks: Sequence[Callable[..., State]]
    leave: Callable[..., mx.array]


def run_layers(passages: Sequence[Callable[[], LayerPlan]]) -> list[mx.array]:
    """The states at the end of each passage, the n-th gone in lane n, all of them block by block."""
    opened = map_streams(lambda passage: passage(), passages)
    states = [passage.enter for passage in opened]
    for blocks in zip(*(passage.blocks for passage in opened), strict=True):
        states = interleave(map_streams(lambda block, state: block(*state), blocks, states))
    return map_streams(lambda passage, state: passage.leave(*state), opened, states)


State = tuple[mx.array, ...]


def stream(number: int) -> AbstractContextManager[Any]:
    """Inside it operations are written down for that lane; lane 0 is where everything else is."""
    return mx.stream(_mlx_stream(number)) if number else contextlib.nullcontext()


@functools.cache
def _mlx_stream(number: int) -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)


def map_streams(function: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
    """`map`, the n-th call in lane n."""
    results = []
    for number, items in enumerate(zip(*columns, strict=True)):
        with stream(number):
            results.append(function(*items))
    return results


def interleave(states: Sequence[State]) -> list[State]:
    """The states of all lanes, none of which can be used before all are there; the same for their gradients."""
    if len(states) == 1:
        return list(states)
    ends = [sum(map(len, states[: n + 1])) for n in range(len(states))]
    cuts = [slice(end - len(state), end) for end, state in zip(ends, states, strict=True)]

    def tie(*flat: mx.array) -> State:
        """Each lane's arrays, dependent on all others."""
        tied = map_streams(lambda cut: mx.depends(list(flat[cut]), [*flat[: cut.start], *flat[cut.stop :]]), cuts)
        return tuple(array for lane in tied for array in lane)

    run = mx.custom_function(tie)
    run.vjp(lambda primals, cotangents, outputs: tie(*cotangents))
    flat = run(*(array for state in states for array in state))
    return [flat[cut] for cut in cuts]


def pin_to_stream(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose operations go to the lane that is current now, whenever it is called.

    For what MLX calls in its backward pass: gradients of our own and blocks under a checkpoint.
    """
    current = mx.default_stream(mx.default_device())

    @functools.wraps(function)
    def pinned(*args: Any) -> Any:
        """In its lane."""
        with mx.stream(current):
            return function(*args)

    return pinned


def with_gradient(function: Callable[..., Any], gradient: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a gradient of its own: `gradient(primals, cotangents, outputs)`, as `mx.custom_function` has it.

    The gradient is computed in the lane of the call.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        """One call, one lane."""
        call = mx.custom_function(function)
        call.vjp(pin_to_stream(gradient))
        return call(*args)

    return run


def evaluate_parts(parts: Sequence[Any], *found: Any) -> None:
    """Evaluate what was found of a batch with these `parts`: in lanes, a matmul takes one thread."""
    with single_blas() if parts else contextlib.nullcontext():
        mx.eval(*found)
