"""Which stored tensors a model's parameters are: mlx-lm's `sanitize` followed instead of inverted.

A hundred model files rename, drop, stack or transform tensors on loading. The loader is run on lazy arrays and asked
afterwards: a parameter that is the very array that was stored has kept its values and only, perhaps, its name. What was
stacked is found again by its values. Anything else counts as unknown, and is refused by whoever needs it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.io.checksum import read_tensors


class Origins(NamedTuple):
    """Of one model folder: `stored` names each tensor's file, `one` the tensor a parameter is, `made` those it is not.

    `unused` are tensors that no parameter has: tied heads stored twice, buffers, experts before they were stacked.
    """

    stored: dict[str, Path]
    one: dict[str, str]
    made: dict[str, mx.array]
    unused: dict[str, mx.array]

    def of(self, parameter: str) -> tuple[str, ...] | None:
        """The tensors that make up a parameter, in their order along its first axis; None when that is not known."""
        if parameter in self.one:
            return (self.one[parameter],)
        if parameter not in self.made or self.made[parameter].ndim < 3:
            return None
        whole, known = self.made[parameter], {}
        for name, array in self.unused.items():
            if array.shape == whole.shape[1:] and array.dtype == whole.dtype:
                known[_array_digest(array)] = name
        found = [known.get(_array_digest(part)) for part in whole]
        return tuple(name for name in found if name) if all(found) and len(set(found)) == len(found) else None


def origins(folder: Path) -> Origins:
    """Follow mlx-lm's loader through the tensors of `folder`; reads headers only."""
    from mlx_lm.utils import _get_classes, load_config

    config = load_config(folder)
    model_class, arguments = _get_classes(config)
    stored, files = {}, {}
    for file in weight_files(folder):
        part = read_tensors(file)
        stored |= part
        files |= dict.fromkeys(part, file)
    model = model_class(arguments.from_dict(config))  # `sanitize` may change the model: this one is for it alone
    parameters = model.sanitize(dict(stored)) if hasattr(model, "sanitize") else dict(stored)
    names = {id(array): name for name, array in stored.items()}
    one = {name: names[id(array)] for name, array in parameters.items() if id(array) in names}
    made = {name: array for name, array in parameters.items() if name not in one}
    unused = {name: array for name, array in stored.items() if name not in set(one.values())}
    return Origins(files, one, made, unused)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order."""
    return sorted(folder.glob("model*.safetensors"))


def _array_digest(array: mx.array) -> bytes:
    return hashlib.sha256(np.array(array.view(mx.uint8)).tobytes()).digest()
