"""`mlxdpo bench`: the arithmetic by hand, and the shape of the answer. Times are not asserted."""

import json

import fake_mac
import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model, write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run
from mlxdpo.commands.bench import PUBLISHED, count_weights
from mlxdpo.config import LoraConfig
from mlxdpo.estimate.flops import Weights, Work, forward_flops, step_flops, work
from mlxdpo.machine import device
from mlxdpo.model.adapters import attach_lora

# A block of the tiny llama: q 32x32, k and v 32x16, o 32x32, three maps between 32 and 64.
BLOCK = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64


def test_work_by_hand():
    """A prompt of 3 with completions of 2 and 1: tokens 3 + 1 + 0; pairs 6, and one token that sees 3 and itself."""
    assert work([(3, (2, 1))]) == Work(tokens=4, pairs=10, scored=3)


@given(st.integers(1, 50), st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_pairs_are_what_a_causal_mask_shows(prompt, completions):
    seen = prompt * (prompt + 1) // 2 + sum(prompt + i for c in completions for i in range(1, c))
    assert work([(prompt, completions)]).pairs == seen


def test_operations_by_hand():
    weights, at = Weights(linear=10, adapters=3, head=7, attention=5, layers=2), Work(tokens=4, pairs=6, scored=2)
    assert forward_flops(weights, at) == 2 * 4 * 13 + 4 * 6 * 5 * 2 + 2 * 2 * 7
    assert step_flops(weights, at) == 2 * forward_flops(weights, at) + 4 * 6 * 5 * 2 + 2 * 4 * 3
    full = weights._replace(full=True, adapters=0)
    assert step_flops(full, at) == 2 * forward_flops(full, at) + 4 * 6 * 5 * 2 + 2 * 4 * 10 + 2 * 2 * 7


def test_a_model_is_counted_as_it_is():
    found = count_weights(attach_lora(tiny_model(), LoraConfig(rank=2)), False)
    adapters = 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert found == Weights(3 * BLOCK, 3 * adapters, 300 * 32, 32, 3)


def test_quantised_weights_count_like_others():
    plain = tiny_model(hidden_size=64)
    before = count_weights(plain, False)
    nn.quantize(plain, group_size=32, bits=4)
    assert count_weights(plain, False) == before


def test_of_a_mixture_only_what_a_token_meets_counts():
    """Four experts of 32, of which a token meets two, and a router of 32 x 4."""
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert count_weights(tiny_model("qwen3_moe"), False).linear == 3 * (attention + 32 * 4 + 2 * 3 * 32 * 32)


@pytest.mark.parametrize("extra", [[], ["--checkpoint"], ["--lora.method", "full"]])
def test_the_answer(extra, tmp_path, capsys):
    folder = write_model(tmp_path / "model", chatml_tokenizer())
    line = ["bench", "--model", str(folder), "--prompt", "8", "--completion", "4", "--repeats", "1", "--json", *extra]
    assert run(line) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["distinct_tokens"] == 2 * (8 + 3 + 3) and found["pairs"] == 2
    assert set(found["passes"]) == {"step", "forward"}
    for one in found["passes"].values():
        assert one["pairs_per_second"] * one["seconds"] == pytest.approx(2)
        assert one["tokens_per_second"] * one["seconds"] == pytest.approx(28)
        assert one["share"] == pytest.approx(one["gflops"] / one["matmul_gflops"]) and 0 < one["share"] < 1
        assert one["peak_memory"] > 0


def test_for_a_person(tmp_path, capsys):
    folder = write_model(tmp_path / "model", chatml_tokenizer())
    assert run(["bench", "--model", str(folder), "--prompt", "8", "--completion", "4", "--repeats", "1"]) == 0
    said = capsys.readouterr().out
    assert "28 distinct" in said and "forward" in said and "float32" in said


def test_on_a_mac_the_shares_stand_beside_what_others_published(tmp_path, capsys, monkeypatch):
    """And nowhere else; none of those figures passes for ours."""
    folder = write_model(tmp_path / "model", chatml_tokenizer())
    line = ["bench", "--model", str(folder), "--prompt", "8", "--completion", "4", "--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_detect_machine", lambda: device.Machine("cpu", "a CPU", 32 << 30, "Linux"))
        assert run(line) == 0
    assert "published" not in capsys.readouterr().out
    fake_mac.install(monkeypatch.setattr)
    assert run([*line, "--model.dtype", "float32"]) == 0
    said = capsys.readouterr().out
    measured, _, others = said.partition("published by others for Macs, not verified here")
    assert "%" in measured and "Apple M2 Pro" in measured
    assert all(one.source in others and one.figure in others for one in PUBLISHED)
