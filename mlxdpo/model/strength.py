"""The strength of an adapter, and weighted sums of several: exact in the weights, nothing is trained.

A LoRA adapter adds scale * A B to frozen weights w0 (arXiv 2106.09685 eq. 3). With the factor `strength` before that
product the weights are w0 + strength * (w - w0), the line through the untuned and the tuned model: section 3.3 of WARP
(arXiv 2406.16768, linear interpolation towards initialization). Weighted sums of adapters trained apart are the
averages of model soups (arXiv 2203.05482), here as products of a larger rank. Both move weights. Decoding-time
realignment (arXiv 2402.02992) mixes the logits of the two models instead, which costs two forward passes; it is what
tuning with beta / strength would give at the optimum, and the weights' line agrees with it to first order only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.config import LoraConfig
from mlxdpo.io.checksum import load_checksummed
from mlxdpo.model.adapters import WEIGHTS, adapters_off, read_settings
from mlxdpo.types import UserError

Arrays = dict[str, mx.array]


def check_strength(strength: float) -> None:
    """Raise `UserError` for a strength that is none: it is a finite number, 0 or more."""
    if not 0 <= strength < float("inf"):
        raise UserError(f"--strength is {strength}; expected 0 (the untuned model) to about 2, 1 is as trained")


def refuse_dora(method: str, folder: Path) -> None:
    """Raise `UserError` for DoRA, whose update is no product that a factor could scale."""
    if method == "dora":
        raise UserError(
            f"{folder}: lora.method dora trains row magnitudes separately from the product, so scaling it is not a "
            f"strength, and a sum of two is not DoRA; tune with lora.method lora"
        )


@contextlib.contextmanager
def scaled(model: nn.Module, strength: float) -> Iterator[nn.Module]:
    """`model` with its LoRA adapters at `strength`, while the context lasts. 1 changes nothing and 0 takes the adapters
    out, both to the bit."""
    if strength == 0:
        with adapters_off(model):
            yield model
        return
    wrapped = [module for _, module in model.named_modules() if "lora_a" in module]
    before = [module.scale for module in wrapped]
    for module, scale in zip(wrapped, before, strict=True):
        module.scale = scale * strength
    try:
        yield model
    finally:
        for module, scale in zip(wrapped, before, strict=True):
            module.scale = scale


def weighted_sum(terms: Sequence[tuple[Path, float]]) -> tuple[LoraConfig, Arrays]:
    """One adapter that adds the weighted sum of what the adapters in several folders add: settings and arrays.

    sum_i w_i s_i A_i B_i = [A_1 ... A_n] [w_1 s_1 B_1; ...; w_n s_n B_n]: the ranks add up, and no rank is lost. One
    adapter alone keeps its arrays, and its scale takes the weight. Arrays are float32 where several are added. Weights
    of every-weight runs are not adapters: see `interpolated`. Raises `UserError` for DoRA, and for adapters of unlike
    layers.
    """
    settings = [read_settings(folder) for folder, _ in terms]
    for (folder, _), lora in zip(terms, settings, strict=True):
        refuse_dora(lora.method, folder)
    loaded = [load_checksummed(folder / WEIGHTS) for folder, _ in terms]
    if len(terms) == 1:
        return _alone(settings[0], loaded[0], terms[0][1])
    for (folder, _), lora, arrays in zip(terms, settings, loaded, strict=True):
        if lora.method != "lora" or arrays.keys() != loaded[0].keys() or lora.layers != settings[0].layers:
            raise UserError(
                f"{folder}: adapts other layers than {terms[0][0]}; only LoRA adapters of the same lora.keys and "
                f"lora.layers can be added"
            )
    found: Arrays = {}
    for name in loaded[0]:
        if name.endswith(".lora_b"):
            a = f"{name.removesuffix('b')}a"
            factors = [weight * lora.multiplier for (_, weight), lora in zip(terms, settings, strict=True)]
            found[a], found[name] = _side_by_side([one[a] for one in loaded], [one[name] for one in loaded], factors)
    lora = settings[0].model_dump(exclude_none=True, exclude={"alpha", "scale", "rank", "dropout"})
    rank = sum(one.rank for one in settings)
    return LoraConfig.model_validate(lora | {"rank": rank, "scale": 1.0}), found


def _alone(lora: LoraConfig, arrays: Arrays, weight: float) -> tuple[LoraConfig, Arrays]:
    """One adapter at a weight; a scale of 0 is none, so B is 0 instead."""
    if weight == 0:
        return lora, {name: mx.zeros_like(a) if name.endswith("lora_b") else a for name, a in arrays.items()}
    kept = lora.model_dump(exclude_none=True, exclude={"alpha", "scale"})
    return LoraConfig.model_validate(kept | {"scale": lora.multiplier * weight}), arrays


def _side_by_side(a: Sequence[mx.array], b: Sequence[mx.array], factors: Sequence[float]) -> tuple[mx.array, mx.array]:
    """A and B of the sum: A (in, r), B (r, out); of E experts A (E, r, in) or flat (E * r, in), B (E, out, r)."""
    scaled_b = [one.astype(mx.float32) * factor for one, factor in zip(b, factors, strict=True)]
    wide = [one.astype(mx.float32) for one in a]
    if b[0].ndim == 3:
        experts = [one.reshape(b[0].shape[0], -1, one.shape[-1]) for one in wide]
        joined = mx.concatenate(experts, axis=1)
        flat = a[0].ndim == 2
        return joined.reshape(-1, a[0].shape[-1]) if flat else joined, mx.concatenate(scaled_b, axis=2)
    return mx.concatenate(wide, axis=1), mx.concatenate(scaled_b, axis=0)


def interpolated(start: Mapping[str, mx.array], tuned: Mapping[str, mx.array], strength: float) -> Arrays:
    """w0 + strength * (w - w0) of every array, in float32, in the number type that it has in `tuned`."""
    found = {}
    for name, array in tuned.items():
        before = start[name].astype(mx.float32)
        found[name] = (before + strength * (array.astype(mx.float32) - before)).astype(array.dtype)
    return found
