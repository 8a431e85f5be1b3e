"""Every command in the README runs. A tiny stand-in takes the place of the Hub's model; nothing is fetched."""

import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.cli import run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines() if line
]
# What makes a command quick where its answers do not matter.
SHORT = {
    "bench": "--prompt 8 --completion 4 --repeats 1",
    **dict.fromkeys(("generate", "eval", "frontier"), "--max-tokens 8"),
}
FRUIT = ["An apple.", "A pear.", "A plum.", "A fig.", "A lime.", "A date.", "A kiwi.", "A peach."]


@pytest.fixture
def workplace(tmp_path, monkeypatch, cache):
    """A folder with pairs, and a Hub cache that holds the README's model as a tiny stand-in."""
    hub = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B-Instruct"
    write_model(hub / "snapshots" / "0", chatml_tokenizer())
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rows = [f'{{"prompt": "Name a fruit, {i}.", "chosen": "{f}", "rejected": "Trains."}}' for i, f in enumerate(FRUIT)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_mlxdpo_command_runs_in_order(workplace, capsys):
    commands = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("mlxdpo ")]
    assert len(commands) >= 10
    for words in commands:
        # A few steps may be worse, and a test machine may have a problem to report.
        expected = {0, 1} if words[0] in ("doctor", "compare") else {0}
        assert run([*words, *SHORT.get(words[0], "").split()]) in expected, (words, capsys.readouterr())
    assert (workplace / "runs/mine/adapter/adapters.safetensors").exists()
    assert (workplace / "exported/mlx/adapters.safetensors").exists()


def test_every_make_target_exists():
    targets = [line for line in COMMANDS if line.startswith("make ")]
    assert {"make demo", "make test"} <= set(targets)
    for line in targets:
        subprocess.run([*shlex.split(line), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_no_command_is_left_out():
    assert [line for line in COMMANDS if not line.startswith(("mlxdpo ", "make ")) and line != "pip install ."] == []


@pytest.mark.processes
def test_pip_install_gives_a_working_command(tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in tracked.decode().rstrip("\0").split("\0"):  # an installed copy, not this checkout
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", "."], cwd=source, check=True)
    mlxdpo = tmp_path / "env" / "bin" / "mlxdpo"
    done = subprocess.run([mlxdpo, "objectives"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "2305.18290" in done.stdout
    where = "import mlxdpo_eval, mlxdpo.demo; from importlib.resources import files; print(files('mlxdpo.demo'))"
    where += "; assert files('mlxdpo.demo').joinpath('pairs.jsonl').is_file()"
    subprocess.run([python, "-c", where], cwd=tmp_path, check=True)


def test_help_is_instant():
    code = "import sys; sys.argv = ['mlxdpo', '--help']\nfrom mlxdpo.cli import run; run(['--help'])\n"
    code += "import mlxdpo.commands.plan, mlxdpo.commands.terminal, mlxdpo.commands.train\n"  # and those of most pages
    code += "heavy = {'mlx.core', 'mlx_lm', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
