"""The client is asked: a wrong answer fails the gate, a missing client is not asked, real ones answer like the run."""

import contextlib
import json
import shutil

import pytest
from tiny_exports import known_tokenizer, trained_run
from tiny_models import write_model

from mlxdpo.exporters import ask, export, read_record
from mlxdpo.exporters.ask import ClientAnswer, ClientReport
from mlxdpo.exporters.gguf import QUANTIZER
from mlxdpo.exporters.lmstudio import STOPS_KEY, TEMPLATE_KEY
from mlxdpo.exporters.source import Choices
from mlxdpo.types import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clients")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        write_model(folder / "llama", known_tokenizer(), hidden_size=64, head_dim=16, vocab_size=320)
        yield trained_run(folder, data={"template": "auto"})


def planted(answer):
    """A client that answers as told, for the target mlx."""
    asked = []

    @contextlib.contextmanager
    def opened():
        yield lambda question: asked.append(question) or answer(question)

    return {"mlx": lambda source, folder: ("planted", opened())}, asked


def test_a_client_that_answers_otherwise_fails_the_gate(run, tmp_path, monkeypatch):
    clients, asked = planted(lambda question: ClientAnswer((5, 6, 7), (-0.01, -0.01, -0.01), "never said"))
    monkeypatch.setattr(ask, "CLIENTS", clients)
    done = export(run, ["mlx"], tmp_path / "out", ask=6)
    target = done.targets["mlx"]
    assert not target.kept and target.fidelity.reason == "planted answered 6 of 6 prompts differently from the run"
    assert len(asked) == 6 and asked[0].turns[0].role == "user" and len(asked[0].ids) > 3
    assert read_record(tmp_path / "out").targets["mlx"].asked["unlike"] == 6
    assert "planted: 0 of 6" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_who_is_not_asked_is_said(run, tmp_path):
    done = export(run, ["mlx"], tmp_path / "out")
    assert done.targets["mlx"].asked is None
    assert "not asked" in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(("unlike", "passes"), [(0, True), (5, True), (6, False)])
def test_more_than_half_unlike_is_another_model(unlike, passes):
    assert (ClientReport("c", 10, 10 - unlike, 1.0, unlike).reason is None) == passes


@pytest.mark.processes
@pytest.mark.parametrize("target", ["server", "fused"])
def test_mlx_lm_s_server_answers_like_the_run(target, run, tmp_path):
    asked = export(run, [target], tmp_path / "out", ask=10).targets[target].asked
    assert asked["client"] == "mlx_lm.server" and asked["equal"] == asked["prompts"] == 10
    assert asked["worst_logp"] < 1e-3


@pytest.mark.parity
@pytest.mark.parametrize("target", ["hf", "peft"])
def test_transformers_and_peft_answer_like_the_run(target, run, tmp_path):
    pytest.importorskip("peft")
    asked = export(run, [target], tmp_path / "out", ask=10).targets[target].asked
    assert asked["equal"] == asked["prompts"] == 10 and asked["worst_logp"] < 1e-3


@pytest.mark.parametrize("weights", ["mlx", "gguf"])
def test_lm_studio_s_folder_and_preset(weights, run, tmp_path):
    if weights == "gguf":
        pytest.importorskip("gguf", reason="the optional gguf package is not installed")
    export(run, ["lmstudio"], tmp_path / "out", choices=Choices(lmstudio=weights, publisher="jane doe"))
    folder = tmp_path / "out" / "lmstudio"
    model = folder / "jane-doe" / "run"
    assert (model / ("model.gguf" if weights == "gguf" else "config.json")).is_file()
    preset = json.loads((folder / "run.preset.json").read_text("utf-8"))
    fields = {field["key"]: field["value"] for field in preset["operation"]["fields"]}
    assert fields[STOPS_KEY] == ["<|im_end|>"]
    assert "<|im_start|>" in fields[TEMPLATE_KEY]["jinjaPromptTemplate"]["template"]


def test_a_refused_packing_is_tried_again_and_both_figures_are_said(run, tmp_path):
    target = export(run, ["quantized"], tmp_path / "out", choices=Choices(bits=2, group_size=32)).targets["quantized"]
    assert not target.kept and target.files == {}
    assert "rounded to the nearest: slope" in target.fidelity.reason and "GPTQ: slope" in target.fidelity.reason
    assert "--to packed-base keeps the adapter in floating point" in target.fidelity.reason


@pytest.mark.parametrize(("ends", "words"), [("exit 0", None), ("echo no such type >&2; exit 1", "no such type")])
def test_k_quants_are_packed_by_llama_cpp_s_own_tool(ends, words, run, tmp_path, monkeypatch):
    """A stand-in that copies shows how the tool is called; what it packs is its own."""
    pytest.importorskip("gguf", reason="the optional gguf package is not installed")
    choices = Choices(gguf_type="q4_k_m")
    if shutil.which(QUANTIZER) is None:
        with pytest.raises(UserError, match=r"packed by llama.cpp's llama-quantize, which is not on the PATH"):
            export(run, ["gguf"], tmp_path / "out", choices=choices)
    tool = tmp_path / "bin" / QUANTIZER
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2"\n{ends}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    if words is not None:
        with pytest.raises(UserError, match=words):
            export(run, ["gguf"], tmp_path / "out", choices=choices)
        return
    target = export(run, ["gguf"], tmp_path / "out", choices=choices).targets["gguf"]
    assert target.kept and target.note == "q4_k_m, packed by llama-quantize from fused f32 weights"
