"""Parts of a batch side by side: the same numbers as the whole batch, each part and its gradient in its own stream."""

import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gradients import RECURRENT, apart, gradients, moved, ragged, rounding, weighted
from hypothesis import given, settings
from hypothesis import strategies as st
from levels_of import at_level, rewards_at
from mlx.utils import tree_flatten
from slow_cases import rest_slow
from tiny_models import SHAPES, tiny_model

from mlxdpo.config import LoraConfig, LossConfig
from mlxdpo.data import batching
from mlxdpo.data.batching import SMALLEST_PART, WORTH, collate, cut_rows
from mlxdpo.data.examples import Examples
from mlxdpo.forward import layer_plan, streams
from mlxdpo.forward.choose_forward import PLAIN_FORWARD, detailed_fns, forward_fns
from mlxdpo.forward.layer_plan import checkpointed
from mlxdpo.forward.levels import PLAIN
from mlxdpo.forward.reward_head import NAME, attach_head
from mlxdpo.losses import resolve
from mlxdpo.machine import openblas
from mlxdpo.training.plan import planned_batch
from mlxdpo.training.step import make_gradient, make_scorer
from mlxdpo.types import Example

LONG = ((90, 100, 50), ((50, 45, 41), (22, 30, 40), (40, 23, 13)))


def cut(streams_here, number, *shape):
    """A ragged batch whole, and in that many parts."""
    whole = ragged(*(shape or LONG))
    streams_here(number)
    parts = ragged(*(shape or LONG))
    assert not whole.parts and len(parts.parts) == number
    return whole, parts


# Every family packed and padded, with and without checkpointing; the four together for the plainest and the oddest.
# How a batch is cut has little to do with the family: one of each kind of layer, the others in CI.
OF_EACH_KIND = {"llama", "gemma2", "gemma3_text", "mixtral", "qwen3", *RECURRENT}
PASSES = [
    *((kind, False, "packed") for kind in sorted(set(SHAPES) - {"gemma2"} - RECURRENT)),
    *((kind, True, "prefix") for kind in sorted(SHAPES)),
    *((kind, how, "head") for kind in ("llama", "gemma2") for how in (False, True)),
]


@pytest.mark.parametrize(
    ("kind", "checkpoint", "level"), rest_slow(PASSES, [case for case in PASSES if case[0] in OF_EACH_KIND])
)
def test_value_and_gradient_are_those_of_the_whole_batch(kind, checkpoint, level, streams_here):
    model, (whole, parts) = moved(tiny_model(kind), LoraConfig(rank=4)), cut(streams_here, 3)
    value, wanted = gradients(model, weighted(at_level(level, checkpoint), whole))
    fast, got = gradients(model, weighted(at_level(level, checkpoint), parts))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < (
        5e-5 if kind == "gemma" else rounding(kind)
    )


