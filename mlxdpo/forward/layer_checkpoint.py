"""Gradient checkpointing of any layer: exact, whatever a layer is given and whatever it leaves behind.

A layer's call is a pure function once every array goes in and out by name: those of its arguments, and those in objects
that it changes on its way (caches, and what some models hand from layer to layer). So the keys and states of a prefix
leave one checkpoint as outputs and enter the next as inputs, and keep their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import _BaseCache

from mlxdpo.forward.patch_mlx_lm import attention_files, patched
from mlxdpo.forward.streams import pin_to_stream
from mlxdpo.forward.watch import Watcher, watched_layers


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """While it lasts, each call of a layer keeps its inputs alone and is computed again in the backward pass."""
    files = attention_files(model)
    with watched_layers(model, lambda layer: _again(layer, files)):
        yield


def _again(layer: nn.Module, files: Sequence[ModuleType]) -> Watcher:
    def call(own: Any, *args: Any, **kwargs: Any) -> Any:
        """The layer under a checkpoint."""
        given = _take_apart((args, kwargs))
        form, left = given.emptied(), []

        def run(parameters: Any, *arrays: mx.array) -> list[mx.array]:
            """All arrays that the layer returns or leaves in objects; called again in the backward pass."""
            layer.update(parameters)
            objects = list(map(_bare, form.objects))
            args, kwargs = form.put_together(arrays, objects)
            with patched(files):
                found = _take_apart(own(*args, **kwargs), objects)
            left[:] = left or [found.emptied()]
            return found.arrays

        outputs = mx.checkpoint(pin_to_stream(run))(layer.trainable_parameters(), *given.arrays)
        new = left[0].objects[len(given.objects) :]
        return left[0].put_together(outputs, [*given.objects, *new])

    return call


class _Array(int):
    """Stands for the array of that number."""


class _Object(int):
    """Stands for the object of that number."""


class _Apart(NamedTuple):
    """A tree without its arrays and the objects that hold arrays: `form` has their numbers, `fields` what each object
    holds, in the same form. An array that occurs twice is there once: MLX's checkpoint (0.32.4) drops the cotangent of
    one that is returned twice."""

    form: Any
    fields: list[Any]
    objects: list[Any]
    arrays: list[mx.array]

    def emptied(self) -> _Apart:
        """The same without arrays, which would stay alive with it."""
        return self._replace(objects=list(map(_bare, self.objects)), arrays=[])

    def put_together(self, arrays: Sequence[mx.array], objects: Sequence[Any]) -> Any:
        """The tree with these arrays, and these objects, whose fields are set."""
        for thing, fields in zip(objects, self.fields, strict=True):
            thing.__dict__ = _put_back(fields, arrays, objects)
        return _put_back(self.form, arrays, objects)


# No function here refers to itself from within: such a circle would keep arrays until the garbage collector comes.
def _put_back(node: Any, arrays: Sequence[mx.array], objects: Sequence[Any]) -> Any:
    if isinstance(node, _Array):
        return arrays[node]
    return objects[node] if isinstance(node, _Object) else _each_branch(node, _put_back, arrays, objects)


def _take_out(node: Any, arrays: list[mx.array], objects: list[Any]) -> Any:
    """Only floats are inputs: closed over, the value of a mask can still be read (`causal_window`)."""
    if isinstance(node, mx.array):
        return _Array(_number(arrays, node)) if mx.issubdtype(node.dtype, mx.floating) else node
    return _Object(_number(objects, node)) if _holds_arrays(node) else _each_branch(node, _take_out, arrays, objects)


def _number(items: list[Any], one: Any) -> int:
    """Where it is among them, by identity; added if it is not."""
    at = next((i for i, item in enumerate(items) if item is one), len(items))
    if at == len(items):
        items.append(one)
    return at


def _take_apart(tree: Any, known: Sequence[Any] = ()) -> _Apart:
    """`tree` in parts; the objects `known` are the first, whether it has them or not."""
    arrays: list[mx.array] = []
    objects, fields = list(known), []
    form = _take_out(tree, arrays, objects)
    while len(fields) < len(objects):
        fields.append(_take_out(vars(objects[len(fields)]), arrays, objects))
    return _Apart(form, fields, objects, arrays)


def _each_branch(node: Any, function: Any, *given: Any) -> Any:
    """A list, tuple or dict with `function` of what is in it; anything else, modules too, as it is."""
    if isinstance(node, nn.Module):
        return node
    if isinstance(node, dict):
        return {name: function(one, *given) for name, one in node.items()}
    if not isinstance(node, (list, tuple)):
        return node
    items = [function(one, *given) for one in node]
    return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)


def _holds_arrays(node: Any) -> bool:
    """Whether a layer may keep arrays in it: a cache, or another object of a class of a model's file (kimi_k3)."""
    own = type(node).__module__.startswith("mlx_lm.models") and hasattr(node, "__dict__")
    return isinstance(node, _BaseCache) or (own and not isinstance(node, (nn.Module, str)))


def _bare(thing: Any) -> Any:
    """An object of the same class without fields."""
    kind: Any = type(thing)
    return kind.__new__(kind)
