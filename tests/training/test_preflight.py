"""Step 0 has a known value, whatever is trained; when it has not, the run stops and names the cause."""

import importlib
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_runs
from tiny_models import tiny_model, write_model
from tiny_runs import finish, recipe
from tiny_tokenizers import chatml_tokenizer, llama3_tokenizer

from mlxdpo.config import ModelConfig
from mlxdpo.data.batching import collate
from mlxdpo.estimate.forecast import CannotPlan, shape_of
from mlxdpo.forward import choose_forward, levels, patch_mlx_lm
from mlxdpo.forward.find_head import NoFastWay
from mlxdpo.forward.logprobs import plain_forward
from mlxdpo.io.checksum import save_checksummed
from mlxdpo.losses import LOSSES, resolve
from mlxdpo.model import adapters
from mlxdpo.model.skeleton import Skeleton
from mlxdpo.runs import Run
from mlxdpo.training import preflight
from mlxdpo.types import UserError

story = importlib.import_module("mlxdpo.training.run")

pytestmark = pytest.mark.usefixtures("cache")


def first_step(config):
    return next(event.values for event in finish(config) if event.kind == "step")


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_step_zero_is_ln_2_with_no_margin_and_even_accuracy(tmp_path, kind, method):
    values = first_step(recipe(tmp_path, kind=kind, lora={"method": method}, train={"steps": 1}))
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert values["rewards/accuracies"] == pytest.approx(0.5, abs=0.5 if method == "dora" else 0)
    assert abs(values["rewards/margins"]) < (1e-6 if method == "dora" else 1e-12)


