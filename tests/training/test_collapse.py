"""Signs of a run that gets worse, by hand and in tiny runs with planted collapses; watching changes no bit."""

import json

import numpy as np
import pytest
from tiny_runs import assert_same, finish, recipe, stop_after

from mlxdpo.config import LossConfig, TrainConfig
from mlxdpo.inference.generate import generate
from mlxdpo.losses import resolve
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.collapse import CollapseWatch
from mlxdpo.training.metrics import Scored
from mlxdpo.training.run import train
from mlxdpo.training.watched_answers import AnswerStats, coarse_kl, looks, repeated_share

pytestmark = pytest.mark.usefixtures("cache")
HEALTHY = AnswerStats(length=20.0, clipped=0.0, repetition=0.1, kl=0.0)


def watching(config, resume=None, stop=lambda: False):
    return list(train(config, resume=resume, should_stop=stop, generate=generate))


def of_kind(events, kind):
    return [event for event in events if event.kind == kind]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"repetition": 0.9}, "repeat themselves (0.90 of their 3-grams, 0.10 at the start)"),
        ({"length": 0.5}, "have become empty (20 tokens at the start)"),
        ({"clipped": 1.0}, "no longer end, and 100% of them did at the start"),
        ({"kl": 2.5}, "are 2.5 nats a token away"),
    ],
)
def test_each_sign_is_said_once(change, words):
    watch = CollapseWatch(resolve(LossConfig()), heldout=True)
    assert watch.answers(HEALTHY, HEALTHY, 15.0) == (True, None)
    sound, said = watch.answers(HEALTHY._replace(**change), HEALTHY, 15.0)
    assert not sound and said is not None and words in said
    assert watch.answers(HEALTHY._replace(**change), HEALTHY, 15.0) == (False, None)


def test_what_the_chosen_answers_ask_for_is_no_collapse():
    """Longer answers where the chosen are longer, short ones where they are short, imitation that goes far."""
    watch = CollapseWatch(resolve(LossConfig()), heldout=True)
    assert watch.answers(HEALTHY._replace(clipped=1.0), HEALTHY, 60.0)[0]
    assert watch.answers(HEALTHY._replace(length=1.0), HEALTHY, 1.0)[0]
    imitating = CollapseWatch(resolve(LossConfig(name="orpo")), heldout=True)
    assert imitating.answers(HEALTHY._replace(kl=3.0), HEALTHY, 15.0)[0]


def gains(values, beta=0.1):
    d, zero, length = np.asarray(values) / beta, np.zeros(len(values)), np.full(len(values), 5.0)
    return Scored(zero, d, zero, zero, zero, length, length)


def test_labels_that_say_nothing_are_told_from_labels_that_do():
    """16 reward differences of +-0.4: summed over root of squares 0 where half are wrong, 3 where 14 are right."""
    for values, expected in (([0.4, -0.4] * 8, True), ([0.4] * 14 + [-0.4] * 2, False), ([0.04, -0.04] * 8, False)):
        watch = CollapseWatch(resolve(LossConfig()), heldout=True)
        watch.step(gains(values), unseen=True)
        assert (watch.labels() is not None) == expected
    watch = CollapseWatch(resolve(LossConfig()), heldout=True)
    watch.step(gains([0.4, -0.4] * 8), unseen=False)  # pairs of a later pass were trained on
    assert watch.labels() is None


def test_chosen_answers_far_below_the_reference_for_three_steps_are_a_collapse():
    """3 steps of 3.2 nats a token; two are noise, and a run that comes back is sound again. Whatever is held out."""
    watch = CollapseWatch(resolve(LossConfig()), heldout=True)
    length, zero = np.full(4, 5.0), np.zeros(4)
    fallen = lambda nats: Scored(zero, zero - 5 * nats, zero, zero, zero, length, length)  # noqa: E731
    assert [watch.step(fallen(nats)) for nats in (0.3, 3.2, 3.2)] == [None] * 3 and not watch.lost
    said = watch.step(fallen(3.2))
    assert said is not None and said.startswith("the run gets worse") and "3.2 nats a token" in said and watch.lost
    assert watch.step(fallen(3.2)) is None and watch.lost
    assert watch.step(fallen(0.3)) is None and not watch.lost


