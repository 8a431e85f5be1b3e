"""Looking at a model from outside while its own code runs, so that no architecture needs to be known.

A module is watched by exchanging its instance's class for a subclass: that reaches an embedding's `as_linear` too, a
quantised or adapted layer, and one inside a wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import mlx.nn as nn

Watcher = Callable[..., Any]
"""(own, *args, **kwargs) -> what the method returns; `own` is the bound method as it was."""


@contextmanager
def watched(module: nn.Module, **watchers: Watcher) -> Iterator[None]:
    """While it lasts `module`'s methods of these names are its watchers. It can be nested, left in reverse order."""
    kind = type(module)
    methods = {name: _through(getattr(kind, name), name, watchers) for name in watchers}
    module.__class__ = type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__})  # type: ignore[assignment]
    try:
        yield
    finally:
        module.__class__ = kind  # type: ignore[assignment]
        watchers.clear()  # a class lives until the garbage collector comes, and would keep the arrays that they saw


def _through(method: Callable[..., Any], name: str, watchers: dict[str, Watcher]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: watchers[name](lambda *a, **k: method(self, *a, **k), *args, **kwargs)


@contextmanager
def watched_all(modules: Iterable[nn.Module | None], watcher: Callable[[nn.Module], Watcher]) -> Iterator[None]:
    """While it lasts each of the modules, a model's layers for example, is called through its own `watcher(module)`."""
    with ExitStack() as stack:
        # Two names of one module are one; pipelined models leave out some layers.
        for module in {id(module): module for module in modules if module is not None}.values():
            stack.enter_context(watched(module, __call__=watcher(module)))
        yield
