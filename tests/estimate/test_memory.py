"""The memory forecast: its arithmetic by hand on a tiny shape, and what must hold whatever the shape."""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from levels_of import level_of
from slow_cases import rest_slow
from tiny_models import tiny_model

from mlxdpo.config import LoraConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.examples import Examples
from mlxdpo.estimate import memory
from mlxdpo.estimate.forecast import attention_cost, trained_of
from mlxdpo.estimate.memory import AttentionCost, Frozen, Layouts, Setting, Shape, Trained, predict
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.forward.patch_mlx_lm import SHORT
from mlxdpo.machine.device import this_machine
from mlxdpo.model.adapters import attach_lora
from mlxdpo.training.plan import BatchLayout, planned_batch
from mlxdpo.types import Example

# D 8, F 16, two heads of 4 over one key head, V 50, float32, two blocks.
TINY = Shape(layers=2, hidden=8, inner=16, heads=2, kv_heads=1, head_dim=4, vocabulary=50, item=4)
LORA = Trained(layers=2, size=1000, ranks=14, inputs=frozenset({"attention", "out", "mlp", "inner"}))
SQUARES = Setting(checkpoint=False, states=2, accumulate=1, attention=AttentionCost(math.inf, 0, math.inf))
# One prompt of 3 shared tokens, two rows of 5 behind it.
ROWS = BatchLayout(prompts=1, shared=3, rows=2, width=5, rest=9, scored=6)


def total(at=ROWS, setting=SQUARES, trained=LORA, frozen=5000, steps=1):
    return predict(TINY, trained, Frozen(frozen), setting, steps, Layouts((at,), (at,), at))


def test_a_block_by_hand():
    """13 tokens keep 16 norm inputs, 32 of SwiGLU, 8 + 8 + 8 + 16 inputs of adapters and 14 low-rank numbers; 13 rows
    of 2 x 4 queries; 13 and the prefix twice more of 4 keys and 4 values; scores of 3 x 3 and 2 x 5 x 8, twice."""
    token_by_token = 13 * (16 + 32 + 40 + 14)
    attention = 13 * 8 + (13 + 2 * 3) * 8 + 2 * (9 + 80)
    assert memory.block_kept(TINY, LORA, ROWS, math.inf) == 4 * (token_by_token + attention)


def test_fused_attention_keeps_its_output_and_a_number_a_query_instead_of_scores():
    squares, fused = (memory.attention_kept(TINY, ROWS, chunked_from) for chunked_from in (math.inf, 0))
    assert squares - fused == 4 * (2 * 89 - 13 * (8 + 2))


def test_packed_rows_keep_their_tokens_but_attend_as_rows():
    """12 tokens instead of 13, 8 numbers of sines and cosines for each, and 16 of queries, keys and values behind the
    prefix that its views keep alive; attention sees rows as before."""
    packed = memory.block_kept(TINY, LORA, ROWS._replace(level="packed"), math.inf)
    padded = memory.block_kept(TINY, LORA, ROWS, math.inf)
    assert packed - padded == 4 * (12 * 8 + 9 * 16 - (16 + 32 + 40 + 14))


def test_a_map_that_is_not_adapted_does_not_keep_its_input():
    some = LORA._replace(inputs=frozenset({"attention"}), ranks=4)
    difference = memory.block_kept(TINY, LORA, ROWS, 0) - memory.block_kept(TINY, some, ROWS, 0)
    assert difference == 4 * 13 * (8 + 8 + 16 + 10)


def test_a_checkpoint_keeps_the_input_of_each_block():
    setting = SQUARES._replace(checkpoint=True)
    assert memory.kept(TINY, LORA, ROWS, setting) == 4 * (2 * 13 * 8 + 2 * 6 * 8)


def test_no_more_of_the_head_than_a_chunk():
    assert memory.head_forward(TINY, ROWS) == memory.LOGITS * 6 * 50 * 4
    assert memory.head_forward(TINY, ROWS._replace(scored=10_000)) == memory.LOGITS * 10_000 * 50 * 4


def test_every_part_of_a_batch_has_a_chunk_of_logits_and_gradients_of_head_and_embedding():
    many = ROWS._replace(scored=10**9)
    assert memory.head_forward(TINY, many._replace(parts=3)) == 3 * memory.head_forward(TINY, many)
    assert memory.head_forward(TINY, ROWS._replace(parts=3)) == memory.head_forward(TINY, ROWS)  # all of it at once
    for tied, once in ((False, 1), (True, 2)):
        full = LORA._replace(full=True, head=True, tied=tied)
        assert memory.head_backward(TINY, full, ROWS) == 4 * 50 * (3 * 6 + once * 8)
        assert memory.head_backward(TINY, full, ROWS._replace(parts=2)) == 4 * 50 * (3 * 6 + (once + 2) * 8)


