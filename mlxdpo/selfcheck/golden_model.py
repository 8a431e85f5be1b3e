"""A small llama whose weights are made by integer arithmetic: the same on every machine and version of every library.

No random generator, which a library may change, has a say in them. Every value fits bfloat16's eight significant bits,
so that a cast rounds nothing and one set of golden numbers holds for all dtypes, up to the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.config import LoraConfig
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import cast

SHAPE: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LORA = LoraConfig(rank=4, scale=2.0, layers=-1, keys=["self_attn.q_proj", "self_attn.v_proj"])


def bytes_of(name: str, count: int) -> np.ndarray:
    """(count,) integers of 0 to 255: a multiplicative hash of the position, salted by CRC-32 of `name`, mod 2^32."""
    x = np.arange(1, count + 1, dtype=np.uint64) * 2654435761 + crc32(name.encode())
    x &= 0xFFFFFFFF
    x ^= x >> 15
    x = x * 739982445 & 0xFFFFFFFF
    x ^= x >> 12
    return (x >> 24).astype(np.int64)


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array called `name`: embeddings within 1/2, matrices within 1/4, adapters within 1/8 of 0, norms of 1."""
    drawn = bytes_of(name, int(np.prod(shape))).reshape(shape)
    if "norm" in name:
        return (128 + (drawn >> 3) - 16) / 128
    width = 0.5 if "embed" in name else 0.125 if "lora" in name else 0.25
    return (drawn - 128) / 128 * width


def arithmetic_model(dtype: mx.Dtype = mx.float32, *, moved: bool = True) -> nn.Module:
    """The model with LoRA on q and v, its frozen weights in `dtype`; not `moved`, the adapters are still a no-op."""
    from mlx_lm.utils import _get_classes

    model_class, arguments = _get_classes(dict(SHAPE))
    model = model_class(arguments.from_dict(dict(SHAPE)))
    _set_weights(model, tree_flatten(model.parameters()))
    cast(model, dtype)
    attach_lora(model, LORA)
    if moved:
        _set_weights(model, tree_flatten(model.trainable_parameters()))
    mx.eval(model.parameters())
    return model


def _set_weights(model: nn.Module, arrays: Any) -> None:
    made = [(name, mx.array(value(name, array.shape).astype(np.float32)).astype(array.dtype)) for name, array in arrays]
    model.load_weights(made, strict=False)
