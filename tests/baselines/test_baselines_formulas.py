"""PPO, RLOO and best-of-n formulas against loops written from the papers, finite differences and enumeration."""

import itertools
import math
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxdpo.baselines import ppo, rloo

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of `benchmarks`, which no installation has

from benchmarks.frontier import best_of_n

GAMMA, LAM, CLIP, COEFFICIENT = 0.97, 0.9, 0.2, 0.3


@st.composite
def rollouts(draw):
    """Log-probs of policy, old policy and reference, values, scores, and completions of different lengths."""
    count, longest = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    lengths = rng.integers(1, longest + 1, count)
    lengths[0] = longest
    shape = (count, longest)
    return {
        "mask": (np.arange(longest)[None] < lengths[:, None]).astype(np.float64),
        "new": -rng.exponential(1.0, shape),
        "old": -rng.exponential(1.0, shape),
        "ref": -rng.exponential(1.0, shape),
        "values": rng.normal(size=shape),
        "before": rng.normal(size=shape),
        "scores": rng.normal(size=count),
    }


def loop_rewards(r, estimator):
    """Each token costs its KL, the last one brings the score: plain loops."""
    rows = []
    for i, row in enumerate(r["mask"]):
        length = int(sum(row))
        given = []
        for t in range(length):
            log_ratio = r["old"][i][t] - r["ref"][i][t]
            cost = log_ratio if estimator == "k1" else math.exp(-log_ratio) - 1 + log_ratio
            given.append(-COEFFICIENT * cost + (r["scores"][i] if t == length - 1 else 0.0))
        rows.append(given)
    return rows


def loop_advantages(rewards, values):
    """GAE by its definition, a sum over the future: sum_l (gamma lam)^l delta_{t+l} (arXiv 1506.02438 eq. 16)."""
    rows = []
    for row, value in zip(rewards, values, strict=True):
        length = len(row)
        deltas = [row[t] + (GAMMA * value[t + 1] if t + 1 < length else 0.0) - value[t] for t in range(length)]
        rows.append([sum((GAMMA * LAM) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)])
    return rows


def loop_whitened(rows):
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    return [[(x - mean) / math.sqrt(variance + 1e-8) for x in row] for row in rows]


def loop_policy(new, old, advantage):
    ratio = math.exp(new - old)
    kept = min(max(ratio, 1 - CLIP), 1 + CLIP)
    return max(-advantage * ratio, -advantage * kept)


def loop_value(value, before, target):
    near = before + min(max(value - before, -CLIP), CLIP)
    return 0.5 * max((value - target) ** 2, (near - target) ** 2)


def pad(rows, like):
    result = np.zeros_like(like)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@settings(max_examples=40)
@given(r=rollouts())
def test_rewards_advantages_and_whitening_are_those_of_the_loops(estimator, r):
    kl = ppo.ESTIMATORS[estimator](r["old"], r["ref"])
    rewards = ppo.shaped_rewards(r["scores"], kl, r["mask"], COEFFICIENT)
    found, returns = ppo.advantages(rewards, r["values"], r["mask"], GAMMA, LAM)
    wanted = loop_rewards(r, estimator)
    np.testing.assert_allclose(rewards, pad(wanted, rewards), atol=1e-9)
    expected = loop_advantages(wanted, r["values"])
    np.testing.assert_allclose(found, pad(expected, found), atol=1e-9)
    np.testing.assert_allclose(returns, (found + r["values"]) * r["mask"], atol=1e-12)
    if r["mask"].sum() > 1:
        np.testing.assert_allclose(ppo.whiten(found, r["mask"]), pad(loop_whitened(expected), found), atol=1e-6)


