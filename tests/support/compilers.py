"""On a CPU the product does not compile its step; a GPU does. These tests force it, where a C++ compiler is found.

Each kernel that is new to a machine is a call of that compiler, minutes in all: they run in CI alone.
"""

import functools

import mlx.core as mx
import pytest


@functools.cache
def can_compile() -> bool:
    """Whether `mx.compile` works here: on a CPU it calls a C++ compiler at run time."""
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + x)(mx.ones(3)))
    except RuntimeError:
        return False
    return True


COMPILING = (
    pytest.mark.skipif(not can_compile(), reason="mx.compile on a CPU needs a C++ compiler"),
    pytest.mark.slow,
)


def compiling(test):
    """Mark a test that calls a C++ compiler."""
    for mark in COMPILING:
        test = mark(test)
    return test
