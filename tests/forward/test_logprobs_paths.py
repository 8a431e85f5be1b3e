"""Which way a model is run, and that what rows say of themselves reaches the loss either way."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_model

from mlxdpo.data.batching import collate
from mlxdpo.forward import fused_head as heads
from mlxdpo.forward import logprobs
from mlxdpo.forward.layer_plan import checkpointed
from mlxdpo.types import Example, Extras


@pytest.fixture
def asked(monkeypatch):
    """What the fast ways are built with: (checkpoint, head) of each, in the order of `Ways`."""
    calls = []
    for name, head in (("fast_forward", heads.token_logps), ("fast_details", heads.token_logps_and_squares)):
        monkeypatch.setattr(logprobs, name, lambda checkpoint=None, *, head=head: calls.append((checkpoint, head)))
    return calls


def test_checkpoints_and_heads_of_both_ways(asked):
    model = tiny_model()
    logprobs.forward_fns(model)
    logprobs.forward_fns(model, checkpoint=True)
    score = (None, heads.score_logps)
    assert asked == [(None, heads.token_logps), score, (checkpointed, heads.token_logps), score]


def test_checkpoints_and_heads_of_both_ways_with_details(asked):
    some = logprobs.ForwardFns(logprobs.plain_forward, logprobs.plain_forward)
    logprobs.detailed_fns(some)
    logprobs.detailed_fns(some, checkpoint=True)
    score = (None, heads.score_logps_and_squares)
    train = heads.token_logps_and_squares
    assert asked == [(None, train), score, (checkpointed, train), score]


def test_a_model_whose_parts_are_unknown_goes_the_plain_way(monkeypatch):
    monkeypatch.setattr(logprobs, "model_parts", lambda model: None)
    assert logprobs.forward_fns(tiny_model(), checkpoint=True) is logprobs.PLAIN_FORWARD
    assert logprobs.detailed_fns(logprobs.PLAIN_FORWARD, checkpoint=True) is logprobs.PLAIN_DETAILS


def test_what_rows_say_reaches_the_loss_either_way():
    ids = lambda *n: np.array(n, np.int32)  # noqa: E731
    rows = [
        Example(ids(1, 2), ids(3, 4), ids(5), "a", Extras(label=0.75, weight=2.0, margin=0.5)),
        Example(ids(6, 7), ids(8), ids(9, 9), "b", Extras(label=0.25, weight=3.0)),
    ]
    model, batch = tiny_model(), collate(rows, (0, 1), 2)
    ways = logprobs.forward_fns(model)
    for forward in (None, ways.score, logprobs.detailed_fns(ways).score, logprobs.plain_details):
        pairs = logprobs.score_pairs(model, batch, forward)
        assert pairs.label.tolist() == [0.75, 0.25] and pairs.weight.tolist() == [2.0, 3.0]
        assert pairs.margin.tolist() == [0.5, 0.0]
    bare = logprobs.score_pairs(model, batch._replace(extras=None), logprobs.plain_details)
    assert bare.label is None and bare.squares.shape == (2, 2)
    assert mx.allclose(bare.chosen, pairs.chosen).item()
