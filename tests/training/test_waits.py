"""How often Python waits for the GPU in a step: counted, because on a Mac it costs time that no CPU test shows."""

import fake_mac
import mlx.core as mx
import pytest
from tiny_runs import recipe

from mlxdpo.training.run import train


@pytest.fixture
def waits(monkeypatch):
    """Everything that makes Python wait for a result, as it happens."""
    found = []

    def noted(name, real):
        def wait(*given, **options):
            found.append(name)
            return real(*given, **options)

        return wait

    for owner, name in ((mx, "eval"), (mx, "synchronize"), (mx.array, "item"), (mx.array, "tolist")):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    return found


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_a_step_waits_once_for_each_batch_and_twice_more(batches, waits, tmp_path, cache, monkeypatch):
    """For the norm of the gradient, which decides whether the weights may move, and for the new weights."""
    fake_mac.install(monkeypatch.setattr)
    settings = {"gradient_accumulation": batches, "batch_size": 2, "save_every": 100, "steps": 3}
    events, counts = train(recipe(tmp_path, train=settings)), []
    for event in events:
        if event.kind == "step":
            counts.append(len(waits))
        waits.clear()
        if event.step == 2:
            break
    events.close()
    assert counts[1] == batches + 2
