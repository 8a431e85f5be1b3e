"""Random float64 pairs for the objectives, and how far two sets of numbers are apart."""

import mlx.core as mx
import numpy as np

from mlxdpo.types import Pairs

TOLERANCE, FLOOR = 1e-5, 2e-3  # of float32, relative; of numbers near zero absolute, see `worst`


def slopes_of(function, pairs):
    def total(chosen, rejected):
        return function(pairs._replace(chosen=chosen, rejected=rejected)).sum()

    return [np.array(s, np.float64) for s in mx.grad(total, argnums=(0, 1))(pairs.chosen, pairs.rejected)]


def random_pairs(seed, count=16):
    """Float64 pairs that float32 holds exactly: log-probs around -40, log-ratios of some nats both ways, lengths 1 to
    12, and all that rows and modifiers may bring."""
    rng = np.random.default_rng(seed)
    ref = rng.normal(-40, 8, (2, count))
    policy = ref + rng.normal(0, 3, (2, count))
    lengths = rng.integers(1, 13, (2, count))
    share = rng.uniform(0.3, 1, (2, count))
    columns = dict(
        label=rng.uniform(0, 1, count),
        weight=rng.uniform(0.2, 3, count),
        margin=rng.normal(0, 1, count),
        desirable=(rng.uniform(size=count) < 0.6) * 1.0,
        shared=policy * share,
        ref_shared=ref * share,
        squares=-rng.uniform(0.5, 3, (2, count)) * lengths,
    )
    exact = lambda a: a.astype(np.float32).astype(np.float64)  # noqa: E731
    return Pairs(*map(exact, (*policy, *ref, *lengths)), **{name: exact(a) for name, a in columns.items()})


def on_device(pairs):
    return Pairs(*(None if a is None else mx.array(a.astype(np.float32)) for a in pairs))


def worst(got, want):
    """Largest error relative to the wanted number, or, where slopes and values cross zero, to `FLOOR` or a twentieth of
    the typical number, whichever is largest."""
    error = lambda g, w: (abs(g - w) / np.maximum(abs(w), max(FLOOR, np.median(abs(w)) / 20))).max()  # noqa: E731
    return max(float(error(g, w)) for g, w in zip(got, want, strict=True))
