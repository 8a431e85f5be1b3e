"""Gradient checkpointing of any layer: exact, whatever a layer is given and whatever it leaves behind.

A layer's call is a pure function once every array goes in and out by name: those of its arguments, and those in objects
that it changes on its way (caches, and what some models hand from layer to layer). So the keys and states of a prefix
leave one checkpoint as outputs and enter the next as inputs, and keep their gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.cache import _BaseCache

from mlxdpo.forward.patch_mlx_lm import attention_files, patched
from mlxdpo.forward.streams import pin_to_stream
from mlxdpo.forward.watch import Watcher, watched_all


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """While it lasts, each call of a layer keeps its inputs alone and is computed again in the backward pass."""
    files = attention_files(model)
    with watched_all(model.layers, lambda layer: _again(layer, files)):
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


def _put_back(tree: Any, arrays: Sequence[mx.array], objects: Sequence[Any]) -> Any:
    kinds: dict[type, Sequence[Any]] = {_Array: arrays, _Object: objects}
    return _map_leaves(lambda leaf: kinds[type(leaf)][leaf] if type(leaf) in kinds else leaf, tree)


def _take_out(tree: Any, arrays: list[mx.array], objects: list[Any]) -> Any:
    def number(leaf: Any) -> Any:
        """Only floats are inputs: closed over, the value of a mask can still be read (`causal_window`)."""
        if isinstance(leaf, mx.array):
            return _Array(_number(arrays, leaf)) if mx.issubdtype(leaf.dtype, mx.floating) else leaf
        return _Object(_number(objects, leaf)) if _holds_arrays(leaf) else leaf

    return _map_leaves(number, tree)


# A module is a dict, but nothing to take apart. What is fixed stands outside: a function that referred to itself from
# within would keep arrays until the garbage collector comes.
_map_leaves = functools.partial(tree_map, is_leaf=lambda node: isinstance(node, nn.Module) or _holds_arrays(node))


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


def _holds_arrays(node: Any) -> bool:
    """Whether a layer may keep arrays in it: a cache, or another object of a class of a model's file (kimi_k3)."""
    own = type(node).__module__.startswith("mlx_lm.models") and hasattr(node, "__dict__")
    return isinstance(node, _BaseCache) or (own and not isinstance(node, (nn.Module, str)))


def _bare(thing: Any) -> Any:
    """An object of the same class without fields."""
    kind: Any = type(thing)
    return kind.__new__(kind)
