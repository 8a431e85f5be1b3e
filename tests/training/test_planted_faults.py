"""The checks before the first step find what they are for, in bfloat16 as in float32."""

import json

import mlx.core as mx
import pytest
from slow_cases import rest_slow
from tiny_models import write_model
from tiny_runs import finish, recipe
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.forward import levels, packed, shared_prefix
from mlxdpo.forward.logprobs import float32_activations
from mlxdpo.model.policy import load_policy

pytestmark = pytest.mark.usefixtures("cache")


def windowless(monkeypatch):
    """Every layer sees everything, where tokens are packed."""
    monkeypatch.setattr(packed, "causal_mask", lambda queries, offset, window: "causal")


def shifted(monkeypatch):
    """Packed tokens one position too late."""
    layout = packed.PackedLayout.__init__

    def late(self, batch):
        layout(self, batch)
        self.offset = self.offset + (mx.arange(len(self.offset)) >= batch.prefix.size)

    monkeypatch.setattr(packed.PackedLayout, "__init__", late)


def deaf(monkeypatch):
    """The suffix does not look back: right values nowhere, in any level that shares a prefix."""
    monkeypatch.setattr(shared_prefix, "_spread", lambda one, spread: shared_prefix.WholeCache())


def constant(monkeypatch):
    """Right values, and a gradient that is lost on its way to the prefix."""
    to_rows = packed.PackedMask.attend

    def attend(self, queries, keys, values, scale, sinks):
        return to_rows(self, queries, mx.stop_gradient(keys), values, scale, sinks)

    monkeypatch.setattr(packed.PackedMask, "attend", attend)


def uncapped(monkeypatch):
    """Logits without their soft cap."""
    found = levels.find_head
    monkeypatch.setattr(levels, "find_head", lambda model: found(model)._replace(softcap=None))


def long_prompts(folder):
    """Rows with a shared prefix, over the tiny models' sliding window of 16."""
    rows = [{"prompt": f"{'red the user ' * 15}{i}:", "chosen": f" ok {i}", "rejected": " no"} for i in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


FAULTS = [
    ("gemma3_text", windowless, "rows are padded to one length: packed is "),
    ("llama", shifted, "rows are padded to one length: packed is "),
    ("qwen3", constant, "rows are padded to one length: the gradient of packed is "),
    ("gemma2", deaf, "each row is computed with its whole prompt: prefix is "),
    ("gemma2", uncapped, "full rows and full logits are computed: prefix is "),
]


@pytest.mark.parametrize("dtype", rest_slow(["float32", "bfloat16"], ["float32"]))
@pytest.mark.parametrize(("kind", "fault", "said"), FAULTS)
def test_another_fast_path_is_not_taken(tmp_path, monkeypatch, kind, fault, said, dtype):
    sections = {"model": {"dtype": dtype}, "train": {"steps": 1}, "data": {"max_length": 128}}
    if kind == "gemma2":  # mlx-lm ignores its window, so longer rows are refused
        write_model(tmp_path / kind, chatml_tokenizer(), kind, sliding_window=512)
    long_prompts(tmp_path)
    sound = finish(recipe(tmp_path, "sound", kind=kind, **sections))
    notes = [event.values["text"] for event in sound if event.kind == "note"]
    assert len(notes) == (kind == "gemma2")  # it writes its attention out, so it is not packed
    fault(monkeypatch)
    notes = [event.values["text"] for event in finish(recipe(tmp_path, kind=kind, **sections)) if event.kind == "note"]
    assert len(notes) == 1 and notes[0].startswith(f"{kind}: {said}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
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
