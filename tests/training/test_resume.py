"""A run that was stopped and goes on is the straight run, to the bit; what changed meanwhile is named."""

import json
import os
import shutil

import pytest
from slow_cases import rest_slow
from tiny_models import write_model
from tiny_runs import adapter_bytes, assert_same, finish, interrupted, numbers, recipe, stop_after, write_pairs
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint, loop
from mlxdpo.training.run import train
from mlxdpo.training.step import OPTIMIZERS
from mlxdpo.types import UserError

pytestmark = pytest.mark.usefixtures("cache")
HARD = {
    "lora": {"dropout": 0.1},
    "data": {"eval_fraction": 0.4},
    "train": {"epochs": 2, "eval_every": 2, "save_every": 3},
}
# 15 training and 3 held-out pairs: 12 questions while scoring (a batch each, and one when a part is done), then one
# per batch, two a step: the question after the 17th comes inside the window of step 3.


STOPS = (2, 12, 13, 16, 17, 18, 19, 20)


def straight(folder, **sections):
    finish(recipe(folder, "straight", **sections))
    return folder / "straight"


@pytest.mark.parametrize(
    ("method", "stops"),
    rest_slow([("lora", STOPS), ("dora", (17, 20)), ("full", (17, 20))], [("lora", STOPS)]),
)
def test_resumed_wherever_it_stopped_is_the_straight_run(tmp_path, method, stops):
    """Stops at the start of a window, inside it, at, before and after a checkpoint, and while scoring."""
    sections = HARD | {"lora": HARD["lora"] | {"method": method}}
    whole, stopped = straight(tmp_path, **sections), set()
    for asked in stops:
        run, step = interrupted(recipe(tmp_path, f"stop-{asked}", **sections), stop_after(asked))
        stopped.add(step)
        events = finish(run.config(), run)
        assert events[-1].kind == "done"
        assert_same(run.path, whole)
    # Before, at and after the checkpoint of step 3.
    assert ({0, 2, 3, 4} if method == "lora" else {2, 4}) <= stopped


def test_stopped_again_and_again_it_is_still_the_straight_run(tmp_path):
    whole = straight(tmp_path, **HARD)
    run, _ = interrupted(recipe(tmp_path, **HARD), stop_after(13))
    for _ in range(50):
        last = finish(run.config(), run, stop=stop_after(14))[-1]
        if last.kind == "done":
            break
    assert last.kind == "done"
    assert_same(run.path, whole)


@pytest.mark.parametrize("name", rest_slow(sorted(OPTIMIZERS), ["adamw", "sgd"]))
def test_every_optimizers_state_survives(tmp_path, name):
    sections = {"optim": {"name": name, "lr": 1e-3}, "lora": {"layers": 1}}
    whole = straight(tmp_path, **sections)
    run, step = interrupted(recipe(tmp_path, **sections), stop_after(16))
    assert step == 2
    finish(run.config(), run)
    assert_same(run.path, whole)


