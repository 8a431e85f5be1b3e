"""Every registered objective: hand-worked values and slopes, symmetries, start values, extremes."""

import math

import mlx.core as mx
import numpy as np
import pytest
from goldens import GOLDENS
from hypothesis import given
from hypothesis import strategies as st

from mlxdpo.config import LossConfig
from mlxdpo.losses import LOSSES, resolve
from mlxdpo.types import Pairs, UserError

NAMES = sorted(LOSSES)
PAIR = Pairs(*(mx.array([v]) for v in (-10.0, -12.0, -11.0, -11.0, 4.0, 5.0)))


def value_and_slopes(name, pairs, knobs):
    """Loss and its gradient by the policy's two log-probs, from MLX's own differentiation."""

    def total(chosen, rejected):
        return LOSSES[name](pairs._replace(chosen=chosen, rejected=rejected), **knobs).sum()

    value, slopes = mx.value_and_grad(total, argnums=(0, 1))(pairs.chosen, pairs.rejected)
    return value.item(), [s.tolist() for s in slopes]


@pytest.mark.parametrize("name", NAMES)
def test_hand_worked_values_and_slopes(name):
    for golden in GOLDENS[name]:
        value, (chosen, rejected) = value_and_slopes(name, PAIR, golden.knobs)
        assert value == pytest.approx(golden.value, abs=1e-6)
        assert chosen == pytest.approx([golden.by_chosen], abs=1e-6)
        assert rejected == pytest.approx([golden.by_rejected], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_value_where_policy_and_reference_agree(name, beta):
    pairs = PAIR._replace(ref_chosen=PAIR.chosen, ref_rejected=PAIR.rejected)
    assert LOSSES[name](pairs, beta=beta).item() == pytest.approx(LOSSES[name].start(beta), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_finite_at_extreme_margins(name, margin):
    pairs = PAIR._replace(chosen=PAIR.ref_chosen + margin, rejected=PAIR.ref_rejected)
    value, slopes = value_and_slopes(name, pairs, {"beta": 1.0})
    assert math.isfinite(value) and np.isfinite(slopes).all()


@pytest.mark.parametrize("name", NAMES)
@given(shift=st.floats(-50, 50), d=st.floats(-30, 30))
def test_shifting_policy_and_reference_together_changes_nothing(name, shift, d):
    pairs = PAIR._replace(chosen=PAIR.chosen + d)
    moved = Pairs(*(a + shift for a in pairs[:4]), *pairs[4:])
    got, want = (LOSSES[name](p, beta=0.3).item() for p in (moved, pairs))
    assert got == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_one_loss_per_pair_independent_of_the_others(name):
    rng = np.random.default_rng(0)
    pairs = Pairs(*(mx.array(rng.normal(-20, 5, 7).astype("f")) for _ in range(4)), mx.full(7, 4.0), mx.full(7, 5.0))
    together = LOSSES[name](pairs, beta=0.2).tolist()
    alone = [LOSSES[name](Pairs(*(a[i : i + 1] for a in pairs)), beta=0.2).item() for i in range(7)]
    assert together == pytest.approx(alone, rel=1e-6)


def test_sigmoid_swapped_pair_is_the_smoothed_half():
    swapped = Pairs(*(PAIR[i] for i in (1, 0, 3, 2, 5, 4)))
    both = LOSSES["sigmoid"](PAIR, beta=0.5).item() + LOSSES["sigmoid"](swapped, beta=0.5).item()
    smoothed = LOSSES["sigmoid"](PAIR, beta=0.5, label_smoothing=0.4999999).item()
    assert smoothed == pytest.approx(both / 2, abs=1e-5)


def test_unknown_objective_and_unused_knob_are_refused():
    with pytest.raises(UserError, match=r"loss.name `dpo` is unknown; known: sigmoid, ipo, hinge"):
        resolve(LossConfig(name="dpo"))
    with pytest.raises(UserError, match=r"loss.label_smoothing 0.1 has no effect on `ipo`, which takes: beta"):
        resolve(LossConfig(name="ipo", label_smoothing=0.1))
    objective, knobs = resolve(LossConfig(name="sigmoid", beta=0.2, label_smoothing=0.1))
    assert objective is LOSSES["sigmoid"] and knobs == {"beta": 0.2, "label_smoothing": 0.1}
