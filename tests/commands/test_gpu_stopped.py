"""What macOS and Metal say, in one sentence each; and a training that macOS stopped goes on by itself, once."""

import os
import subprocess
import sys

import pytest
from launch import WATCHDOG
from stages import LAUNCH, Place, environment
from tiny_runs import adapter_bytes, assert_same, finish, recipe

from mlxdpo import cli
from mlxdpo.commands import train as command
from mlxdpo.config import ModelConfig, dump_config
from mlxdpo.machine.errors import METAL, STOPPED, error_message, gpu_was_stopped
from mlxdpo.model import policy
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint, loop
from mlxdpo.types import UserError
from mlxdpo.ui.widgets import show_errors

FAILED = "[METAL] Command buffer execution failed: "
BUFFER = "kIOGPUCommandBufferCallbackError"
SAID = {
    WATCHDOG: "macOS stopped the work on the GPU",
    f"{FAILED}Caused GPU Timeout Error (00000002:{BUFFER}Timeout).": "macOS stopped the work on the GPU",
    f"{FAILED}Caused GPU Hang Error (00000003:{BUFFER}Hang).": "macOS stopped the work on the GPU",
    f"{FAILED}Ignored (for causing prior/excessive GPU errors) (00000004:{BUFFER}SubmissionsIgnored).": "macOS stopped",
    f"{FAILED}Discarded (victim of GPU error/recovery) (00000005:{BUFFER}InnocentVictim).": "macOS stopped the work",
    f"{FAILED}Insufficient Memory (00000008:{BUFFER}OutOfMemory).": "not enough memory",
    "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size of 9 bytes.":
        "not enough memory",
    "[metal::malloc] Resource limit (499000) exceeded.": "not enough memory",
    "[scaled_dot_product_attention] the vector kernels do not produce a logsumexp; the VJP path requires the "
    "full-attention kernel.": "a row of at most 8 tokens met Metal's attention",
    "[ScaledDotProductAttentionVJP] NYI: attention sinks": "Metal's attention has no gradient for a model with",
    "[metal::load_device] No Metal device available. This typically occurs in headless, sandboxed, or virtualized "
    "macOS sessions where the GPU is not accessible.": "this session of macOS has no GPU",
    "Failed to load the default metallib. ": "MLX cannot load its kernels for this Mac",
}  # fmt: skip
"""What the Metal library of MLX 0.32.4 says, word for word, and how our sentence begins."""
NEXT_STEP = ("lower train.batch_size", "MLX_SDPA_VJP_FALLBACK=1", "mlxdpo doctor", "pip install --force-reinstall")


@pytest.mark.parametrize("said", SAID, ids=[text[:60] for text in SAID])
def test_every_error_of_metal_is_one_sentence_with_a_next_step(said):
    sentence = error_message(RuntimeError(said))
    assert sentence is not None and sentence.startswith(SAID[said]) and "\n" not in sentence
    assert (
        " ".join(said.split()).rstrip(".") in sentence and ".)" not in sentence
    )  # what was said stays, to be searched for
    assert any(step in sentence for step in NEXT_STEP)


def test_no_sentence_is_without_its_error():
    assert all(any(part in said for said in SAID) for part in (*METAL, *STOPPED))


def test_only_what_macos_stopped_is_tried_again():
    stopped = [said for said in SAID if gpu_was_stopped(RuntimeError(said))]
    assert len(stopped) == 5 and all(BUFFER in said and "OutOfMemory" not in said for said in stopped)
    assert not gpu_was_stopped(ValueError(WATCHDOG)) and not gpu_was_stopped(RuntimeError("a bug"))


@pytest.fixture
def stopped(monkeypatch):
    """From now on macOS stops the work on the GPU in step 3, counted from 0; gives what became of the process."""
    plain, became = loop.train_step, []

    def train_step(state, fns, batches, step, *more):
        if step == 3:
            raise RuntimeError(WATCHDOG)
        return plain(state, fns, batches, step, *more)

    class Gone(BaseException):
        """The process is another one now."""

    def become(program, words, environment):
        became.append((program, words, environment))
        raise Gone

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(os, "execve", become)
    monkeypatch.delenv(command.WENT_ON, raising=False)
    return became, Gone


def write_recipe(folder, **sections):
    config = recipe(folder, **sections)
    (folder / "recipe.yaml").write_text(dump_config(config))
    return config


def test_a_stopped_training_becomes_a_process_that_goes_on_and_says_so(tmp_path, cache, stopped, monkeypatch, capsys):
    became, gone = stopped
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")  # the user's own choice stays
    config = write_recipe(tmp_path, train={"sample_every": 0})
    with pytest.raises(gone):
        cli.run(["train", str(tmp_path / "recipe.yaml")])
    ((program, words, environment),) = became
    assert program == words[0] == sys.executable
    assert words[1:] == ["-P", "-m", "mlxdpo.cli", "train", "--resume", config.out]
    assert environment[command.WENT_ON] == "1" and environment["MLX_MAX_OPS_PER_BUFFER"] == "7"
    assert environment["AGX_RELAX_CDM_CTXSTORE_TIMEOUT"] == "1" and environment["PATH"] == os.environ["PATH"]
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("macOS stopped the work on the GPU") and said[-1].endswith("in a new process, once")
    # What the poisoned process held in memory was not saved: the checkpoint is the one of step 2.
    run = Run.open(config.out)
    assert [path.name for path in checkpoint.steps(run.checkpoints)] == ["step-000002"] and not run.held()