def cut_back(source, target, keep):
    """What a kill leaves: the run as it was on disk, with only the checkpoints up to step `keep`."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "adapter")
    for path in checkpoint.steps(target / "checkpoints"):
        if int(path.name.removeprefix("step-")) > keep:
            shutil.rmtree(path)
    return Run.open(target)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped, trained once."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        return straight(folder, **HARD | {"train": HARD["train"] | {"save_every": 3, "eval_every": 4}})


@pytest.mark.parametrize("keep", [0, 3, 6, 9])
def test_killed_it_goes_back_to_its_last_checkpoint(tmp_path, keep, whole):
    run = cut_back(whole, tmp_path / "killed", keep)
    at = max((int(p.name[5:]) for p in checkpoint.steps(run.checkpoints)), default=0)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "lo')  # a torn line
    events = finish(run.config(), run)
    assert next(e.step for e in events if e.kind == "resumed") == at
    assert_same(run.path, whole)
    lines = list(read_lines(run.path / "metrics.jsonl"))
    assert {"resumed_from": at} in lines


def test_metrics_have_each_step_and_evaluation_once(tmp_path):
    run, _ = interrupted(recipe(tmp_path, **HARD), stop_after(12))  # after the evaluation of step 0, before a step
    assert [line["step"] for line in run.metrics()] == [0]
    finish(run.config(), run, stop=stop_after(17))
    finish(run.config(), run)
    lines = run.metrics()
    assert [m["step"] for m in lines if "loss" in m] == list(range(1, 9))
    assert [m["step"] for m in lines if "eval_loss" in m] == [0, 2, 4, 6, 8]


def test_a_finished_run_resumed_changes_nothing(tmp_path):
    whole = straight(tmp_path, **HARD)
    before, lines = adapter_bytes(whole), numbers(whole)
    run = Run.open(whole)
    events = finish(run.config(), run)
    assert [e.kind for e in events][-1] == "done" and not [e for e in events if e.kind == "step"]
    assert adapter_bytes(whole) == before and numbers(whole) == lines


def test_a_run_stopped_before_its_manifest_can_be_resumed(tmp_path):
    whole = straight(tmp_path)
    config = recipe(tmp_path)
    run = Run.create(config)
    finish(run.config(), run)
    assert_same(run.path, whole)


def refused(run):
    """The refusal, and proof that it touched nothing."""
    before = {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}
    with pytest.raises(UserError) as error:
        finish(run.config(), run)
    assert {path: path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()} == before
    return str(error.value)


END = "put it back, or start a new run with another --out"


def then_and_now(run, name, old, new):
    return f"{run.path}: the {name} changed since this run began ({old} then, {new} now); {END}"


def test_a_changed_model_is_named(tmp_path):
    run, _ = interrupted(recipe(tmp_path), stop_after(14))
    then = run.manifest()["model"]["digest"][:12]
    write_model(tmp_path / "llama", chatml_tokenizer(), seed=9)
    sentence = refused(run)
    now = sentence.split("then, digest ")[1][:12]
    assert now != then
    assert sentence == then_and_now(run, "model", f"digest {then}, dtype float32", f"digest {now}, dtype float32")


def test_changed_data_is_named(tmp_path):
    run, _ = interrupted(recipe(tmp_path), stop_after(14))
    then = run.manifest()["data"]["digest"][:12]
    write_pairs(tmp_path / "pairs.jsonl", seed=1)
    sentence = refused(run)
    now = sentence.split("then, ")[1][:12]
    assert now != then and sentence == then_and_now(run, "data", then, now)


def test_a_changed_template_is_named(tmp_path):
    chat = {"data": {"template": "chat"}}
    run, _ = interrupted(recipe(tmp_path, **chat), stop_after(14))
    then = run.manifest()["template"][:12]
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>'", "<|im_start|>the '", 1)
    tokenizer.save_pretrained(tmp_path / "llama")
    sentence = refused(run)
    now = sentence.split("then, ")[1][:12]
    assert now != then and sentence == then_and_now(run, "template", then, now)


def test_a_changed_reference_is_named(tmp_path):
    write_model(tmp_path / "other", chatml_tokenizer(), seed=7)
    run, _ = interrupted(recipe(tmp_path, reference={"model": str(tmp_path / "other")}), stop_after(14))
    then = run.manifest()["reference"]["digest"][:12]
    write_model(tmp_path / "other", chatml_tokenizer(), seed=8)
    sentence = refused(run)
    now = sentence.split("then, digest ")[1][:12]
    assert now != then
    assert sentence == then_and_now(run, "reference", f"digest {then}, dtype float32", f"digest {now}, dtype float32")


def test_a_changed_starting_adapter_is_named(tmp_path):
    finish(recipe(tmp_path, "first"))
    adapter = tmp_path / "first" / "adapter"
    run, _ = interrupted(recipe(tmp_path, model={"adapter": str(adapter)}), stop_after(14))
    finish(recipe(tmp_path, "second", train={"seed": 8}))
    shutil.copytree(tmp_path / "second" / "adapter", adapter, dirs_exist_ok=True)
    assert f"{run.path}: the model changed since this run began (digest " in refused(run)


def test_a_run_from_an_adapter_resumes_to_the_bit(tmp_path):
    finish(recipe(tmp_path, "first"))
    sections = {"model": {"adapter": str(tmp_path / "first" / "adapter")}, "lora": {"dropout": 0.2}}
    whole = straight(tmp_path, **sections)
    run, _ = interrupted(recipe(tmp_path, **sections), stop_after(14))
    finish(run.config(), run)
    assert_same(run.path, whole)


def scripted(monkeypatch, held_out):
    """Held-out losses as told, in the order of the evaluations."""
    left, metrics = iter(held_out), loop.measures

    def told(job, found, prefix=""):
        return metrics(job, found, prefix) | ({"eval_loss": next(left)} if prefix else {})

    monkeypatch.setattr(loop, "measures", told)


def names(run):
    return [path.name for path in checkpoint.steps(Run.open(run).checkpoints)]


EACH = {"epochs": 2, "eval_every": 1, "save_every": 1, "keep_checkpoints": 2, "sample_every": 0}
LONG = {"data": {"eval_fraction": 0.4}, "train": EACH}


def test_pruning_keeps_the_newest_and_the_best(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.8, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.6])
    done = finish(recipe(tmp_path, **LONG))[-1]
    assert names(tmp_path / "run") == ["step-000002", "step-000007", "step-000008"]
    assert done.values["best"] == 2 and done.values["from"] == "step-000008"
    assert (
        adapter_bytes(tmp_path / "run")
        == (tmp_path / "run" / "checkpoints" / "step-000008" / "adapters.safetensors").read_bytes()
    )


def test_the_best_checkpoint_becomes_the_adapter_when_asked(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.8, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.6])
    done = finish(recipe(tmp_path, **LONG | {"train": LONG["train"] | {"keep_model": "best"}}))[-1]
    assert done.values["from"] == "step-000002"
    best = tmp_path / "run" / "checkpoints" / "step-000002" / "adapters.safetensors"
    last = tmp_path / "run" / "checkpoints" / "step-000008" / "adapters.safetensors"
    assert adapter_bytes(tmp_path / "run") == best.read_bytes() != last.read_bytes()


def test_the_best_step_is_kept_though_no_checkpoint_was_due(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.8, 0.9, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9])
    finish(recipe(tmp_path, **LONG | {"train": LONG["train"] | {"save_every": 50, "keep_model": "best"}}))
    assert names(tmp_path / "run") == ["step-000003", "step-000008"]


@pytest.mark.parametrize("final", ["last", "best"])
def test_patience_stops_and_the_last_step_is_on_disk(tmp_path, monkeypatch, final):
    scripted(monkeypatch, [0.9, 0.8, 0.5, 0.6, 0.5, 0.7])
    train = LONG["train"] | {"save_every": 50, "patience": 3, "keep_model": final}
    events = finish(recipe(tmp_path, **LONG | {"train": train}))
    note = next(e for e in events if e.kind == "note")
    assert note.values["text"] == (
        "stopped early at step 5 of 8 (train.patience 3): "
        "held-out loss was lowest at step 2; a larger patience continues"
    )
    assert names(tmp_path / "run") == ["step-000002", "step-000005"]
    source = {"last": "step-000005", "best": "step-000002"}[final]
    assert events[-1].values["from"] == source and events[-1].step == 5
    file = tmp_path / "run" / "checkpoints" / source / "adapters.safetensors"
    assert adapter_bytes(tmp_path / "run") == file.read_bytes()
    run = Run.open(tmp_path / "run")
    again = finish(run.config(), run)  # patience stays exhausted
    assert not [e for e in again if e.kind == "step"] and adapter_bytes(run.path) == file.read_bytes()


def test_patience_counts_on_after_a_resume(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.8, 0.5, 0.6, 0.7, 0.7])
    train = LONG["train"] | {"patience": 3}
    run, step = interrupted(recipe(tmp_path, **LONG | {"train": train}), stop_after(18))
    assert step == 3
    events = finish(run.config(), run)
    assert next(e for e in events if e.kind == "note").step == 5


def test_progress_survives_as_it_was(tmp_path):
    finish(recipe(tmp_path, **HARD))
    last = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    progress = checkpoint.read_progress(last)
    lines = Run.open(tmp_path / "run").metrics()
    assert progress.step == 8 and progress.tokens == lines[-2]["num_tokens"]
    assert progress.best_loss == min(m["eval_loss"] for m in lines if m.get("eval_loss") and m["step"])
    assert json.loads((last / "state.json").read_text())["pairs"] == progress.pairs == 2 * 15


def test_drafts_of_a_killed_run_are_swept_and_never_taken_for_checkpoints(tmp_path):
    run, step = interrupted(recipe(tmp_path, **HARD), stop_after(16))
    draft = run.checkpoints / ".draft-x"
    draft.mkdir()
    (draft / "adapters.safetensors").write_bytes(b"half a file")
    assert [p.name for p in checkpoint.steps(run.checkpoints)][-1] == f"step-{step:06d}"
    finish(run.config(), run)
    assert not draft.exists()


def test_a_run_that_another_process_is_training_is_left_alone(tmp_path):
    config = recipe(tmp_path)
    finish(config)
    run = Run.open(config.out)
    with (
        run.exclusive(),
        pytest.raises(UserError, match=rf"process {os.getpid()} is training this run; stop it first, or wait$"),
    ):
        list(train(run.config(), resume=run))
    list(train(run.config(), resume=run))  # and it is free again
