"""`mlxdpo export --push`, then `mlxdpo pull`: the commands, the bytes, and what was said."""

import pytest
from fake_hub import TOKEN
from tiny_runs import finish, recipe

from mlxdpo import Run
from mlxdpo.cli import run as cli
from mlxdpo.exporters.record import outgoing

NAME = "jane/tiny-dpo"


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run with held-out pairs, trained once."""
    folder = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        config = recipe(folder, data={"eval_fraction": 0.3})
        finish(config)
    return Run.open(config.out)


def export(run, to, out, *words):
    return cli(["export", str(run.path), "--to", to, "--out", str(out), *words])


def test_export_push_pull(hub, run, tmp_path, capfd):
    out, back = tmp_path / "out", tmp_path / "back"
    assert export(run, "mlx,peft", out, "--push", NAME, "--tag", "v1") == 0
    repo = hub.repos[NAME]
    assert repo.private and repo.tags["v1"] == repo.refs["main"]
    going, left = outgoing(out)
    assert left == [] and {f.name for f in going} == set(repo.files()) - {".gitattributes"}
    assert all((out / f.name).read_bytes() == repo.files()[f.name] for f in going)
    assert f"mlxdpo pull {NAME}" in (out / "README.md").read_text()
    assert cli(["pull", NAME, "--revision", "v1", "--out", str(back), "--base", run.config().model.path]) == 0
    name = "adapter/adapters.safetensors"
    assert (back / name).read_bytes() == (run.path / name).read_bytes()
    captured = capfd.readouterr()
    assert "pushed" in captured.out and TOKEN not in captured.out + captured.err


def test_a_dry_run_asks_the_hub_nothing(hub, run, tmp_path, capfd):
    assert export(run, "mlx", tmp_path / "out", "--push", NAME, "--dry-run") == 0
    said = capfd.readouterr().out
    assert hub.requests == [] and "dry run: " in said
    for file in outgoing(tmp_path / "out")[0]:
        assert f"{file.size:>14,}  {file.name}" in said


def test_a_pulled_peft_adapter_is_the_run(hub, run, tmp_path):
    """Only PEFT's files on the Hub, as if somebody else had made them: written anew, the same function."""
    import mlx.core as mx

    assert export(run, "peft", tmp_path / "out", "--push", NAME) == 0
    repo = hub.repos[NAME]
    kept = {n: c for n, c in repo.files().items() if not n.startswith("run/")}
    repo.refs["main"] = repo.add(kept, "without the run")
    assert cli(["pull", NAME, "--out", str(tmp_path / "back"), "--base", run.config().model.path]) == 0
    then, now = (mx.load(str(p / "adapter" / "adapters.safetensors")) for p in (run.path, tmp_path / "back"))
    assert then.keys() == now.keys() and all(mx.allclose(then[k], now[k], atol=1e-7) for k in then)