def test_the_second_time_it_stops_with_the_command_that_goes_on(tmp_path, cache, stopped, monkeypatch, capsys):
    monkeypatch.setenv(command.WENT_ON, "1")
    config = write_recipe(tmp_path)
    assert cli.run(["train", str(tmp_path / "recipe.yaml")]) == 1
    assert stopped[0] == []
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: macOS stopped the work on the GPU") and "already resumed automatically once" in line
    assert line.endswith(f"; resume from the last checkpoint with: mlxdpo train --resume {config.out}")


def test_memory_stops_it_at_once_with_the_same_command(tmp_path, cache, stopped, monkeypatch, capsys):
    def full(*given):
        raise RuntimeError(f"{FAILED}Insufficient Memory (00000008:{BUFFER}OutOfMemory).")

    monkeypatch.setattr(loop, "train_step", full)
    config = write_recipe(tmp_path)
    assert cli.run(["train", str(tmp_path / "recipe.yaml")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: not enough memory ([METAL]") and stopped[0] == []
    assert line.endswith(f"resume from the last checkpoint with: mlxdpo train --resume {config.out}")


def test_where_there_is_no_run_yet_there_is_nothing_to_go_on_with(tmp_path, cache, stopped, monkeypatch, capsys):
    def load(config):
        raise RuntimeError(WATCHDOG)

    write_recipe(tmp_path)
    monkeypatch.setattr("mlxdpo.training.run.load_policy", load)
    assert cli.run(["train", str(tmp_path / "recipe.yaml")]) == 1
    assert stopped[0] == [] and capsys.readouterr().err.splitlines()[-1].endswith("; start again")


def test_a_model_that_does_not_fit_is_not_called_broken(tiny_model_folder, monkeypatch):
    """Reading weights turns whatever goes wrong into a sentence about the files, but not this."""

    def refuse(model, dtype):
        raise RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")

    monkeypatch.setattr(policy, "cast", refuse)
    monkeypatch.setattr(policy.mx, "eval", lambda *arrays: refuse(None, None))
    with pytest.raises(RuntimeError, match="Resource limit"), policy.strangers_files("M"):
        policy.mx.eval()
    with pytest.raises(RuntimeError, match="Resource limit"):
        policy.load_policy(ModelConfig(path=str(tiny_model_folder)))


@pytest.mark.slow
def test_the_app_shows_the_sentence():
    gradio = pytest.importorskip("gradio")
    with pytest.raises(gradio.Error, match="macOS stopped the work on the GPU"), show_errors():
        raise RuntimeError(WATCHDOG)
    with pytest.raises(RuntimeError, match="a bug"), show_errors():
        raise RuntimeError("a bug")


@pytest.mark.processes
def test_a_training_that_macos_stopped_ends_as_one_that_it_did_not(tmp_path, cache):
    """Real processes: the number of the process stays, the run is the straight one's to the bit, the status is 0."""
    finish(recipe(tmp_path, "straight", train={"sample_every": 0}))
    config = write_recipe(tmp_path, train={"sample_every": 0})
    place = Place(tmp_path, tmp_path)
    process = subprocess.Popen(
        [sys.executable, str(LAUNCH), "stopped", "3", "train", str(tmp_path / "recipe.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(place),
    )  # fmt: skip
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert said.count("resuming from the last checkpoint in a new process, once") == 1
    assert "resuming from step 2/5" in said and "step 5/5" in said and "Traceback" not in said
    assert_same(config.out, tmp_path / "straight")
    assert adapter_bytes(config.out) == adapter_bytes(tmp_path / "straight")


@pytest.fixture
def on_macos(monkeypatch):
    """A Mac's `caffeinate`, written down instead of started."""
    started = []
    monkeypatch.setattr(command.sys, "platform", "darwin")
    monkeypatch.setattr(command.subprocess, "Popen", lambda words, **how: started.append(words))
    return started


def test_a_mac_is_kept_awake_as_long_as_the_process_lives(on_macos):
    command.stay_awake()
    assert on_macos == [["/usr/bin/caffeinate", "-i", "-s", "-w", str(os.getpid())]]


def test_keep_awake_is_an_option_of_train(on_macos, monkeypatch, tmp_path):
    """Asked for before anything is read; without it nothing is started."""
    missing = str(tmp_path / "none.yaml")
    assert cli.run(["train", missing]) == 2 and on_macos == []
    assert cli.run(["train", missing, "--keep-awake"]) == 2 and len(on_macos) == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="there it works")
def test_elsewhere_keeping_awake_is_refused(capsys):
    with pytest.raises(UserError, match="systemd-inhibit"):
        command.stay_awake()
    assert cli.run(["train", "--keep-awake", "--model", "smollm2", "--data", "x.jsonl"]) == 2
    assert capsys.readouterr().err == (
        "error: --keep-awake is for macOS, where it runs caffeinate; on Linux put this before the command: "
        "systemd-inhibit --what=sleep\n"
    )