def test_parts_by_hand():
    found = total()
    assert (found.weights, found.trained, found.optimizer, found.gradients) == (5000, 1000, 2000, 1000)
    assert total(steps=2).gradients == 2000  # the loop holds those of the step before
    assert total(steps=2, setting=SQUARES._replace(accumulate=2)).gradients == 3000
    assert found.peak == max(found.phases.values())


sizes = partial(st.integers, 1)
layouts = st.builds(
    BatchLayout, prompts=sizes(4), shared=st.integers(0, 300), rows=sizes(8), width=sizes(300), rest=sizes(300),
    scored=sizes(2000), level=st.sampled_from(["packed", "prefix"]), parts=sizes(4),
    tree=st.just(0) | st.integers(1, 300),  # named, or hypothesis draws any number for a NamedTuple's default too
)  # fmt: skip
shapes = st.builds(
    Shape, layers=st.integers(2, 40), hidden=st.sampled_from([64, 512, 4096]), inner=st.sampled_from([128, 2048]),
    heads=st.sampled_from([4, 32]), kv_heads=st.sampled_from([1, 4]), head_dim=st.sampled_from([32, 128]),
    vocabulary=st.sampled_from([300, 150_000]), item=st.sampled_from([2, 4]),
    normed_heads=st.sampled_from([0, 36]),
)  # fmt: skip
settings = st.builds(
    Setting, checkpoint=st.booleans(), states=st.integers(0, 2), accumulate=st.integers(1, 4),
    attention=st.sampled_from([AttentionCost(0), AttentionCost(0, 64), AttentionCost(1024, 0, 1024),
                               AttentionCost(math.inf, 0, math.inf)]),
    in_flight=st.sampled_from([0, 400_000_000]),
)  # fmt: skip


def peak(shape, at, setting, frozen=10**6, trained=LORA):
    trained = trained._replace(layers=shape.layers)
    return predict(shape, trained, Frozen(frozen), setting, 2, Layouts((at,), (at,), at)).peak


@given(shapes, layouts, settings)
def test_more_rows_never_need_less(shape, at, setting):
    assert peak(shape, at._replace(rows=at.rows + 1), setting) >= peak(shape, at, setting)


@given(shapes, layouts, settings)
def test_longer_rows_never_need_less_where_attention_stays_what_it_is(shape, at, setting):
    fixed = setting.attention if setting.attention.chunked_from == 0 else AttentionCost(math.inf, 0, math.inf)
    fixed = setting._replace(attention=fixed)
    assert peak(shape, at._replace(width=at.width + 8), fixed) >= peak(shape, at, fixed)


@given(shapes, layouts, settings)
def test_what_a_checkpoint_keeps_is_never_more(shape, at, setting):
    without, with_one = (setting._replace(checkpoint=on, in_flight=0) for on in (False, True))
    trained = LORA._replace(layers=shape.layers)
    assert memory.kept(shape, trained, at, with_one) <= memory.kept(shape, trained, at, without)
    if shape.layers >= 4:  # of fewer, what is computed again is as much as what was kept
        assert peak(shape, at, with_one) <= peak(shape, at, without)


@given(shapes, layouts, settings)
def test_lighter_weights_lower_the_peak_by_as_much(shape, at, setting):
    assert peak(shape, at, setting) - peak(shape, at, setting, frozen=400_000) == 600_000


@pytest.mark.parametrize("states", [0, 1, 2])
def test_states_of_the_optimizer_are_counted_once_per_trained_array(states):
    assert total(setting=SQUARES._replace(states=states)).optimizer == 1000 * states


def pairs_of(lengths, vocabulary=1000, prompt=96):
    """Random pairs whose completions have the lengths given."""
    draw = np.random.default_rng(0)
    ids = lambda n: draw.integers(0, vocabulary, n).astype(np.int32)  # noqa: E731
    return [Example(ids(prompt), ids(chosen), ids(rejected), "x") for chosen, rejected in lengths]


