"""The gate: broken exports are caught, each in its own way; a failed target leaves no files; nothing half-written."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_exports import trained_run
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run as command
from mlxdpo.exporters import EXPORTERS, export, read_record
from mlxdpo.exporters.run import staged_export
from mlxdpo.exporters.source import Choices
from mlxdpo.exporters.verify import LEAST_SLOPE, MOST_KL, slope_and_correlation, token_kl, why_failed
from mlxdpo.types import UserError

# Every projection square, so that a transposed matrix still fits.
SQUARE = {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4, "intermediate_size": 64}


def square_run(folder, **sections):
    write_model(folder / "llama", chatml_tokenizer(), **SQUARE)
    return trained_run(folder, **sections)


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """Such a run, trained once."""
    folder = tmp_path_factory.mktemp("square")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        return square_run(folder)


def spoil(monkeypatch, name, file, change):
    """Let the exporter `name` write as it does, then lay `change` over the arrays of `file`."""
    exporter = EXPORTERS[name]

    def write(source, folder):
        note = exporter.write(source, folder)
        arrays = change(dict(mx.load(str(folder / file))))
        mx.eval(arrays)
        mx.save_safetensors(str(folder / file), arrays, {"format": "pt"})
        return note

    monkeypatch.setitem(EXPORTERS, name, exporter._replace(write=write))


def swapped(arrays):
    """A and B of each module as if they were each other's transpose: for a square layer the shapes are the same."""
    other = {n: n.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B") for n in arrays}
    return {other[name]: mx.contiguous(a.T) for name, a in arrays.items()}


def unscaled(arrays):
    return {name: a / 4 if "lora_B" in name else a for name, a in arrays.items()}


def without_a_layer(arrays):
    return {name: mx.zeros_like(a) if ".layers.1." in name and "lora_B" in name else a for name, a in arrays.items()}


def test_an_adapter_that_is_whole_passes(tmp_path, cache, square):
    assert export(square, ["peft"], tmp_path / "good").passed


@pytest.mark.parametrize("change", [swapped, unscaled, without_a_layer])
def test_a_broken_adapter_is_caught(change, tmp_path, cache, monkeypatch, square):
    spoil(monkeypatch, "peft", "adapter_model.safetensors", change)
    exported = export(square, ["peft", "mlx"], tmp_path / "out")
    broken = exported.targets["peft"]
    assert not exported.passed and not broken.kept and not broken.fidelity.passed
    assert broken.fidelity.token_kl > MOST_KL * broken.fidelity.policy_reference_kl
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists() and broken.files == {}
    assert exported.targets["mlx"].kept and (tmp_path / "out/mlx/adapters.safetensors").exists()


def base_model(arrays):
    """What a fuse that lost everything would be: 4-bit rounding of weights and a small tune together."""
    packed = {n: mx.quantize(a, 64, 4) for n, a in arrays.items() if a.ndim == 2}
    return {n: mx.dequantize(*packed[n], 64, 4) if n in packed else a for n, a in arrays.items()}


def test_a_small_tune_does_not_survive_4_bits(tmp_path, cache, monkeypatch):
    run = square_run(tmp_path, optim={"lr": 5e-4, "warmup": 0.0})
    exported = export(run, ["fused", "quantized"], tmp_path / "out", choices=Choices(bits=4))
    lost = exported.targets["quantized"]
    assert exported.targets["fused"].kept and not lost.kept and "token KL to the run is" in lost.fidelity.reason
    assert not (tmp_path / "out" / "quantized").exists()
    forced = export(run, ["quantized"], tmp_path / "forced", force=True).targets["quantized"]
    assert forced.kept and forced.fidelity.forced and not forced.fidelity.passed
    spoil(monkeypatch, "hf", "model.safetensors", base_model)
    assert not export(run, ["hf"], tmp_path / "hf").passed


def test_nothing_is_left_when_a_writer_fails(tmp_path, cache, monkeypatch, square):
    run = square
    first = export(run, ["mlx"], tmp_path / "out")
    before = {path.name for path in tmp_path.iterdir()}

    def fails(source, folder):
        (folder / "half").write_text("half")
        raise OSError("disk full")

    monkeypatch.setitem(EXPORTERS, "hf", EXPORTERS["hf"]._replace(write=fails))
    with pytest.raises(OSError, match="disk full"):
        export(run, ["mlx", "hf"], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before
    assert read_record(tmp_path / "out").targets == first.targets


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path, cache, square):
    run = square
    killed = tmp_path / ".out-draft-0123abc_"
    with staged_export(tmp_path / "out") as live:  # held by a lock, as long as its process lives
        killed.mkdir()
        export(run, ["hf"], tmp_path / "out")
        left = [killed.exists(), live.exists()]
    assert left == [False, True]  # what a killed export left is swept, a live one's not
    card = (tmp_path / "out/README.md").read_text()
    assert "0.05" in card or "slope" in card.lower()
    export(run, ["mlx"], tmp_path / "out")
    assert (tmp_path / "out/mlx").is_dir() and not (tmp_path / "out/model.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not an earlier export"):
        export(run, ["mlx"], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_the_command_prints_figures_and_its_status_is_the_verdict(tmp_path, cache, monkeypatch, capsys):
    square_run(tmp_path, optim={"lr": 5e-4, "warmup": 0.0})
    monkeypatch.chdir(tmp_path)
    assert command(["export", "run", "--to", "mlx,hf", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert "1.0000" in said and "10 pairs" in said and "passed" in said
    assert command(["export", "run", "--to", "quantized", "--bits", "4", "--out", "small"]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out and "its files were deleted" in said.err
    assert json.loads((tmp_path / "small/export.json").read_text())["targets"]["quantized"]["kept"] is False
    assert command(["export", "run", "--to", "quantized", "--bits", "4", "--out", "small", "--force", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["targets"]["quantized"]["fidelity"]["forced"] and "kept by --force" in said.err
    assert command(["export", "run", "--to", "mlx", "--out", "out", "--push", "me/it", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "mlx/adapters.safetensors" in said and "dry run: " in said and "private" in said


MISTAKES = {
    "export run --to onnx --out o": "`onnx` is not a target; known: mlx, peft, hf, fused, quantized, packed-base, gguf",
    "export run --to , --out o": "no target given",
    "export run --to mlx --out o --public": "--public needs --push USER/REPO",
    "export run --to mlx --out o --push me": "me",
    "export nope --to mlx --out o": "nope: no config.yaml in it",
    "export run --to mlx --out o --data none.jsonl": "none.jsonl: no such file",
    "export run --to mlx --out o --bits 7": "bits",
    "import --peft nope --model llama --out o": "nope: no PEFT adapter in it",
    "import --peft run/adapter --model llama --out o": "no PEFT adapter in it; expected",
    "import --peft p --model llama --out run": "run already exists; choose another --out",
}


def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, cache, monkeypatch, capsys):
    square_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    for line_, sentence in MISTAKES.items():
        assert command(line_.split()) == 2, line_
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and said.err.count("\n") == 1, (line_, said.err)
        assert sentence in said.err, (line_, said.err)
        assert not (tmp_path / "o").exists()


def test_token_kl_is_the_divergence_and_zero_for_equals():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(0, 3, (7, 50)) for _ in range(2))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    targets = rng.integers(0, 50, 7)
    own, other = (mx.array(x.astype(np.float32)) for x in (a, b))
    divergence, logps = token_kl(own, other, mx.array(targets))
    assert np.allclose(divergence, (p * np.log(p / q)).sum(-1), atol=1e-5)
    assert np.allclose(logps, np.log(q)[np.arange(7), targets], atol=1e-5)
    assert token_kl(own, own + 100, mx.array(targets))[0].max().item() < 1e-6


def test_the_limits_are_where_they_say():
    assert why_failed(0.05, 1.0, LEAST_SLOPE) is None and "more than 0.05" in why_failed(0.0501, 1.0, 1.0)
    assert "margins keep 0.89" in why_failed(0.0, 1.0, 0.89) and why_failed(float("nan"), 1.0, 1.0) is not None
    assert why_failed(5e-7, 0.0, None) is None and why_failed(0.0, 1.0, float("nan")) is not None
    x = np.array([1.0, 2.0, 4.0])
    assert slope_and_correlation(x, 0.5 * x + 3) == pytest.approx((0.5, 1.0)) and slope_and_correlation(
        x, np.zeros(3)
    ) == (0.0, None)
    assert slope_and_correlation(x[:1], x[:1]) == (None, None) and slope_and_correlation(np.full(3, 2.0), x) == (
        None,
        None,
    )