@pytest.mark.parametrize("name", sorted(name for name, o in LOSSES.items() if o.paired))
def test_step_zero_is_each_objectives_known_value(tmp_path, name):
    beta = {"beta": 0.25} if "beta" in LOSSES[name].knobs else {}
    config = recipe(tmp_path, loss={"name": name} | beta, train={"steps": 1})
    values, known = first_step(config), resolve(config.loss).start()
    assert known is None or values["loss"] == pytest.approx(known, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_shorter_than_its_data_starts(tmp_path, steps):
    events = finish(recipe(tmp_path, train={"steps": steps}))
    assert [event.kind for event in events][-1] == "done" and len(tiny_runs.losses(events)) == steps


def broken(monkeypatch, damage):
    """Let `damage` loose on the job before its first step is checked."""
    check = preflight.check_start
    monkeypatch.setattr(preflight, "check_start", lambda job: (damage(job), check(job)))


def refusal(config):
    with pytest.raises(UserError) as error:
        finish(config)
    assert not (Run.open(config.out).path / "adapter").exists()
    return str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_fresh_adapter_that_is_not_zero_is_named(tmp_path, monkeypatch, method, dtype):
    def damage(job):
        job.model.layers[0].self_attn.q_proj.lora_b = mx.ones_like(job.model.layers[0].self_attn.q_proj.lora_b)

    broken(monkeypatch, damage)
    sentence = refusal(recipe(tmp_path, lora={"method": method}, model={"dtype": dtype}))
    assert sentence.startswith("before the first step the loss is ") and "instead of 0.693147" in sentence
    assert sentence.endswith("nats from its reference: the fresh adapter is not zero")


METHODS = [("full", "float32"), ("dora", "float32"), *(("lora", d) for d in ("float32", "bfloat16", "float16"))]


@pytest.mark.parametrize(("method", "dtype"), METHODS)
def test_a_tampered_reference_table_is_named(tmp_path, cache, method, dtype):
    config = recipe(tmp_path, lora={"method": method}, train={"steps": 1}, model={"dtype": dtype})
    finish(config)
    (table,) = (cache / "reference").glob("*.safetensors")
    arrays = mx.load(str(table))
    save_checksummed(table, {"rows": arrays["rows"], "logps": arrays["logps"] + 0.5})
    sentence = refusal(recipe(tmp_path, "second", lora={"method": method}, model={"dtype": dtype}))
    assert "a log-prob is 0.5000 nats from its reference: the reference was scored with other weights" in sentence
    assert sentence.endswith("score it again with an empty cache")


@pytest.mark.parametrize(("method", "dtype"), METHODS)
def test_weights_that_moved_after_the_reference_was_scored_are_named(tmp_path, monkeypatch, method, dtype):
    def damage(job):
        job.model.model.norm.weight = job.model.model.norm.weight * 2

    broken(monkeypatch, damage)
    sentence = refusal(recipe(tmp_path, lora={"method": method}, model={"dtype": dtype}))
    assert "the reference was scored with other weights" in sentence


def test_a_reference_that_is_not_finite_is_named(tmp_path, monkeypatch):
    broken(monkeypatch, lambda job: job.train.ref.__setitem__(slice(None), np.inf))
    sentence = refusal(recipe(tmp_path))
    assert "a log-prob is inf nats" in sentence and "the reference's log-probs are not finite numbers" in sentence


def test_another_reference_model_trains_and_skips_the_check(tmp_path, monkeypatch):
    write_model(tmp_path / "other", chatml_tokenizer(), seed=7)
    monkeypatch.setattr(preflight, "check_start", lambda job: pytest.fail("checked against another model's log-probs"))
    seen = {}
    monkeypatch.setattr(story, "run_loop", lambda job, *rest: seen.update(job=job) or iter(()))
    monkeypatch.setattr(story, "_keep_adapter", lambda *rest: None)
    config = recipe(tmp_path, reference={"model": str(tmp_path / "other")})
    finish(config)
    job, other = seen["job"], story.load_policy(config.model.model_copy(update={"path": str(tmp_path / "other")}))
    batch = collate(job.train.examples, (0, 5), 2, job.train.ref)
    expected = preflight.score_pairs(other.model, batch)
    for got, want in ((expected.ref_chosen, expected.chosen), (expected.ref_rejected, expected.rejected)):
        assert got.tolist() == pytest.approx(want.tolist(), abs=1e-3)
    assert preflight._reference_gaps(preflight.score_pairs(job.model, batch))[0].max() > 1


def test_a_reference_that_reads_text_differently_is_refused(tmp_path):
    write_model(tmp_path / "other", llama3_tokenizer())
    config = recipe(tmp_path, reference={"model": str(tmp_path / "other")})
    with pytest.raises(UserError, match=r"other has another tokenizer or template than .*llama"):
        finish(config)


def test_a_reference_adapter_without_its_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"reference.adapter X needs reference.model as well; .* use model.adapter"):
        finish(recipe(tmp_path, reference={"adapter": "X"}))


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"rank": 8}, "lora.rank is 8, but the adapter {} has 4; drop lora.rank"),
        ({"scale": 3.0}, "lora.scale is 3.0, but the adapter {} has 2.0; drop lora.scale"),
        ({"method": "dora"}, "lora.method is dora, but the adapter {} has lora; drop lora.method"),
        ({"layers": 1}, "lora.layers is 1, but the adapter {} has -1; drop lora.layers"),
        ({"keys": ["mlp.up_proj"]}, "lora.keys is ['mlp.up_proj'], but the adapter {} has None; drop lora.keys"),
    ],
)
def test_settings_that_contradict_the_adapter_are_refused(tmp_path, lora, sentence):
    finish(recipe(tmp_path, "first", train={"steps": 1}))
    adapter = str(tmp_path / "first" / "adapter")
    with pytest.raises(UserError) as error:
        finish(recipe(tmp_path, model={"adapter": adapter}, lora=lora))
    assert str(error.value) == sentence.format(adapter)


