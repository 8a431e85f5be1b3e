"""The checks before the first step find what they are for, in bfloat16 as in float32."""

import json

import mlx.core as mx
import pytest
from tiny_runs import finish, recipe

from mlxdpo.forward import architectures, logprobs, shared_prefix
from mlxdpo.forward.logprobs import float32_activations
from mlxdpo.model.policy import load_policy

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])]


def unscaled(monkeypatch):
    """Embeddings without their factor."""
    monkeypatch.setitem(architectures.FAMILIES, "gemma3_text", architectures.STANDARD)


def windowless(monkeypatch):
    """Every layer sees everything."""
    monkeypatch.setattr(architectures, "causal_mask", lambda queries, offset, window: "causal")


def shifted(monkeypatch):
    """The suffix one position too late."""

    class Late(shared_prefix.Prefixed):
        def __init__(self, *args):
            super().__init__(*args)
            self.offset += 1

    monkeypatch.setattr(shared_prefix, "Prefixed", Late)
    monkeypatch.setattr(logprobs, "can_pack", lambda parts: False)


def unnormed(monkeypatch):
    """States straight into the head."""
    known = architectures.known_parts
    monkeypatch.setattr(logprobs, "known_parts", lambda model: known(model)._replace(norm=lambda h: h))


def uncapped(monkeypatch):
    """Logits without their soft cap."""
    family = architectures.FAMILIES["gemma2"]._replace(softcap=lambda args: None)
    monkeypatch.setitem(architectures.FAMILIES, "gemma2", family)


def long_prompts(folder):
    """Rows with a shared prefix, over the tiny models' sliding window of 16."""
    rows = [{"prompt": f"{'red the user ' * 15}{i}:", "chosen": f" ok {i}", "rejected": " no"} for i in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("gemma3_text", unscaled),
        ("gemma3_text", windowless),
        ("llama", shifted),
        ("qwen3", unnormed),
        ("gemma2", uncapped),
    ],
)
def test_another_fast_path_is_not_taken(tmp_path, monkeypatch, kind, fault, dtype):
    sections = {"model": {"dtype": dtype}, "train": {"steps": 1}, "data": {"max_length": 128}}
    if kind == "gemma2":  # no longer rows: mlx-lm ignores its window
        sections["data"] = {"max_length": 16}
    else:
        long_prompts(tmp_path)
    sound = finish(recipe(tmp_path, "sound", kind=kind, **sections))
    assert not [event for event in sound if event.kind == "note"]
    fault(monkeypatch)
    notes = [event.values["text"] for event in finish(recipe(tmp_path, kind=kind, **sections)) if event.kind == "note"]
    assert len(notes) == 1 and f"{kind}: the fast way is " in notes[0]


def test_activations_in_float32_are_the_model_in_float32(tmp_path, dtype):
    config = recipe(tmp_path)
    low, high = (load_policy(config.model.model_copy(update={"dtype": d})).model for d in (dtype, "float32"))
    high.update(low.parameters())
    high.set_dtype(mx.float32)
    tokens = mx.random.randint(0, 300, (2, 20))
    before = low(tokens)
    with float32_activations(low):
        got = low(tokens)
    assert got.dtype == mx.float32 and mx.allclose(got, high(tokens), atol=1e-5).item()
    assert mx.array_equal(low(tokens), before).item()
