"""The Python front door: every promised name, light to open, and the example of its docstring."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from tiny_runs import recipe

import mlxdpo

PROMISED = ["Pairs", "Unpaired", "LOSSES", "load_policy", "attach_lora", "encode", "completion_logps"]
PROMISED += ["with_reference", "train", "Config", "load_config", "Run", "generate", "export"]
PROMISED += ["tune", "evaluate", "open_run", "objective"]


def test_every_promised_name_is_there_and_is_no_module():
    for name in PROMISED:
        assert name in mlxdpo.__all__ and not isinstance(getattr(mlxdpo, name), type(sys))


def test_no_module_of_the_package_has_a_name_of_the_door():
    """Importing a submodule sets it as an attribute of its package, over a function of the same name."""
    inside = {path.stem for path in Path(mlxdpo.__file__).parent.iterdir()}
    assert not inside & set(mlxdpo.__all__)


def test_importing_it_loads_nothing_heavy():
    code = (
        "import mlxdpo, sys; heavy = {'mlx.core', 'mlx_lm', 'transformers', 'numpy'} & set(sys.modules); print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_the_door_is_small_and_teaches_itself():
    assert len(mlxdpo.__all__) <= 24
    for name in ("tune", "evaluate", "generate", "train", "open_run"):
        assert f"mlxdpo.{name}(" in mlxdpo.__doc__
    assert "@mlxdpo.objective" in mlxdpo.__doc__


def test_the_inner_door_has_other_names_and_former_ones_are_found():
    from mlxdpo import inner

    assert set(inner.NAMES) & set(mlxdpo.__all__) == {"generate"}  # token ids there, texts here
    assert all(getattr(inner, name) is not None for name in inner.NAMES)
    assert mlxdpo.TrainedRun is inner.TrainedRun
    with pytest.raises(AttributeError, match=r"mlxdpo\.inner has no `x`"):
        _ = inner.x


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="mlxdpo has no `tran`; it has Config, LOSSES, Message"):
        _ = mlxdpo.tran


def test_a_run_and_a_loss_through_the_door(tmp_path, cache):
    events = list(mlxdpo.train(recipe(tmp_path, "run")))
    assert events[-1].kind == "done" and mlxdpo.Run.open(tmp_path / "run").config().out == str(tmp_path / "run")
    pair = mlxdpo.Pairs(*(mx.array([v]) for v in (-10.0, -12.0, -11.0, -11.0, 4.0, 5.0)))
    assert mlxdpo.LOSSES["sigmoid"](pair, beta=0.5).tolist() == pytest.approx([0.31326169])