def test_numbers_by_hand():
    assert repeated_share([1, 2, 3, 1, 2, 3]) == 0.25 and repeated_share([1, 2]) == 0.0
    halves, rest = np.log([[0.5, 0.25]]), np.log([[0.25, 0.5]])  # the rest is 0.25 in both
    assert coarse_kl(halves, halves) == 0.0
    assert coarse_kl(halves, rest) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert looks(TrainConfig(), 48) == {3, 6, 12, 24, 36}
    assert looks(TrainConfig(sample_every=20), 48) == {20, 40} and looks(TrainConfig(sample_every=0), 48) == set()


def test_watching_changes_no_bit_and_resumes(tmp_path):
    sections = {"lora": {"dropout": 0.1}, "data": {"eval_fraction": 0.4}, "train": {"epochs": 2, "sample_every": 2}}
    sections["optim"] = {"lr": 1e-3}
    events = watching(recipe(tmp_path, "straight", **sections))
    seen = of_kind(events, "answers")
    assert seen and set(seen[0].values) == {
        f"completions/{name}" for name in ("mean_length", "clipped_ratio", "repetition", "kl")
    }
    plain = recipe(tmp_path, "plain", **sections)
    assert any("no answers are looked at" in e.values["text"] for e in of_kind(finish(plain), "note"))
    adapters = [(tmp_path / name / "adapter" / "adapters.safetensors").read_bytes() for name in ("straight", "plain")]
    assert adapters[0] == adapters[1]
    config = recipe(tmp_path, "stopped", **sections)
    with_stop = watching(config, stop=stop_after(18))
    assert with_stop[-1].kind == "interrupted"
    run = Run.open(config.out)
    watching(run.config(), run)
    assert_same(run.path, tmp_path / "straight")


def test_a_rate_that_breaks_the_model_is_named_and_the_checkpoint_from_before_is_kept(tmp_path):
    """The warm-up is half of the run, so the first looks are sound; one checkpoint is kept beside the sound one."""
    size = {"steps": 24, "epochs": 9, "sample_every": 1, "keep_checkpoints": 1, "save_every": 6}
    events = watching(recipe(tmp_path, optim={"lr": 0.3, "warmup": 0.5}, train=size))
    worse = [event for event in of_kind(events, "note") if "the run gets worse" in event.values["text"]]
    assert 1 < worse[0].step <= 12
    folder = tmp_path / "run" / "checkpoints"
    progress = checkpoint.read_progress(checkpoint.steps(folder)[-1])
    assert progress.collapsed and progress.sound_step is not None
    first_look = next(
        e for e in worse if f"step-{worse[0].step - 1:06d}, from before that, is kept" in e.values["text"]
    )
    assert first_look.step == worse[0].step
    kept = checkpoint.folder_of(folder, progress.sound_step)
    assert kept.exists() and checkpoint.read_progress(kept).sound_step == progress.sound_step


def test_a_healthy_run_gets_no_alarm(tmp_path):
    events = watching(recipe(tmp_path, optim={"lr": 1e-3}, train={"epochs": 3, "sample_every": 2}))
    assert of_kind(events, "answers") and not [e for e in of_kind(events, "note") if "worse" in e.values["text"]]
    assert not checkpoint.read_progress(checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]).collapsed


def test_chosen_answers_that_repeat_themselves_are_named_before_the_first_step(tmp_path):
    recipe(tmp_path)
    rows = [{"prompt": f"q{i}:", "chosen": " red" * 12, "rejected": f" the user {i} string a"} for i in range(18)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = [e for e in of_kind(watching(recipe(tmp_path)), "note") if "repeat" in e.values["text"]]
    assert notes[0].step == 0 and "the chosen answers repeat themselves" in notes[0].values["text"]
