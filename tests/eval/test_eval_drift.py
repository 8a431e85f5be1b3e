"""Drift and text statistics against closed forms."""

from __future__ import annotations

import mlxdpo_eval

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxdpo_eval.metrics import drift
from mlxdpo_eval.metrics.drift import LogitsAt, distinct_n, repetition, sequence_kl, step_kl, text_stats


def at(logits: np.ndarray | mx.array) -> LogitsAt:
    array = mx.array(logits)
    return lambda here: array[:, here]


def plain_kl(policy: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The formula in float64, all at once."""
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (policy, reference))
    return ((np.exp(p) * (p - q)).sum(-1) * mask).sum(-1)


def test_step_kl_hand_worked():
    """(1/2, 1/2) to (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2 = .346574 - .202733 = .143841."""
    found = step_kl(mx.log(mx.array([0.5, 0.5])), mx.log(mx.array([0.25, 0.75])))
    assert found.item() == pytest.approx(0.143841, abs=1e-6)


def test_step_kl_of_categoricals_from_one_weight():
    """Reference uniform over V, policy certain of one token: ln V."""
    policy = mx.where(mx.arange(10) == 3, 0.0, -mx.inf)
    assert step_kl(policy, mx.zeros(10)).item() == pytest.approx(np.log(10), abs=1e-6)
    assert step_kl(mx.zeros(10), policy).item() == np.inf


def test_a_shift_of_the_logits_is_no_drift():
    logits = mx.random.normal((2, 5, 11), key=mx.random.key(0))
    assert step_kl(logits, logits).max().item() == 0
    assert step_kl(logits + 100, logits).max().item() == pytest.approx(0, abs=1e-5)


def test_second_order_closed_form():
    """KL(p || p tilted by eps f) = eps² Var_p(f) / 2 for small eps: 5e-9 nats here, below the
    rounding of a float32 log-probability, and still right to a few per cent."""
    rng = np.random.default_rng(3)
    logits, tilt = rng.normal(size=(2, 50_000))
    p = np.exp(logits) / np.exp(logits).sum()
    variance = (p * tilt**2).sum() - (p * tilt).sum() ** 2
    found = step_kl(mx.array(logits, mx.float32), mx.array(logits + 1e-4 * tilt, mx.float32))
    assert found.item() == pytest.approx(1e-8 * variance / 2, rel=0.05)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_sequence_kl_equals_the_formula_whatever_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr(drift, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 4, 10, 23)) * 2
    mask = (rng.random((4, 10)) < 0.6).astype(np.float64)
    found = sequence_kl(at(policy.astype(np.float32)), at(reference.astype(np.float32)), mx.array(mask, mx.float32))
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), plain_kl(policy, reference, mask), rtol=1e-5)


def test_padding_may_hold_anything():
    rng = np.random.default_rng(1)
    policy, reference = rng.normal(size=(2, 1, 4, 7)).astype(np.float32)
    mask = mx.array([[1.0, 1.0, 0.0, 0.0]])
    clean = sequence_kl(at(policy), at(reference), mask).item()
    policy[:, 2], reference[:, 3] = np.nan, -np.inf
    assert sequence_kl(at(policy), at(reference), mask).item() == clean > 0


def test_sequence_kl_of_16_bit_logits_is_computed_in_float32():
    logits = mx.random.normal((1, 3, 1000), key=mx.random.key(1))
    coarse = logits.astype(mx.bfloat16), (logits * 1.01).astype(mx.bfloat16)
    exact = [np.array(x.astype(mx.float32), np.float64) for x in coarse]
    found = sequence_kl(at(coarse[0]), at(coarse[1]), mx.ones((1, 3)))
    assert found.item() == pytest.approx(plain_kl(*exact, np.ones((1, 3)))[0], rel=1e-3)


def test_mean_log_ratio_of_samples_estimates_it():
    """k1 of 200,000 samples from the policy has the exact KL as its mean: within 4 standard errors."""
    rng = np.random.default_rng(2)
    policy, reference = rng.normal(size=(2, 1, 1, 9))
    log_p, log_q = (x[0, 0] - np.log(np.exp(x[0, 0]).sum()) for x in (policy, reference))
    ratio = (log_p - log_q)[rng.choice(9, 200_000, p=np.exp(log_p))]
    exact = sequence_kl(at(policy.astype(np.float32)), at(reference.astype(np.float32)), mx.ones((1, 1))).item()
    assert abs(ratio.mean() - exact) < 4 * ratio.std() / np.sqrt(len(ratio))


def test_shapes_that_differ_are_refused():
    mask = mx.ones((1, 3))
    with pytest.raises(ValueError, match=r"policy logits are \(1, 3, 5\), reference logits \(1, 3, 4\)"):
        sequence_kl(at(mx.zeros((1, 3, 5))), at(mx.zeros((1, 3, 4))), mask)
    with pytest.raises(ValueError, match="positions for a mask"):
        sequence_kl(at(mx.zeros((2, 3, 5))), at(mx.zeros((2, 3, 5))), mask)


def test_repetition_hand_worked():
    """a b a b a b: trigrams aba bab aba bab, two distinct of four. None for a text of fewer than n."""
    assert repetition("ababab") == 0.5
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 100, n=1) == 0.99
    assert repetition([1, 2]) is None and repetition([], n=1) is None
    with pytest.raises(ValueError, match="n is 0"):
        repetition([1], n=0)


def test_distinct_n_hand_worked():
    """Bigrams of "abab" and "ab": ab ba ab, ab. Two distinct of four; no bigram crosses from text to text."""
    assert distinct_n(["abab", "ab"]) == 0.5
    assert distinct_n(["a", "b"]) is None
    assert distinct_n(["abc"], n=1) == 1


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 4))
def test_repetition_bounds_and_relation_to_distinct(ids, n):
    found = repetition(ids, n)
    if len(ids) < n:
        assert found is None
    else:
        assert 0 <= found < 1
        assert found == pytest.approx(1 - distinct_n([ids], n))
        assert repetition([i + 10 for i in ids], n) == found


def test_text_stats_hand_worked():
    """Lengths 4 and 1; repetition of the first only (aaa twice: 1/2); bigram aa three times."""
    assert text_stats(["aaaa", "b"], [True, False]) == (2.5, 0.5, pytest.approx(1 / 3), 0.5)
    assert text_stats([], []) == (None, None, None, None)
    with pytest.raises(ValueError, match="1 completions and 0 flags"):
        text_stats(["a"], [])


def test_import_name():
    assert mlxdpo_eval.__name__ == "mlxdpo_eval"
