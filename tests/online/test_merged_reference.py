"""The weights of a merged reference: by hand where they are known, at the least loss elsewhere; and what is written."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_runs import finish, recipe

from mlxdpo.model.adapters import load_adapter, load_run, read_settings
from mlxdpo.model.policy import load_policy
from mlxdpo.online.rounds.reference import learn_weights, write_merged
from mlxdpo.runs import Run


def loss(weights, rewards):
    """The page's formula, term by term."""
    return np.mean([-np.log(1 / (1 + np.exp(-margin))) for margin in weights @ rewards])


def test_one_that_ranks_all_rightly_is_all_of_it():
    assert learn_weights(np.array([[1.0, 2.0, 0.5]])) == pytest.approx([1])


def test_one_that_ranks_all_wrongly_is_none_of_it():
    assert learn_weights(np.array([[-1.0, -2.0, -0.5]])).tolist() == [0]


def test_one_that_is_right_in_three_of_four_by_hand():
    """Margins of +-m: sigmoid(w m) = 3/4 at the optimum, so w = ln 3 / m."""
    margins = np.array([[4.0, 4.0, 4.0, -4.0]])
    assert learn_weights(margins) == pytest.approx([np.log(3) / 4], abs=1e-4)


def test_noise_weighs_less_than_what_ranks():
    draw = np.random.default_rng(0)
    ranks, noise = draw.normal(2, 2, 400), draw.normal(0, 2, 400)
    weights = learn_weights(np.stack([noise, ranks]))
    assert weights[1] > 0.5 and weights[0] < 0.1 * weights[1]


@given(arrays(float, st.tuples(st.integers(1, 4), st.integers(1, 20)), elements=st.floats(-50, 50)), st.data())
def test_no_other_weights_have_a_smaller_loss(rewards, data):
    found = learn_weights(rewards)
    assert (found >= 0).all() and found.sum() <= 1 + 1e-9
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    for others in draw.dirichlet(np.ones(len(rewards) + 1), 50)[:, 1:]:
        # Weights below half a percent are dropped: at margins of 50 nats that may cost this much.
        assert loss(found, rewards) <= loss(others, rewards) + 0.01 * np.abs(rewards).max() + 1e-6


def test_the_merge_is_the_weighted_sum_of_the_updates(tmp_path, cache):
    finish(recipe(tmp_path, "one")), finish(recipe(tmp_path, "two", train={"seed": 5, "batch_size": 4}))
    one, two = (Run.open(tmp_path / name) for name in ("one", "two"))
    parts = {"start": (None, 0.2), "one": (one.adapter, 0.3), "two": (two.adapter, 0.5)}
    write_merged(parts, tmp_path / "merged")
    assert read_settings(tmp_path / "merged").rank == 8
    merged = load_policy(one.config().model)
    load_adapter(merged.model, tmp_path / "merged")
    deltas = [_deltas(load_run(run).model) for run in (one, two)]
    for name, delta in _deltas(merged.model).items():
        assert mx.abs(delta - (0.3 * deltas[0][name] + 0.5 * deltas[1][name])).max() < 1e-6


def test_a_merge_of_small_updates_has_the_weighted_sum_of_their_log_probs(tmp_path, cache):
    exact = {"model": {"dtype": "float32"}}  # on every machine: the difference is a second-order one
    finish(recipe(tmp_path, "one", **exact))
    finish(recipe(tmp_path, "two", train={"seed": 5, "batch_size": 4}, **exact))
    one, two = (Run.open(tmp_path / name).adapter for name in ("one", "two"))
    before = _logps(tmp_path)
    moved = []
    for name, weights in {"first": (0.02, 0), "second": (0, 0.02), "both": (0.006, 0.01)}.items():
        write_merged({"one": (one, weights[0]), "two": (two, weights[1])}, tmp_path / name)
        moved.append(_logps(tmp_path, name) - before)
    assert mx.abs(moved[0] - moved[1]).max() > 0.3 * mx.abs(moved[0]).max()  # they are not one policy
    assert mx.abs(moved[2] - (0.3 * moved[0] + 0.5 * moved[1])).max() < 0.02 * mx.abs(moved[2]).max()


def _logps(folder, adapter=None):
    """Log-probs of every next token after five, under the base or with an adapter on it."""
    policy = load_policy(recipe(folder, model={"dtype": "float32"}).model)
    if adapter is not None:
        load_adapter(policy.model, folder / adapter)
    logits = policy.model(mx.array([[1, 5, 9, 12, 3]]))
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _deltas(model):
    """What each adapter adds to its layer's weights, (in, out)."""
    return {n: m.scale * m.lora_a @ m.lora_b for n, m in model.named_modules() if "lora_a" in m}
