"""Gathers whose gradients are gathers: equal to MLX's own, and no step adds in an order that a GPU may change."""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gradients import moved, ragged
from levels_of import level_of
from mlx.utils import tree_flatten
from slow_cases import rest_slow
from tiny_models import tiny_model

from mlxdpo.config import LoraConfig, LossConfig
from mlxdpo.data.batching import collate
from mlxdpo.forward.choose_forward import PLAIN_FORWARD, detailed_fns, forward_fns
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.forward.token_rows import of_rows, row_sums, spreader, token_rows
from mlxdpo.losses import resolve
from mlxdpo.types import Example

pytestmark = pytest.mark.usefixtures("fake_mac")  # a CPU keeps MLX's own gradients


def batches():
    """Ranked answers, prompts with one and with three rows, rows and targets that only fill the shape."""
    yield ragged()
    yield ragged(prompts=(3, 90, 34), completions=((9, 30), (1, 25, 12, 4), (40, 3)))
    draw = np.random.default_rng(5)
    ids = lambda n: draw.integers(1, 300, n).astype(np.int32)  # noqa: E731
    first, second = ids(40), ids(37)
    shared = ids(8)
    pairs = [
        Example(first, shared, ids(3), "a"),
        Example(first, ids(5), shared, "b"),
        Example(second, ids(2), ids(9), "c"),
    ]
    yield collate(pairs, (0, 1, 2), 5)  # two of the pairs share a row


def gradient_of(function, a):
    """Gradient of a weighted sum of everything that `function` gives."""
    out = function(a)
    weights = mx.random.normal(out.shape, key=mx.random.key(1))
    return out, mx.grad(lambda a: (function(a) * weights).sum())(a)


def same(ours, theirs, a, mask=None):
    """Values and gradients of both are equal; `mask` leaves out what nothing looks at."""
    cut = (lambda f: f) if mask is None else (lambda f: lambda a: f(a) * mask)
    (x, dx), (y, dy) = gradient_of(cut(ours), a), gradient_of(cut(theirs), a)
    assert mx.array_equal(x, y).item() and mx.allclose(dx, dy, rtol=1e-5, atol=1e-6).item()


@pytest.mark.parametrize("number", range(3))
def test_each_gather_and_its_gradient_are_mlx_own(number):
    batch = list(batches())[number]
    rows, (R, S), M = token_rows(batch), batch.rows.shape, len(batch.rest)
    tokens, grid = mx.random.normal((M, 2, 3)), mx.random.normal((R, S, 2, 3))
    used = np.zeros((R, S), np.float32)  # places of real tokens; what pads a row is never looked at
    home, flat = np.array(batch.home), np.array(batch.rows).reshape(-1)
    real = flat[home] == np.arange(M)
    for row in range(R):
        width = (np.array(batch.rows)[row] > 0).sum() + (np.array(batch.rows)[row] == 0)[0]
        used[row, :width] = 1
    same(rows.to_rows, lambda a: a[batch.rows], tokens, mx.array(used)[..., None, None])
    same(rows.to_tokens, lambda a: a.reshape(-1, 2, 3)[batch.home], grid, mx.array(real)[:, None, None])
    scored = batch.scored[:, None, None]
    same(lambda a: rows.scored(a, batch), lambda a: a[batch.positions], tokens, scored)
    own = batch.owner * S + batch.home[batch.positions] % S
    same(lambda a: rows.scored_in_rows(a, batch), lambda a: a.reshape(-1, 2, 3)[own], grid, scored)
    prompts = mx.random.normal((batch.prefix.shape[0], 4, 3))
    same(spreader(batch.group, None), lambda a: a[batch.group], prompts)
    sums = mx.random.normal((len(batch.targets),))
    (x, dx), (y, dy) = (
        gradient_of(f, sums)
        for f in (lambda a: row_sums(a, batch), lambda a: mx.zeros(R).at[batch.owner].add(a * batch.scored))
    )
    assert mx.allclose(x, y, atol=1e-5).item() and mx.array_equal(dx, dy).item()
    same(lambda a: of_rows(a, batch.chosen), lambda a: a[batch.chosen], mx.random.normal((R,)))


# Scatters of one addend each: the logit at each target (a GPU's cross-entropy has none), rows 0 and 1 of `shared`.
ONE_ADDEND = {"plain": 1, "details": 2}


def primitives(folder, arrays):
    """Names of the operations that lead to `arrays`."""
    mx.export_to_dot(str(folder / "graph.dot"), *arrays)
    return re.findall(r'label ?= ?"([A-Za-z]+)', (folder / "graph.dot").read_text())


@pytest.mark.parametrize("number", rest_slow(range(3), [0]))
@pytest.mark.parametrize("way", ["packed", "padded", "checkpoint", "plain", "details"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_no_step_scatters(tmp_path, monkeypatch, kind, way, number):
    """Forward and backward of a whole step: no scatter, so no sum whose addends may come in another order."""
    model, batch = moved(tiny_model(kind), LoraConfig(rank=2)), list(batches())[number]
    level = level_of(model, "prefix" if way == "padded" else None)
    fns = PLAIN_FORWARD if way == "plain" else forward_fns(model, way == "checkpoint", level)
    fns = detailed_fns(fns) if way == "details" else fns
    loss = resolve(LossConfig(name="sigmoid", ld_alpha=0.5) if way == "details" else LossConfig(name="sigmoid"))
    if way == "details":
        batch = batch._replace(ref_shared=mx.zeros((2, len(batch.chosen))))

    def step(model):
        return (loss(score_pairs(model, batch, fns.train)) * batch.weight).sum()

    value, gradients = nn.value_and_grad(model, step)(model)
    found = primitives(tmp_path, [value, *(g for _, g in tree_flatten(gradients))])
    assert "Matmul" in found and len([name for name in found if "Scatter" in name]) == ONE_ADDEND.get(way, 0)


def test_the_count_sees_mlx_own_gradient_of_a_gather(tmp_path):
    index = mx.array([0, 0, 1])
    assert any("Scatter" in name for name in primitives(tmp_path, [mx.grad(lambda a: a[index].sum())(mx.ones(3))]))