def really_kept(model, batch, checkpoint, level):
    """Bytes that exist while the loss is known and its gradients are not yet."""
    way = forward_fns(model, checkpoint, level).train

    def loss(batch):
        found = score_pairs(model, batch, way)
        return (found.chosen - found.rejected).sum()

    mx.eval(list(batch[:-1]))
    before = mx.get_active_memory()
    value, gradients = nn.value_and_grad(model, loss)(batch)
    mx.eval(value)
    return mx.get_active_memory() - before, gradients


CASES = {
    "lora": ("llama", {}, False, [(65, 65)] * 2),
    "one map": ("llama", {"keys": ["self_attn.q_proj"]}, False, [(65, 65)] * 2),
    "ragged": ("llama", {}, False, [(17, 61)] * 2),
    "padded": ("llama", {}, False, [(65, 65)] * 2),
    "queries normed": ("qwen3", {}, False, [(65, 65)] * 2),
    "full": ("llama", {"method": "full"}, False, [(65, 65)] * 2),
    "upper half": ("llama", {"layers": 4}, False, [(65, 65)] * 2),
}


@pytest.mark.parametrize("case", rest_slow(list(CASES), list(CASES)[::3]))
def test_mlx_keeps_what_the_formula_says(case):
    """Within 4 %: masks, one number a token and the like are not counted."""
    kind, lora, checkpoint, lengths = CASES[case]
    model = tiny_model(kind, 1000, hidden_size=256, num_hidden_layers=8, intermediate_size=512, head_dim=64)
    pairs, config = pairs_of(lengths), LoraConfig(rank=8, **lora)
    attach_lora(model, config)
    level = level_of(model, "prefix" if case in ("padded", "one map") else "packed")
    at = planned_batch(Examples.of(pairs), tuple(range(len(pairs))), level).layout
    shape = Shape(8, 256, 512, 4, 2, 64, 1000, 4, 6 if kind == "qwen3" else 0)
    setting = Setting(checkpoint, 2, 1, AttentionCost(SHORT + 1 if this_machine().kind == "cpu" else 0))
    expected = memory.kept(shape, trained_of(model, config, level), at, setting)
    found, _ = really_kept(model, collate(pairs, range(len(pairs)), len(pairs)), checkpoint, level)
    assert found == pytest.approx(expected, rel=0.04)


# What was read off the shipped library for four pairs of 1,024 tokens, checkpointed: GB planned before, and the squares
# of the fused backward pass on top.
METAL = {
    "SmolLM2-135M": (Shape(30, 576, 1536, 9, 3, 64, 49152, 2), 0.74 + 0.43),
    "Llama-3.2-1B": (Shape(16, 2048, 8192, 32, 8, 64, 128256, 2), 1.82 + 1.26),
    "Qwen3-4B": (Shape(36, 2560, 9728, 32, 8, 128, 151936, 2, 40), 3.10 + 1.52),
}


@pytest.mark.parametrize("name", METAL)
def test_metals_fused_backward_pass_is_counted_with_its_squares(name):
    shape, expected = METAL[name]
    at = BatchLayout(prompts=4, shared=0, rows=8, width=1024, rest=8192, scored=4096)
    trained = Trained(shape.layers, 0, 8 * 7, frozenset({"attention", "out", "mlp", "inner"}))
    setting = Setting(True, 2, 1, AttentionCost(0, 1024))
    assert memory.step_memory(shape, trained, at, setting) / 1e9 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("llama", {"head_dim": 64}, (0, 1024, 0)),
        ("llama", {"head_dim": 256}, (0, 1024, math.inf)),
        ("llama", {"head_dim": 48}, (1024, 0, 1024)),
        ("gemma2", {"head_dim": 64}, (math.inf, 0, math.inf)),
    ],
)
def test_which_attention_a_mac_is_planned_with(fake_mac, kind, sizes, expected):
    model = tiny_model(kind, **sizes)
    shape = Shape(3, 32, 64, 4, 2, sizes["head_dim"], 300, 2)
    assert attention_cost(model, shape, windowed=False) == expected
    if kind == "llama":
        assert attention_cost(model, shape, windowed=True).chunked_from == 1024


def test_what_is_in_flight_is_counted_beside_a_step():
    step = lambda setting: total(setting=setting).phases["backward"]  # noqa: E731
    ahead = step(SQUARES._replace(in_flight=10**9)) - step(SQUARES)
    assert 0 < ahead <= 10**9 * TINY.item
    assert step(SQUARES._replace(in_flight=7)) - step(SQUARES) == 7 * TINY.item