@pytest.mark.parametrize("fns", [PLAIN_FORWARD, detailed_fns(PLAIN_FORWARD)], ids=["logps", "details"])
def test_the_plain_path_runs_in_streams_too(fns, streams_here):
    """Nothing ties its streams, and the numbers are the same."""
    model, (whole, parts) = tiny_model("llama"), cut(streams_here, 2)
    one, other = (fns.score(model, batch) for batch in (whole, parts))
    for a, b in zip(tree_flatten(one), tree_flatten(other), strict=True):
        assert np.allclose(a[1], b[1], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_dora_and_a_trained_head(method, streams_here):
    model, (whole, parts) = moved(tiny_model("llama"), LoraConfig(method=method, rank=4)), cut(streams_here, 2)
    (value, wanted), (fast, got) = (gradients(model, weighted(at_level(), batch)) for batch in (whole, parts))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


def test_a_prompt_without_a_shared_prefix_runs_beside_one_that_has_it(streams_here):
    model, (whole, parts) = (
        moved(tiny_model("llama"), LoraConfig(rank=4)),
        cut(streams_here, 2, (5, 90), ((95, 60), (70, 31))),
    )
    assert [part.prefix.shape[1] > 0 for part in parts.parts] == [False, True]
    (value, wanted), (fast, got) = (gradients(model, weighted(at_level(), batch)) for batch in (whole, parts))
    assert fast == pytest.approx(value, rel=1e-5, abs=1e-4) and apart(got, wanted) < 1e-5


@pytest.mark.parametrize("knobs", [{}, {"ld_alpha": 0.5}, {"wpo": True}], ids=str)
def test_everything_a_step_is_made_of(knobs, streams_here):
    """Losses, gradients and whatever modifiers ask of the pairs, in a batch that is filled up."""
    model, pairs, loss = moved(tiny_model("qwen3"), LoraConfig(rank=4)), pairs_of(*LONG), resolve(LossConfig(**knobs))
    ref = np.random.default_rng(2).normal(-300, 3, (len(pairs), 4)).astype(np.float32)
    fns, batches = detailed_fns(forward_fns(model)) if knobs else forward_fns(model), []
    for number in (1, 2):
        streams_here(number)
        batches.append(collate(pairs, tuple(range(len(pairs))), len(pairs) + 2, ref))
    assert [len(batch.parts) for batch in batches] == [0, 2] and len(batches[1].weight) == len(pairs) + 2
    gradient = make_gradient(model, loss, fns.train)
    one, other = (gradient(batch, mx.array(0.2)) for batch in batches)
    for name, wanted in one.pairs._asdict().items():
        assert wanted is None or np.allclose(getattr(other.pairs, name), wanted, rtol=1e-5, atol=1e-3), name
    assert np.allclose(other.losses, one.losses, rtol=1e-4, atol=1e-4)
    flat = [np.concatenate([np.array(g).ravel() for _, g in tree_flatten(found.gradients)]) for found in (one, other)]
    assert apart(flat[1], flat[0]) < 1e-4


def pairs_of(prompts, completions):
    """Examples of these lengths, in which each pair's rejected answer is the next one's chosen."""
    draw, made = np.random.default_rng(0), []
    ids = lambda n: draw.integers(1, 300, n).astype(np.int32)  # noqa: E731
    for prompt, lengths in zip(map(ids, prompts), completions, strict=True):
        made += [Example(prompt, a, b, "") for a, b in itertools.pairwise([ids(n) for n in lengths])]
    return made


def test_scores_and_rewards(streams_here):
    model, (whole, parts) = tiny_model("llama"), cut(streams_here, 3)
    one, other = (make_scorer(model)(batch) for batch in (whole, parts))
    assert np.allclose(one.chosen, other.chosen, atol=1e-3) and np.allclose(one.rejected, other.rejected, atol=1e-3)
    attach_head(model)
    model[NAME].weight = mx.random.normal(model[NAME].weight.shape)
    one, other = (np.array(rewards_at()(model, batch)) for batch in (whole, parts))
    assert one.shape == whole.length.shape and np.allclose(one, other, rtol=1e-5, atol=1e-4)


def test_dropout_is_the_same_each_time(streams_here):
    model, (_, parts) = moved(tiny_model("llama"), LoraConfig(rank=4, dropout=0.5)), cut(streams_here, 2)
    model.train()
    gradient = make_gradient(model, resolve(LossConfig()), forward_fns(model, checkpoint=True).train)
    found = []
    for seed in (3, 3, 4):
        mx.random.seed(seed)
        found.append(np.array(gradient(parts, mx.array(1.0)).losses))
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()


class Seen:
    """Which stream is current whenever a function of this project that MLX differentiates is called."""

    def __init__(self):
        self.streams = []

    def __call__(self, function):
        def noting(*args):
            self.streams.append(mx.default_stream(mx.cpu))
            return function(*args)

        return noting


def in_stream_1(gradient):
    """Run the forward pass of `gradient` in stream 1 and differentiate outside; which streams were current."""
    seen, forward = Seen(), []

    def function(x):
        forward.append(mx.default_stream(mx.cpu))
        return mx.sin(x)

    def loss(x):
        with streams.stream(1):
            y = layer_plan.with_gradient(function, seen(gradient))(x)
        return y.sum()

    return mx.grad(loss)(mx.array([0.3, 0.7])), forward, seen.streams


def test_a_gradient_of_our_own_is_computed_in_the_stream_of_its_forward_pass():
    got, forward, backward = in_stream_1(lambda primals, cotangent, _: cotangent * mx.cos(primals))
    assert np.allclose(got, np.cos([0.3, 0.7]))
    assert forward == backward != [mx.default_stream(mx.cpu)] and len(forward) == 1


def test_every_function_with_a_gradient_written_by_hand_keeps_its_stream():
    """Attention, SwiGLU and the head's log-probs come from `with_gradient`; only `interleave` does without it."""
    root = Path(streams.__file__).parent
    by_hand = [file.name for file in root.rglob("*.py") if "custom_function" in file.read_text("utf-8")]
    assert sorted(by_hand) == ["layer_plan.py", "streams.py"]


def test_a_layer_under_a_checkpoint_is_computed_again_in_its_stream():
    seen, layer = Seen(), nn.Linear(2, 2)

    def loss(x):
        with streams.stream(1):
            y = checkpointed(layer, seen(layer))(x)
        return y.sum()

    mx.eval(mx.grad(loss)(mx.ones((1, 2))))
    assert len(seen.streams) == 2 and seen.streams[0] == seen.streams[1] != mx.default_stream(mx.cpu)


def test_interleaved_streams_change_neither_values_nor_gradients():
    first, second = mx.array([1.0, 2.0]), mx.array([3.0])

    def total(first, second):
        (a, b), (c,) = streams.interleave([(first, first * first), (second,)])
        return (a + 3 * b).sum() + 5 * c.sum()

    value, gradients = mx.value_and_grad(total, argnums=(0, 1))(first, second)
    assert value.item() == 3 + 15 + 15
    assert gradients[0].tolist() == [7, 13] and gradients[1].tolist() == [5]
    alone = [(first,)]
    assert streams.interleave(alone) == alone


def test_streams_wait_for_each_other_on_the_way_there_and_back(monkeypatch):
    """Without that MLX computes them one after the other, and nothing but the clock would say so."""
    tied, depends = [], mx.depends
    monkeypatch.setattr(mx, "depends", lambda own, others: tied.append((len(own), len(others))) or depends(own, others))

    def total(first, second):
        (a, b), (c,) = streams.interleave([(first, first), (second,)])
        return (a * b).sum() + c.sum()

    mx.eval(mx.grad(total, argnums=(0, 1))(mx.ones(2), mx.ones(1)))
    assert tied == [(2, 1), (1, 2)] * 2


def test_streams_are_interleaved_layer_by_layer(streams_here, monkeypatch):
    widths, interleave = [], streams.interleave
    monkeypatch.setattr(layer_plan, "interleave", lambda states: widths.append(len(states)) or interleave(states))
    model, (_, parts) = tiny_model("llama"), cut(streams_here, 3)
    mx.eval(at_level()(model, parts))
    assert widths == [3] * len(model.layers)


def test_what_is_in_streams_is_evaluated_with_single_threads_and_nothing_else(streams_here, monkeypatch):
    entered = []

    @contextmanager
    def noting():
        entered.append(1)
        yield

    monkeypatch.setattr(layer_plan, "single_blas", noting)
    model, (whole, parts) = moved(tiny_model("llama"), LoraConfig(rank=4)), cut(streams_here, 2)
    gradient, scorer = make_gradient(model, resolve(LossConfig()), forward_fns(model).train), make_scorer(model)
    for batch, times in ((whole, 0), (parts, 2)):
        gradient(batch, mx.array(1.0))
        scorer(batch)
        assert len(entered) == times


@settings(max_examples=200)
@given(data=st.data(), most=st.integers(1, 5), branches=st.booleans())
def test_cuts_lose_no_row_and_the_largest_part_is_worth_it(data, most, branches):
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    group = np.repeat(np.arange(len(counts)), counts)
    size = st.integers(1, 400)
    prompt = np.repeat([data.draw(size) for _ in counts], counts)
    own = np.array([data.draw(size) for _ in group])
    cuts = cut_rows(group, prompt, own, branches, most)
    assert [i for cut in cuts for i in range(len(group))[cut]] == list(range(len(group)))
    assert 1 <= len(cuts) <= most
    tokens = lambda rows: own[rows].sum() + sum({group[i]: prompt[i] for i in range(len(group))[rows]}.values())  # noqa: E731
    if len(cuts) > 1:
        total = tokens(slice(0, len(group)))
        assert total >= 2 * SMALLEST_PART and max(map(tokens, cuts)) < WORTH * (1 + 1 / most) * total
    if branches:
        assert all(group[cut.start] != group[cut.start - 1] for cut in cuts[1:])


def test_cuts_are_as_even_as_rows_allow():
    def found(group, own, prompt=300, branches=False, most=2):
        return [cut.start for cut in cut_rows(*map(np.array, (group, [prompt] * len(group), own)), branches, most)]

    assert found([0, 0, 1, 1, 2, 2, 3, 3], [50] * 8) == [0, 4]
    assert found([0, 0, 0, 0, 1, 1], [50] * 6) == [0, 4]
    assert found([0, 0, 1, 1, 2, 2], [50] * 6, most=3) == [0, 2, 4]
    assert found([0, 0, 1, 1, 2, 2, 3, 3], [5] * 8, prompt=10) == [0]  # too small to gain by it
    # Ranked answers to one prompt: it is computed twice, if that is little beside the answers.
    assert found([0] * 4, [320] * 4, prompt=192) == [0, 2]
    assert found([0] * 4, [320] * 4, prompt=192, branches=True) == [0]
    assert found([0] * 2, [128] * 2, prompt=256) == [0]
    # One long row leaves the other stream too little.
    assert found([0, 0, 1, 1], [900, 50, 50, 50], prompt=100) == [0]


@pytest.mark.parametrize("knobs", [{}, {"wpo": True}], ids=str)
def test_answers_to_one_prompt_go_side_by_side(knobs, streams_here):
    model, loss = moved(tiny_model("llama"), LoraConfig(rank=4)), resolve(LossConfig(**knobs))
    pairs, found = pairs_of((20,), ((80, 95, 70, 83),)), []
    fns = detailed_fns(forward_fns(model)) if knobs else forward_fns(model)
    for number in (1, 2):
        streams_here(number)
        batch = collate(pairs, (0, 1, 2), 3)
        assert [part.rows.shape[0] for part in batch.parts] == [2, 2] * (number - 1)
        found.append(make_gradient(model, loss, fns.train)(batch, mx.array(1 / 3)))
    one, other = found
    assert np.allclose(other.losses, one.losses, rtol=1e-4, atol=1e-4)
    flat = [np.concatenate([np.array(g).ravel() for _, g in tree_flatten(each.gradients)]) for each in found]
    assert apart(flat[1], flat[0]) < 1e-4


def test_a_plan_knows_the_parts_that_collate_makes(streams_here):
    pairs = pairs_of(*LONG)
    for number in (1, 2, 3):
        streams_here(number)
        indices = tuple(range(len(pairs)))
        found = planned_batch(Examples.of(pairs), indices, PLAIN).layout.parts
        assert found == max(1, len(collate(pairs, indices, len(pairs)).parts)) == number


def test_a_batch_in_one_stream_is_laid_out_once(streams_here, monkeypatch):
    """On a Mac a batch costs what it did before there were streams."""
    calls, lay_out, pairs = [], batching._lay_out, pairs_of(*LONG)
    monkeypatch.setattr(batching, "_lay_out", lambda *a: calls.append(1) or lay_out(*a))
    for number, times in ((1, 1), (2, 3)):
        streams_here(number)
        calls.clear()
        collate(pairs, tuple(range(len(pairs))), len(pairs))
        assert len(calls) == times


def test_a_gpu_has_one_stream(monkeypatch):
    monkeypatch.undo()  # of the fixture that every test has
    monkeypatch.setattr(openblas, "blas_threads", lambda: 8)
    for kind, wanted in (("cpu", 8), ("metal", 1), ("cuda", 1)):
        monkeypatch.setattr(openblas, "this_machine", lambda kind=kind: SimpleNamespace(kind=kind))
        assert openblas.stream_count() == wanted


SAY = "import os; from mlxdpo.machine import openblas; print(openblas.stream_count(), os.getenv('MLX_BFS_MAX_WIDTH'))"


@pytest.mark.skipif(sys.platform != "linux", reason="OpenBLAS is a matter of Linux")
def test_a_process_that_is_given_one_core_takes_one_and_a_variable_that_is_set_stays(monkeypatch):
    monkeypatch.delenv("MLX_BFS_MAX_WIDTH", raising=False)  # this process has set it for itself
    found = []
    for more in ({"OPENBLAS_NUM_THREADS": "1"}, {"OPENBLAS_NUM_THREADS": "2", "MLX_BFS_MAX_WIDTH": "7"}):
        ran = subprocess.run([sys.executable, "-c", SAY], env=os.environ | more, capture_output=True, check=True)
        found.append(ran.stdout.split())
    wide = b"100" if openblas._installed("mlx-cpu") else b"None"
    assert found[0] == [b"1", wide] and found[1][1] == b"7"


@pytest.mark.skipif(openblas._openblas() is None, reason="another BLAS computes here")
def test_a_matmul_in_streams_takes_one_thread():
    """Also where this process was given one."""
    during, library, threads = [], openblas._openblas(), openblas.blas_threads()
    library.scipy_openblas_set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt), openblas.single_blas():
            during.append(openblas.blas_threads())
            raise KeyboardInterrupt
        assert during == [1] and openblas.blas_threads() == 2
        library.scipy_openblas_set_num_threads(1)
        with openblas.single_blas():
            assert openblas.blas_threads() == 1
        assert openblas.blas_threads() == 1
    finally:
        library.scipy_openblas_set_num_threads(threads)
