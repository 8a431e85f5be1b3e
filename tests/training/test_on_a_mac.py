"""What a Mac would do, as far as the tests' own can tell (support/fake_mac.py)."""

import json
import math

import mlx.core as mx
import pytest
from tiny_runs import finish, losses, recipe

from mlxdpo.data import batch_shapes
from mlxdpo.machine.device import default_dtype, this_machine

pytestmark = pytest.mark.usefixtures("cache", "fake_mac")


def yes_or_no(folder):
    """Short questions whose answers are one word: rows of 8 tokens at most."""
    rows = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe(folder, train={"steps": 2})


def test_it_is_metal_in_bfloat16():
    assert this_machine().kind == "metal" and default_dtype() == mx.bfloat16


@pytest.mark.parametrize("checkpointing", [False, True])
def test_short_answers_train(tmp_path, fake_mac, checkpointing):
    config = yes_or_no(tmp_path)
    train = config.train.model_copy(update={"gradient_checkpointing": checkpointing})
    found = losses(finish(config.model_copy(update={"train": train})))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and len(found) == 2 and fake_mac["gradient"]


def test_short_answers_in_narrow_rows_would_stop(tmp_path, monkeypatch):
    """The crash that this is about: rows as narrow as they come."""
    monkeypatch.setattr(batch_shapes, "NARROWEST", 8)
    with pytest.raises(RuntimeError, match="do not produce a logsumexp"):
        finish(yes_or_no(tmp_path))
