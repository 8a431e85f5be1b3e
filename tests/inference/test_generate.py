"""Batched sampling equals one-row decoding; a row's noise is its own, whatever the batch and the order."""

from __future__ import annotations

import mlxdpo  # noqa: F401  (the fast BLAS goes before mlx.core)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models import llama
from scipy.stats import chisquare

from mlxdpo.inference.generate import Completion, NoiseStream, draw, finished, generate, noise_streams, nucleus
from mlxdpo.types import UserError

V = 61
NO_EOS: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model():
    mx.random.seed(3)
    built = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=V,
            tie_word_embeddings=True,
        )
    )
    # A tied head makes an untrained model repeat its last token: larger layers let the context speak.
    built.apply_to_modules(lambda _, m: m.update({"weight": m.weight * 6}) if "proj" in _ else None)
    mx.eval(built.parameters())
    return built


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, V, n).tolist() for n in (5, 1, 17, 3, 9, 1, 40, 2, 5)]


def naive_greedy(model, prompt: list[int], steps: int) -> list[int]:
    """One row, no cache, no padding."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1]).item()))
    return ids[len(prompt) :]


def test_greedy_equals_decoding_one_row_without_cache(model, prompts):
    found = generate(model, prompts, max_tokens=8, eos_ids=NO_EOS, temperature=0, batch_size=4)
    expected = [naive_greedy(model, p, 8) for p in prompts]
    assert [c.tokens for c in found] == expected
    assert len({tuple(t) for t in expected}) > 5, "the toy model must not say the same to every prompt"
    assert {c.finish for c in found} == {"length"}


def one_row_sampler(stream, temperature):
    """The definition: argmax of a full row of log-probs / T plus noise of (seed, occurrence, prompt, position)."""
    position = 0

    def sample(logps):
        nonlocal position
        words = np.random.SeedSequence([*stream, position]).generate_state(2)
        position += 1
        noise = mx.random.gumbel(logps.shape, key=mx.array(words))
        return mx.argmax(logps.astype(mx.float32) / temperature + noise, axis=-1)

    return sample


@pytest.mark.parametrize("seed", [0, 5, 2**32, 2**70 + 3])
def test_sampling_equals_one_row_with_the_same_noise(model, prompts, seed):
    found = generate(model, prompts, max_tokens=6, eos_ids=NO_EOS, temperature=0.7, seed=seed, batch_size=4)
    for prompt, stream, completion in zip(prompts, noise_streams(prompts, seed), found, strict=True):
        sample, ids = one_row_sampler(stream, 0.7), list(prompt)
        for _ in range(6):
            logits = model(mx.array([ids]))[:, -1]
            ids.append(int(sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).item()))
        assert completion.tokens == ids[len(prompt) :]


def test_a_token_takes_as_many_kernels_for_64_rows_as_for_two(tmp_path):
    """Primitives of the sampler's graph: one row at a time they were 1,345 and 2,113."""
    streams = [NoiseStream((0, row)) for row in range(64)]

    def kernels(rows, top_p):
        logps = mx.zeros((rows, V))
        mx.eval(logps)
        mx.export_to_dot(str(tmp_path / "graph"), draw(logps, 0.7, top_p, streams[:rows]))
        return (tmp_path / "graph").read_text().count("shape=rectangle")

    assert kernels(64, 1.0) == kernels(2, 1.0) <= 30
    assert kernels(64, 0.9) == kernels(2, 0.9) <= 40


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_neither_batch_size_nor_order_changes_a_row(model, prompts, batch_size):
    settings = dict(max_tokens=7, eos_ids=frozenset({4, 9}), temperature=1.0, top_p=0.9, seed=1)
    base = generate(model, prompts, batch_size=3, **settings)
    order = np.random.default_rng(batch_size).permutation(len(prompts))
    shuffled = generate(model, [prompts[i] for i in order], batch_size=batch_size, **settings)
    assert shuffled == [base[i] for i in order]
    assert generate(model, [prompts[2]], batch_size=batch_size, **settings) == [base[2]]