def test_the_same_keys_in_another_order_do_not_contradict_the_adapter(tmp_path):
    keys = ["self_attn.q_proj", "mlp.up_proj", "self_attn.v_proj"]
    finish(recipe(tmp_path, "first", train={"steps": 1}, lora={"keys": keys}))
    finish(
        recipe(
            tmp_path, train={"steps": 1}, model={"adapter": str(tmp_path / "first" / "adapter")}, lora={"keys": keys}
        )
    )


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_an_adapter_brings_its_settings_and_is_the_reference(tmp_path, method):
    finish(recipe(tmp_path, "first", lora={"method": method, "layers": 2}))
    adapter = str(tmp_path / "first" / "adapter")
    events = finish(recipe(tmp_path, model={"adapter": adapter}, lora={"layers": 2, "method": method}))
    values = next(event.values for event in events if event.kind == "step")
    assert values["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (values["rewards/margins"], values["rewards/accuracies"]) == (0.0, 0.5)
    settings = [adapters.read_settings(tmp_path / run / "adapter") for run in ("first", "run")]
    assert settings[0] == settings[1]


def test_nothing_is_written_for_settings_the_model_cannot_take(tmp_path):
    for lora, sentence in (
        ({"keys": ["self_attn.nothing"]}, "lora.keys: the model has no layer `self_attn.nothing`"),
        ({"layers": 9}, "lora.layers is 9, but the model has 3 blocks"),
    ):
        with pytest.raises(UserError, match=sentence):
            finish(recipe(tmp_path, lora=lora))
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"lora.method full needs model.dtype float32"):
        finish(recipe(tmp_path, model={"dtype": "bfloat16"}, lora={"method": "full"}))
    assert not (tmp_path / "run").exists()


def test_knobs_that_need_held_out_pairs_are_refused_without_them(tmp_path):
    for train in ({"keep_model": "best"}, {"patience": 2}):
        with pytest.raises(UserError, match=rf"train.{next(iter(train))} .* needs held-out pairs"):
            finish(recipe(tmp_path, train=train))
        assert not (tmp_path / "run").exists()


def test_a_model_configuration_that_transformers_refuses_is_one_sentence(tmp_path):
    config = recipe(tmp_path, kind="gemma3_text")
    file = tmp_path / "gemma3_text" / "config.json"
    file.write_text(file.read_text().replace('"query_pre_attn_scalar": 8,', '"query_pre_attn_scalar": 8.0,'))
    with pytest.raises(UserError, match=r"gemma3_text: its tokenizer cannot be loaded \(.*query_pre_attn_scalar"):
        finish(config)
    assert not (tmp_path / "run").exists()


def headless(model):
    raise NoFastWay("nothing is found")


def test_a_model_without_a_fast_way_takes_the_plain_way_to_the_same_run(tmp_path, monkeypatch):
    steps = lambda events: [e.values["loss"] for e in events if e.kind == "step"]  # noqa: E731
    wanted = steps(finish(recipe(tmp_path, "fast")))
    monkeypatch.setattr(levels, "find_head", headless)
    for checkpoint in (False, True):
        events = finish(recipe(tmp_path, f"plain {checkpoint}", train={"gradient_checkpointing": checkpoint}))
        notes = [e.values["text"] for e in events if e.kind == "note"]
        assert notes == ["llama: full rows and full logits are computed: nothing is found"]
        assert steps(events) == pytest.approx(wanted, rel=1e-4)


def test_a_fast_way_that_computes_something_else_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(choose_forward, "fast_forward", lambda *a, **k: lambda m, batch: plain_forward(m, batch) + 0.5)
    events = finish(recipe(tmp_path))
    notes = [e.values["text"] for e in events if e.kind == "note"]
    assert notes == ["llama: full rows and full logits are computed: packed is 0.5 nats off here"]
    assert next(e.values["loss"] for e in events if e.kind == "step") == pytest.approx(np.log(2), abs=1e-6)


def test_checkpointing_that_loses_a_gradient_is_refused(tmp_path, monkeypatch):
    checkpoint = mx.checkpoint
    cut = lambda given: mx.stop_gradient(given) if isinstance(given, mx.array) else given  # noqa: E731
    monkeypatch.setattr(mx, "checkpoint", lambda run: checkpoint(lambda *given: run(*map(cut, given))))
    with pytest.raises(UserError, match=r"with train.gradient_checkpointing the gradient of packed is \d+% off here"):
        finish(recipe(tmp_path, train={"gradient_checkpointing": True}))
    assert not [e for e in finish(recipe(tmp_path)) if e.kind == "note"]


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_checkpointing_changes_no_step(tmp_path, method):
    runs = [
        finish(recipe(tmp_path, str(on), lora={"method": method}, train={"gradient_checkpointing": on}))
        for on in (False, True)
    ]
    losses = [[e.values["loss"] for e in events if e.kind == "step"] for events in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_gemma2_rows_beyond_its_window_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"a row has \d+ tokens, but beyond 16 .*; set data.max_length 16$"):
        finish(recipe(tmp_path, kind="gemma2"))
    assert not (tmp_path / "run").exists()


