"""What MLX may take on a Mac, counted at its own functions: whoever loads a model sets it."""

import mlx.core as mx
import pytest
from tiny_runs import finish, recipe

from mlxdpo.config import ModelConfig
from mlxdpo.inference.generate import generate
from mlxdpo.machine import device, memory_guard
from mlxdpo.machine.device import Machine, memory_limits
from mlxdpo.machine.memory_guard import MemoryGuard
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run

GIB = 1 << 30
SETTERS = ("set_wired_limit", "set_memory_limit", "set_cache_limit")


@pytest.fixture
def calls(monkeypatch):
    """Every call of a setter of MLX's limits, as (name, bytes)."""
    found = []
    for name in SETTERS:
        monkeypatch.setattr(mx, name, lambda limit, name=name: found.append((name, limit)) or 0)
    return found


@pytest.fixture
def mac(monkeypatch):
    """A Mac of 16 GB: Metal recommends 10.7 of them."""
    monkeypatch.setattr(device, "this_machine", lambda: Machine("metal", "Apple M4", 10 * GIB, "Darwin 25.2.0 arm64"))


WANTED = [("set_wired_limit", 9 * GIB), ("set_memory_limit", 10 * GIB), ("set_cache_limit", 10 * GIB // 4)]


def test_a_policy_is_loaded_under_all_three_limits(calls, mac, tiny_model_folder):
    load_policy(ModelConfig(path=str(tiny_model_folder), dtype="float32"))
    assert calls == WANTED


def test_limits_come_before_the_first_byte_of_a_model(calls, mac, tmp_path):
    """Whether or not it can be loaded."""
    with pytest.raises(Exception, match=r"no model\*.safetensors"):
        load_policy(ModelConfig(path=str(tmp_path)))
    assert calls == WANTED


def test_a_generator_wires_everything_and_is_set_back(calls, mac, tiny_model_folder):
    policy = load_policy(ModelConfig(path=str(tiny_model_folder), dtype="float32"))
    calls.clear()
    generate(policy.model, [[1, 2]], max_tokens=1, eos_ids=())
    assert calls == WANTED


def test_elsewhere_nothing_is_limited(calls, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(device, "this_machine", lambda: Machine("cpu", "a CPU", 32 * GIB, "Linux"))
    load_policy(ModelConfig(path=str(tiny_model_folder)))
    assert device.limit_memory() is None and calls == []


@pytest.mark.parametrize("recommended", [5 * GIB, 10 * GIB, 96 * GIB])
def test_what_is_kept_for_reuse_leaves_room_for_what_is_used(recommended):
    limits = memory_limits(recommended)
    assert limits.cached < limits.wired < limits.allocated == recommended
    assert limits.cached * 4 <= recommended


def test_every_step_says_what_is_used_and_what_is_kept(tmp_path, cache):
    config = recipe(tmp_path, train={"steps": 2})
    steps = [event.values for event in finish(config) if event.kind == "step"]
    lines = [line for line in Run.open(config.out).metrics() if "loss" in line]
    names = ("peak_memory_gb", "active_memory_gb", "cache_memory_gb")
    assert [[line[name] for name in names] for line in lines] == [[step[name] for name in names] for step in steps]
    assert all(0 < step["active_memory_gb"] <= step["peak_memory_gb"] for step in steps)
    assert all(step["cache_memory_gb"] >= 0 for step in steps)


def test_used_and_kept_are_mlxs_own_counts():
    mx.clear_cache()
    before = device.memory_use()
    block = mx.zeros((1 << 22,), dtype=mx.float32) + 1
    mx.eval(block)
    used = device.memory_use()
    assert used["active_memory_gb"] - before["active_memory_gb"] == pytest.approx(4 * (1 << 22) / 1e9, rel=0.01)
    del block
    assert device.memory_use()["active_memory_gb"] == pytest.approx(before["active_memory_gb"], abs=1e-4)


def test_macos_is_not_asked_for_room(monkeypatch):
    """It grants address space whatever there is: the answer would say nothing."""
    asked = []
    monkeypatch.setattr(memory_guard, "has_room", lambda size: asked.append(size))
    guard = MemoryGuard()
    assert guard.short() and len(asked) == 1
    monkeypatch.setattr(memory_guard.sys, "platform", "darwin")
    assert not guard.short() and len(asked) == 1