def test_seed_decides(model, prompts):
    runs = [generate(model, prompts, max_tokens=6, eos_ids=NO_EOS, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert all(a.tokens != b.tokens for a, b in zip(runs[0], runs[2], strict=True))


def test_global_random_state_is_neither_read_nor_moved(model, prompts):
    mx.random.seed(7)
    expected = mx.random.uniform().item()
    mx.random.seed(7)
    first = generate(model, prompts, max_tokens=3, eos_ids=NO_EOS)
    assert mx.random.uniform().item() == expected
    assert generate(model, prompts, max_tokens=3, eos_ids=NO_EOS) == first


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_frequencies_match_the_distribution(model, top_p):
    """4,000 samples of one prompt against the exact next-token distribution; fixed seed, so no flakiness."""
    prompt, temperature, n = [5, 6, 7], 0.5, 4000
    logits = model(mx.array([prompt]))[0, -1:] / temperature
    probs = np.array(mx.softmax(nucleus(logits, top_p) if top_p < 1 else logits, axis=-1), np.float64)[0]
    found = generate(
        model,
        [prompt] * n,
        max_tokens=1,
        eos_ids=NO_EOS,
        temperature=temperature,
        top_p=top_p,
        batch_size=500,
    )
    counts = np.bincount([c.tokens[0] for c in found], minlength=V)
    assert not counts[probs == 0].any()
    common = probs * n >= 5
    observed, expected = counts[common], probs[common] * n
    rest = n - expected.sum()
    if rest > 5:
        observed, expected = np.append(observed, n - observed.sum()), np.append(expected, rest)
    assert len(expected) > 5
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 0.01


def test_stops_at_any_eos_and_leaves_it_out(model, prompts):
    free = generate(model, prompts, max_tokens=8, eos_ids=NO_EOS, temperature=0)
    eos = {free[0].tokens[3], free[6].tokens[5]}
    for open_end, stopped in zip(free, generate(model, prompts, max_tokens=8, eos_ids=eos, temperature=0), strict=True):
        cut = next((i for i, token in enumerate(open_end.tokens) if token in eos), None)
        assert stopped == (open_end if cut is None else Completion(open_end.tokens[:cut], "stop"))


def test_eos_as_the_last_allowed_token_is_a_stop(model, prompts):
    first = naive_greedy(model, prompts[0], 1)
    assert generate(model, prompts[:1], max_tokens=1, eos_ids=set(first), temperature=0) == [Completion([], "stop")]


def test_dropout_is_off_while_sampling_and_on_again_after(model, prompts):
    model.train()
    seen = []
    for _, _ in finished(model, prompts, max_tokens=2, eos_ids=NO_EOS):
        seen.append(model.training)
    assert seen and not any(seen) and model.training
    model.eval()
    generate(model, prompts, max_tokens=1, eos_ids=NO_EOS)
    assert not model.training


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4), max_size=8))
def test_streams_are_distinct_and_belong_to_the_prompt(prompts):
    found = noise_streams(prompts, 0)
    assert len(set(found)) == len(prompts)
    assert sorted(noise_streams(prompts[::-1], 0)) == sorted(found)


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), st.floats(0.01, 0.99))
def test_nucleus_is_the_smallest_set_that_reaches_top_p(logits, top_p):
    kept = np.isfinite(np.array(nucleus(mx.array([logits]), top_p))[0])
    probs = np.exp(np.array(logits, np.float64))
    probs /= probs.sum()
    inside, outside = probs[kept], probs[~kept]
    assert inside.sum() >= top_p - 1e-5
    assert inside.sum() - inside.min() <= top_p + 1e-5
    assert not len(outside) or outside.max() <= inside.min() + 1e-7


def test_nucleus_hand_worked():
    """Probabilities .5, .3, .2 and top_p .6: the first does not reach it, the first two do."""
    logits = mx.log(mx.array([[0.2, 0.5, 0.3]]))
    assert np.isfinite(np.array(nucleus(logits, 0.6)))[0].tolist() == [False, True, True]


@pytest.mark.parametrize(
    "prompts, settings, words",
    [
        ([[1], []], {}, "prompt 2 of 2 is empty"),
        ([[1]], {"max_tokens": 0}, "max_tokens is 0"),
        ([[1]], {"batch_size": 0}, "batch_size 0"),
        ([[1]], {"temperature": -1.0}, "temperature is -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_p": 0.0}, "top_p 0.0"),
    ],
)
def test_bad_input_is_named(model, prompts, settings, words):
    with pytest.raises(UserError, match=words):
        generate(model, prompts, **{"max_tokens": 1, "eos_ids": NO_EOS, **settings})


def test_no_prompts_no_completions(model):
    assert generate(model, [], max_tokens=1, eos_ids=NO_EOS) == []