def test_long_rows_train_through_the_light_attention_to_the_same_losses(tmp_path, monkeypatch):
    wanted = [e.values["loss"] for e in finish(recipe(tmp_path, "own")) if e.kind == "step"]
    monkeypatch.setattr(patch_mlx_lm, "UNFUSED_FROM", 8)
    monkeypatch.setattr(patch_mlx_lm, "SHORT", 8)
    calls, chunked = [], patch_mlx_lm.chunked_attention
    monkeypatch.setattr(patch_mlx_lm, "chunked_attention", lambda *a, **k: calls.append(1) or chunked(*a, **k))
    losses = [e.values["loss"] for e in finish(recipe(tmp_path, "light")) if e.kind == "step"]
    assert calls and losses == pytest.approx(wanted, rel=1e-5)


def test_an_objective_that_is_computed_wrongly_stops_the_run(tmp_path, monkeypatch):
    """Policy and reference agree, and the loss still has not its known value: no reference is to blame."""
    monkeypatch.setattr("mlxdpo.losses.loss.Loss.start", lambda self: 0.5)
    sentence = refusal(recipe(tmp_path))
    assert sentence.startswith("where policy and reference agree the loss is 0.693147 instead of 0.500000: sigmoid is")


@pytest.mark.parametrize(
    "loss",
    [
        {"ld_alpha": 0.3},
        {"f_divergence": "alpha_divergence", "f_alpha": 0.7},
        {"name": "sigmoid+bco_pair", "weights": [0.8, 0.2], "ld_alpha": 0.5},
        {"wpo": True},
        {"name": "sigmoid+sft"},
    ],
    ids=str,
)
def test_step_zero_under_modifiers_and_sums(tmp_path, loss):
    """A modifier that moves no log-ratio from zero moves no start value; where none is known the gap is still asked."""
    config = recipe(tmp_path, loss=loss, train={"steps": 1})
    values, known = first_step(config), resolve(config.loss).start()
    assert (known is None) == ("wpo" in loss or "sft" in loss.get("name", ""))
    assert known is None or values["loss"] == pytest.approx(known, rel=1e-5)
    assert abs(values["rewards/margins"]) < 1e-12


def test_a_tampered_reference_of_beginnings_is_noticed(tmp_path, monkeypatch):
    def damage(job):
        job.train.ref[:, 2:] += 0.5

    broken(monkeypatch, damage)
    sentence = refusal(recipe(tmp_path, loss={"ld_alpha": 0.3}))
    assert "a log-prob is 0.5000 nats from its reference: the reference was scored with other weights" in sentence


def test_a_recurrence_that_is_unrolled_is_said_before_the_first_step():
    from mlx_lm.models import mamba

    from mlxdpo.training.plan import PlanSummary

    summary = PlanSummary(steps=1, pairs=1, rows=2, tokens=100, waste=0.0, shapes=1, longest=9)
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 16, "state_size": 4, "num_hidden_layers": 1}
    rest = {"conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 2}
    slow = mamba.Model(mamba.ModelArgs(model_type="mamba", **sizes, **rest))
    assert "token by token" in preflight.recurrence_note(slow, summary)
    assert preflight.recurrence_note(tiny_model(), summary) == ""
    assert preflight.recurrence_note(tiny_model("qwen3_5"), summary) == ""  # computed in chunks
    with pytest.raises(CannotPlan, match="recurrence of mamba token by token"):
        shape_of(Skeleton(slow, {}, Path(), {}, None), ModelConfig(path="slow"))
