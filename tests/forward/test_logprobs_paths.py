"""Which way a model is run, and that what rows say of themselves reaches the loss either way."""

import mlx.core as mx
import numpy as np
from tiny_models import tiny_model

from mlxdpo.data.batching import collate
from mlxdpo.forward import logprobs
from mlxdpo.forward.choose_forward import detailed_fns, forward_fns
from mlxdpo.types import Example, Extras


def test_what_rows_say_reaches_the_loss_either_way():
    ids = lambda *n: np.array(n, np.int32)  # noqa: E731
    rows = [
        Example(ids(1, 2), ids(3, 4), ids(5), "a", Extras(label=0.75, weight=2.0, margin=0.5)),
        Example(ids(6, 7), ids(8), ids(9, 9), "b", Extras(label=0.25, weight=3.0)),
    ]
    model, batch = tiny_model(), collate(rows, (0, 1), 2)
    ways = forward_fns(model)
    for forward in (ways.train, ways.score, detailed_fns(ways).score, logprobs.plain_details):
        pairs = logprobs.score_pairs(model, batch, forward)
        assert pairs.label.tolist() == [0.75, 0.25] and pairs.weight.tolist() == [2.0, 3.0]
        assert pairs.margin.tolist() == [0.5, 0.0]
    bare = logprobs.score_pairs(model, batch._replace(extras=None), logprobs.plain_details)
    assert bare.label is None and bare.squares.shape == (2, 2)
    assert mx.allclose(bare.chosen, pairs.chosen).item()
