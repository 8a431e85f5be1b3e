"""The routers' balancing loss: found on models of several files, right in value and gradient, and part of a step."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gradients import moved, ragged
from mlx.utils import tree_flatten
from tiny_models import tiny_model

from mlxdpo.config import LoraConfig, LossConfig
from mlxdpo.forward.choose_forward import PLAIN_FORWARD, forward_fns
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.forward.router_balance import (
    Routed,
    balancing_loss,
    batch_balance,
    check_routers,
    token_weights,
    watched_routers,
)
from mlxdpo.losses import resolve
from mlxdpo.training.step import make_gradient
from mlxdpo.types import UserError


def plain_reference(logits, k, weights):
    """E sum_e f_e P_e, in NumPy, token by token."""
    experts = logits.shape[1]
    often, likely = np.zeros(experts), np.zeros(experts)
    for row, weight in zip(logits.astype(np.float64), weights, strict=True):
        shares = np.exp(row - row.max())
        often[np.argsort(-row)[:k]] += weight
        likely += weight * shares / shares.sum()
    return experts * (often / weights.sum()) @ (likely / weights.sum())


def test_value_and_gradient_of_a_plain_reference():
    draw = np.random.default_rng(0)
    layers = [draw.normal(size=(7, 5)).astype(np.float32) for _ in range(3)]
    weights = np.tile(np.array([1, 2, 0, 1, 1, 0, 3], np.float32), 3)

    def ours(*logits):
        return balancing_loss([Routed(a, mx.argsort(-a, axis=-1)[:, :2]) for a in logits], mx.array(weights))

    value, found = mx.value_and_grad(ours, argnums=(0, 1, 2))(*map(mx.array, layers))
    every = np.concatenate(layers)
    assert value.item() == pytest.approx(plain_reference(every, 2, weights), rel=1e-5)
    gradient, step = np.concatenate([np.array(a) for a in found]), 1e-4
    for at in [(0, 0), (4, 3), (9, 1), (20, 4)]:  # no choice changes within such a step
        up, down = every.astype(np.float64), every.astype(np.float64)
        up[at], down[at] = up[at] + step, down[at] - step
        slope = (plain_reference(up, 2, weights) - plain_reference(down, 2, weights)) / (2 * step)
        assert gradient[at] == pytest.approx(slope, abs=2e-6)
    assert not gradient[weights == 0].any()


def test_routers_used_alike_give_the_number_of_choices():
    logits = mx.array(np.eye(4, dtype=np.float32) * 1e-3)
    chosen = mx.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    assert balancing_loss([Routed(logits, chosen)], mx.ones(4)).item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("quantised", [False, True])
def test_every_layer_is_found_whatever_it_carries(kind, quantised):
    model = tiny_model(kind)
    if quantised:
        nn.quantize(model, 32, 8)
    moved(model, LoraConfig(rank=2))
    before = [type(module) for module in model.modules()]
    check_routers(model)
    with watched_routers(model) as routed:
        model(mx.arange(1, 13)[None])
    assert [one.logits.shape for one in routed] == [(12, 4)] * 3
    assert [type(module) for module in model.modules()] == before


def test_models_without_such_routers_are_refused_by_name():
    with pytest.raises(UserError, match="llama has no experts to balance"):
        check_routers(tiny_model("llama"))
    model = tiny_model("qwen3_moe")
    for layer in model.layers:  # chooses the least likely
        layer.mlp.top_k, layer.mlp.gate = 2, Turned(layer.mlp.gate)
    with pytest.raises(UserError, match="not chosen by the largest logits of a router"):
        check_routers(model)


class Turned(nn.Module):
    """A router whose logits are not what is compared."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def __call__(self, x):
        return -self.gate(x)


def test_tokens_count_as_often_as_pairs_read_them_and_padding_not_at_all():
    batch = ragged(prompts=(5, 9), completions=((4, 2, 6), (1, 3, 2)))
    weights = np.array(token_weights(batch))
    uses = np.zeros(len(weights))
    for side in (batch.chosen, batch.rejected):
        np.add.at(uses, np.array(side), np.array(batch.weight))
    prompts = np.array([5, 5, 5, 9, 9, 9])
    lengths = np.array(batch.length).astype(int)[: len(prompts)]
    assert uses.sum() == 2 * np.array(batch.weight).sum()
    assert (weights.max(axis=1) == uses).all()
    read = (weights > 0).sum(axis=1)[: len(prompts)]
    assert (read == prompts + lengths - 1).all()  # the last token of a completion is predicted, and read by nothing


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_has_the_loss_and_its_gradient(parts, monkeypatch):
    from mlxdpo.machine import openblas

    monkeypatch.setattr(openblas, "stream_count", lambda: parts)
    model = moved(tiny_model("mixtral"), LoraConfig(rank=2))
    batch, loss, share = ragged(), resolve(LossConfig()), mx.array(1 / 6)
    assert len(batch.parts) == (parts if parts > 1 else 0)

    def wanted(model):
        pairs = score_pairs(model, batch, PLAIN_FORWARD.train)
        with watched_routers(model) as routed:
            for part in batch.parts or (batch,):
                rows = mx.concatenate([part.prefix[part.group], part.rest[part.rows]], axis=1)
                model(rows)
        losses = loss(pairs) + 0.3 * batch_balance(routed, batch)
        return (losses * batch.weight).sum() * share

    value, gradient = nn.value_and_grad(model, wanted)(model)
    found = make_gradient(model, loss, PLAIN_FORWARD.train, 0.3)(batch, share)
    without = make_gradient(model, loss, PLAIN_FORWARD.train)(batch, share)
    assert (found.losses * batch.weight).sum().item() / 6 == pytest.approx(value.item(), rel=1e-5)
    assert found.losses[0].item() > without.losses[0].item() + 0.3
    flat = lambda tree: np.concatenate([np.array(a).ravel() for _, a in tree_flatten(tree)])  # noqa: E731
    assert np.allclose(flat(found.gradients), flat(gradient), atol=1e-5 * np.abs(flat(gradient)).max())
    assert not np.allclose(flat(without.gradients), flat(gradient), atol=1e-3 * np.abs(flat(gradient)).max())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_meet_distinct_tokens_and_the_ways_agree(kind):
    model, batch = moved(tiny_model(kind), LoraConfig(rank=2)), ragged()
    forward = forward_fns(model).score  # finding the level runs the model too
    with watched_routers(model) as routed:
        fast = forward(model, batch)
    tokens = sum(len(one.logits) for one in routed) // 3
    parts = batch.parts or (batch,)
    assert tokens == sum(part.prefix.size + len(part.rest) for part in parts)
    plain = PLAIN_FORWARD.score(model, batch)
    assert mx.abs(fast - plain).max().item() < 1e-3