@settings(max_examples=40)
@given(r=rollouts())
def test_losses_are_those_of_the_loops_to_1e5(r):
    advantage, target = r["values"], r["before"] + 0.3
    policy = ppo.clipped_surrogate_loss(
        *(mx.array(a.astype(np.float32)) for a in (r["new"], r["old"], advantage)), CLIP
    )
    value = ppo.value_loss(*(mx.array(a.astype(np.float32)) for a in (r["values"], r["before"], target)), CLIP)
    wanted = [
        [loop_policy(*three) for three in zip(*rows, strict=True)]
        for rows in zip(r["new"], r["old"], advantage, strict=True)
    ]
    np.testing.assert_allclose(np.array(policy), wanted, rtol=1e-5, atol=1e-5)
    wanted = [
        [loop_value(*three) for three in zip(*rows, strict=True)]
        for rows in zip(r["values"], r["before"], target, strict=True)
    ]
    np.testing.assert_allclose(np.array(value), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(r=rollouts())
def test_slopes_of_the_losses_are_finite_differences_of_the_loops(r):
    """At points away from the corners of clip and max, where there is no slope."""
    step, advantage, target = 1e-6, r["values"], r["before"] + 0.3
    for ours, loop, first, more in (
        (ppo.clipped_surrogate_loss, loop_policy, r["new"], (r["old"], advantage)),
        (ppo.value_loss, loop_value, r["values"], (r["before"], target)),
    ):
        arrays = [mx.array(a.astype(np.float32)) for a in (first, *more)]
        slopes = np.array(mx.grad(lambda x, ours=ours, rest=arrays[1:]: ours(x, *rest, CLIP).sum())(arrays[0]))
        for at in np.ndindex(first.shape):
            one, rest = first[at], [a[at] for a in more]
            left, right = loop(one - step, *rest), loop(one + step, *rest)
            if abs(right + left - 2 * loop(one, *rest)) < 1e-9:  # no corner between
                assert slopes[at] == pytest.approx((right - left) / (2 * step), rel=2e-3, abs=2e-4)


def test_whitening_one_token_and_a_ratio_that_leaves_the_trust_region():
    assert ppo.whiten(np.array([[3.0, 9.0]]), np.array([[1.0, 0.0]])).tolist() == [[0.0, 0.0]]
    # Ratio e > 1.2: rewarded no further (slope 0) for a good token, punished in full for a bad one.
    slope = mx.grad(lambda x, a: ppo.clipped_surrogate_loss(x, mx.array(0.0), a, 0.2))
    assert slope(mx.array(1.0), mx.array(1.0)).item() == 0.0
    assert slope(mx.array(1.0), mx.array(-1.0)).item() == pytest.approx(math.e, rel=1e-6)


def test_the_mask_ends_with_the_first_end():
    tokens = np.array([[5, 2, 2, 7], [5, 6, 7, 8], [3, 5, 2, 2]])
    assert ppo.mask_after_end(tokens, frozenset({2, 3})).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_only_completions_without_an_end_are_penalised():
    assert ppo.less_without_end(np.array([1.0, 2.0]), np.array([True, False]), 0.5).tolist() == [1.0, 1.5]


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 10**6))
def test_leave_one_out_is_the_mean_of_the_others(groups, samples, seed):
    rewards = np.random.default_rng(seed).normal(size=groups * samples)
    found = rloo.leave_one_out(rewards, samples)
    for i, reward in enumerate(rewards):
        others = [rewards[j] for j in range(len(rewards)) if j // samples == i // samples and j != i]
        assert found[i] == pytest.approx(reward - sum(others) / len(others), abs=1e-12)


def test_leave_one_out_by_hand_and_without_siblings():
    """Rewards 1, 2, 6: others' means 4, 3.5, 1.5."""
    np.testing.assert_allclose(rloo.leave_one_out(np.array([1.0, 2.0, 6.0]), 3), [-3.0, -1.5, 4.5])
    with pytest.raises(ValueError, match="two or more"):
        rloo.leave_one_out(np.array([1.0, 2.0]), 1)


def test_rloo_rewards_and_loss_by_hand():
    """KL 0.5 and 1.0 nats (the third token is padding): 2 - 0.1 * 1.5; loss -A (l1 + l2), slope -A for each token."""
    mask = np.array([[1.0, 1.0, 0.0]])
    assert rloo.sequence_rewards(np.array([2.0]), np.array([[0.5, 1.0, 9.0]]), mask, 0.1) == pytest.approx([1.85])
    logps, advantage, shown = mx.array([[-1.0, -2.0, -7.0]]), mx.array([3.0]), mx.array([[1.0, 1.0, 0.0]])
    assert rloo.reinforce_loss(logps, advantage, shown).item() == pytest.approx(9.0)
    slope = mx.grad(lambda x: rloo.reinforce_loss(x, advantage, shown).sum())(logps)
    assert slope.tolist() == [[-3.0, -3.0, 0.0]]


TOY = np.array([0.5, 0.2, 0.15, 0.1, 0.05])


def by_enumeration(probabilities, rewards, n):
    """Every n-tuple of outcomes, the best kept, the first of equals."""
    result = np.zeros(len(probabilities))
    for drawn in itertools.product(range(len(probabilities)), repeat=n):
        kept = drawn[best_of_n.best([rewards[i] for i in drawn])]
        result[kept] += math.prod(probabilities[i] for i in drawn)
    return result


@pytest.mark.parametrize("rewards", [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 1, 2, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_and_its_kl_bound_against_enumeration(rewards, n):
    exact = by_enumeration(TOY, rewards, n)
    np.testing.assert_allclose(best_of_n.distribution(TOY, np.array(rewards), n), exact, atol=1e-12)
    kept = exact > 0
    kl = float((exact[kept] * np.log(exact[kept] / TOY[kept])).sum())
    assert -1e-12 <= kl <= best_of_n.kl_bound(n) + 1e-12


def test_the_bound_is_reached_where_no_outcome_weighs_much():
    """4,096 equally likely outcomes of different reward: within 0.001 of the bound; of five, 0.05 below it."""
    even = np.full(4096, 1 / 4096)
    best = best_of_n.distribution(even, np.arange(4096), 4)
    assert (best * np.log(best / even)).sum() == pytest.approx(best_of_n.kl_bound(4), abs=1e-3)
    best = best_of_n.distribution(TOY, np.arange(5), 4)
    assert (best * np.log(best / TOY)).sum() == pytest.approx(best_of_n.kl_bound(4) - 0.0524, abs=1e-3)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.data())
def test_selection_is_the_mean_over_all_subsets(rewards, data):
    n = data.draw(st.integers(1, len(rewards)))
    wanted = np.zeros(len(rewards))
    subsets = list(itertools.combinations(range(len(rewards)), n))
    for subset in subsets:
        top = max(rewards[i] for i in subset)
        winners = [i for i in subset if rewards[i] == top]
        wanted[winners] += 1 / len(winners) / len(subsets)
    # Equals share by symmetry: each is as often in a subset as the other.
    np.testing.assert_allclose(best_of_n.selection(np.array(rewards, float), n), wanted, atol=1e-12)


def test_best_of_none_and_of_more_than_there_are():
    with pytest.raises(ValueError, match="at least one"):
        best_of_n.kl_bound(0)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        best_of_n.selection(np.array([1.0, 2.0]), 3)
