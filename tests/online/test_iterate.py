"""Rounds: linked, resumable to the bit, online with one optimizer, and stopped when their judge is being gamed."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from tiny_runs import adapter_bytes, finish, recipe, write_pairs
from tiny_words import WORDS, write_words

from mlxdpo.cli import run as cli
from mlxdpo.config import load_config
from mlxdpo.io.digest import folder_digest
from mlxdpo.online.prompts import Asked, Prompts
from mlxdpo.online.rounds import run
from mlxdpo.runs import Run
from mlxdpo.training.plan import learning_rate
from mlxdpo.training.run import train
from mlxdpo_eval.report.rounds import rounds_verdict
from mlxdpo_eval.rounds import summarize_round

PROMPTS = [f"the {a} {b}" for a in WORDS[:5] for b in WORDS[12:18]]
BASE = {
    "data": {"path": "prompts.jsonl", "eval_fraction": 0.3, "template": "plain", "max_length": 64},
    "model": "llama",
    "lora": {"rank": 4, "scale": 4.0},
    "optim": {"lr": 1e-2, "warmup": 0.0},
    "train": {"batch_size": 2, "gradient_accumulation": 1, "eval_every": 0, "save_every": 3},
    "collect": {"judge": "longest", "samples": 4, "max_tokens": 6, "unfinished": "keep", "batch_size": 16},
    "rounds": {"count": 2, "second": "vader", "max_kl": 100.0},
}


def furnish(folder):
    """The model of words, thirty prompts, a recipe."""
    write_words(folder / "llama")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (folder / "r.yaml").write_text(yaml.safe_dump(BASE))
    return folder


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A furnished folder to work in."""
    monkeypatch.chdir(furnish(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def after_one_round(tmp_path_factory):
    """A furnished folder in which `out` holds one round; nobody changes it."""
    folder = furnish(tmp_path_factory.mktemp("one_round"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        assert cli(["iterate", "r.yaml", "--out", "out", "--rounds", "1"]) == 0
    return folder


def results(folder):
    return json.loads((folder / "rounds.json").read_text())


@pytest.mark.slow
def test_rounds_are_runs_with_parents(place, capsys):
    assert cli(["iterate", "r.yaml", "--out", "out"]) == 0, capsys.readouterr()
    found = results(place / "out")
    assert [row["round"] for row in found["rounds"]] == [0, 1, 2] and found["stopped"] is None and found["kept"] == 2
    assert [row["parent"] for row in found["rounds"][1:]] == [None, "round-1"]
    first, second = (Run.open(place / "out" / f"round-{n}") for n in (1, 2))
    assert first.manifest()["parent"] is None
    adapter = folder_digest(first.adapter)
    assert second.manifest()["parent"] == {"run": str(first.path.relative_to(place)), "adapter": adapter}
    rows = [json.loads(line) for line in (second.path / "data" / "pairs.jsonl").read_text().splitlines()]
    assert {row["made"]["adapter"] for row in rows} == {adapter} and {row["made"]["run"] for row in rows} == {"round-1"}
    # The reference is the start: the bare weights, though round 2 starts from an adapter.
    assert second.manifest()["reference"]["adapter"] is None and second.config().reference.model == "llama"
    assert "round-2" in (place / "out" / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*.safetensors")}
    assert cli(["iterate", "--resume", "out", "--rounds", "3"]) == 0
    assert len(results(place / "out")["rounds"]) == 4 and results(place / "out")["rounds"][:3] == found["rounds"]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    held = {line["prompt"] for line in json.loads((place / "out" / "start.json").read_text())["answers"]}
    assert not held & {row["prompt"] for row in rows}


def test_reference_previous_is_where_the_round_starts(place):
    assert cli(["iterate", "r.yaml", "--out", "out", "--reference", "previous"]) == 0
    first, second = (Run.open(place / "out" / f"round-{n}") for n in (1, 2))
    assert second.manifest()["reference"]["adapter"] == folder_digest(first.adapter)
    steps = [line for line in second.metrics() if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.slow
def test_a_merged_reference_is_learned_from_the_new_pairs(place, capsys):
    """The manifest names the merge; rounds that go on keep the merges they have and make the next."""
    assert cli(["iterate", "r.yaml", "--out", "out", "--reference", "merged"]) == 0
    assert "the reference of round 2 is " in capsys.readouterr().out
    first, second = (Run.open(place / "out" / f"round-{n}") for n in (1, 2))
    weights = json.loads((second.path / "reference" / "weights.json").read_text())
    assert set(weights) == {"start", "round-1"} and sum(weights.values()) == pytest.approx(1)
    assert second.manifest()["reference"]["adapter"] == folder_digest(second.path / "reference")
    folder = second.path / "reference"
    own, merged = (mx.load(str(one / "adapters.safetensors")) for one in (first.adapter, folder))
    scale = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    assert scale == pytest.approx(4 * weights["round-1"])  # alone in the merge: the start has no adapter
    assert all(mx.array_equal(own[name], merged[name]) for name in own)
    before = (folder / "adapters.safetensors").stat().st_mtime_ns
    assert cli(["iterate", "--resume", "out", "--rounds", "3"]) == 0
    assert before == (folder / "adapters.safetensors").stat().st_mtime_ns
    third = json.loads((place / "out" / "round-3" / "reference" / "weights.json").read_text())
    assert set(third) == {"start", "round-1", "round-2"} and sum(third.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--lora.method", "dora"], "rounds.reference merged merges LoRA adapters; lora.method is dora"),
        (["--every", "4"], "rounds.every 4 makes rounds too short to merge; use rounds.reference previous"),
    ],
)
def test_what_cannot_be_merged_is_said_before_anything_is_drawn(place, capsys, more, sentence):
    assert cli(["iterate", "r.yaml", "--out", "out", "--reference", "merged", *more]) == 2
    assert sentence in capsys.readouterr().err and not (place / "out").exists()


STOPS = (30, 90, 110, 150)  # questions "stop?" that are answered no: in drawing, in training, in between


@pytest.mark.slow
def test_stopped_anywhere_and_going_on_is_straight(place, monkeypatch, capsys):
    assert cli(["iterate", "r.yaml", "--out", "straight"]) == 0
    stages = set()
    for calls in STOPS:
        left = iter(range(calls))
        with monkeypatch.context() as patch:
            patch.setattr("mlxdpo.commands.interrupt.threading.Event", lambda left=left: Flag(left))
            status = cli(["iterate", "r.yaml", "--out", f"stop-{calls}"])
        folder = place / f"stop-{calls}"
        if status == 130:
            stages.add((len(list(folder.glob("round-*"))), (folder / "round-1" / "config.yaml").exists()))
            assert "resume with: mlxdpo iterate --resume" in capsys.readouterr().err
        assert cli(["iterate", "--resume", f"stop-{calls}"]) == 0
        for n in (1, 2):
            assert adapter_bytes(folder / f"round-{n}") == adapter_bytes(place / "straight" / f"round-{n}")
        assert results(folder) == results(place / "straight")
    assert len(stages) >= 3  # it did stop in different stages


class Flag:
    """A stop flag that is raised after some questions."""

    def __init__(self, left):
        self.left = left

    def is_set(self):
        """Yes when there is no question left."""
        return next(self.left, None) is None

    def set(self):
        """Asked from outside: at once."""
        self.left = iter(())


def test_other_settings_are_refused_by_name(after_one_round, monkeypatch, capsys):
    monkeypatch.chdir(after_one_round)
    assert cli(["iterate", "r.yaml", "--out", "out", "--rounds", "1", "--loss.beta", "0.2"]) == 2
    assert "out contains rounds with a different loss.beta (0.1 then, 0.2 now)" in capsys.readouterr().err


MISTAKES = {
    "--collect.judge": ("", "no judge ranks the answers"),
    "--rounds.second": ("longest", "rounds.second longest is also the ranking judge"),
    "--stage": ("sft", "stage sft does not support rounds"),
    "--data.eval-fraction": ("0", "30 prompts to learn from and 0 held out"),
    "--resume": ("out", "--resume out uses the settings of its rounds; drop r.yaml"),
}


@pytest.mark.parametrize("option", MISTAKES)
def test_mistakes_are_one_sentence(option, place, capsys):
    value, sentence = MISTAKES[option]
    assert cli(["iterate", "r.yaml", "--out", "out", option, value]) == 2
    assert sentence in capsys.readouterr().err and not (place / "out").exists()


def test_train_points_to_iterate(place, capsys):
    assert cli(["train", "r.yaml"]) == 2
    assert "has no meaning in stage dpo; run `mlxdpo iterate`" in capsys.readouterr().err


@pytest.mark.slow
def test_online_rounds_are_pieces_of_one_training(place):
    assert cli(["iterate", "r.yaml", "--out", "on", "--every", "3", "--rounds", "3", "--optim.lr", "1e-3"]) == 0
    whole = load_config("on/rounds.yaml").optim
    for n in (1, 2, 3):
        run = Run.open(place / "on" / f"round-{n}")
        steps = [line for line in run.metrics() if "loss" in line]
        assert [s["learning_rate"] for s in steps] == pytest.approx([learning_rate(whole, 3 * (n - 1), 9)] * 3)
        state = mx.load(str(run.checkpoints / "step-000003" / "optimizer.safetensors"))
        assert state["step"].item() == 3 * n  # the moments have seen every step so far
        assert json.loads((run.path / "data" / "pairs.report.json").read_text())["prompts"] == 6


def test_a_warm_optimizer_goes_on_to_the_bit(tmp_path, cache):
    """Four steps on one pair are two, and two more with the optimizer of the first two; without it they are not."""
    write_pairs(tmp_path / "pairs.jsonl", count=1)

    def part(out, steps, warm=None, **sections):
        """A run of some steps, each on the same pair."""
        optim = {"schedule": "constant", "name": "adamw"}
        config = recipe(tmp_path, out, train={"steps": steps, "epochs": 9.0}, optim=optim, **sections)
        return list(train(config, warm=warm))

    part("whole", 4)
    part("half", 2)
    more = {"reference": {"model": str(tmp_path / "llama")}}
    start = {"model": {"adapter": str(tmp_path / "half" / "adapter")}, **more}
    part("rest", 2, tmp_path / "half" / "checkpoints" / "step-000002", **start)
    part("cold", 2, **start)
    whole, rest, cold = (adapter_bytes(tmp_path / name) for name in ("whole", "rest", "cold"))
    assert rest == whole and cold != whole


@pytest.mark.slow
def test_a_gamed_judge_stops_the_rounds(place, capsys):
    """The second judge wants the opposite, so what the first one gains it loses: stop, keep the start, exit 0."""
    words = ["iterate", "r.yaml", "--out", "out", "--rounds.second", "shortest", "--rounds", "4", "--optim.lr", "0.05"]
    assert cli([*words, "--rounds.heldout-samples", "6"]) == 0
    found, said = results(place / "out"), capsys.readouterr().out
    assert "longest is being gamed" in found["stopped"] and len(found["rounds"]) < 5
    assert found["kept"] == len(found["rounds"]) - 2 and "stopped: round" in said
    first, second = found["rounds"][-1]["judges"]
    base = next(b for b in ("from_previous", "from_start") if second[b] and second[b]["high"] < 0)
    assert first[base]["estimate"] > 0
    assert cli(["iterate", "--resume", "out"]) == 0 and results(place / "out") == found


def test_the_kl_stops_the_rounds(place):
    words = ["iterate", "r.yaml", "--out", "out", "--optim.lr", "0.05", "--rounds.max-kl", "1e-3"]
    assert cli(words) == 0
    found = results(place / "out")
    assert "significantly above rounds.max_kl 0.001" in found["stopped"] and found["kept"] == 0
    assert rounds_verdict(found)[0] == "cannot tell yet"


def measured(first, second, kl=0.0):
    """One answer to each of some prompts, with the scores of two judges."""
    lines = [
        {"prompt_id": str(i), "tokens": [1, 2, 3], "stopped": True, "kl": kl, "scores": [a, b]}
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]
    return {"judges": ["first", "second"], "answers": lines}


WAVE = [0.0, 0.1, 0.2, 0.1, 0.0, 0.05, 0.15, 0.1]


def moved(by, spread=1.0):
    return [w * spread + by + 0.01 * (i % 3) for i, w in enumerate(WAVE)]


CASES = [  # changes of the first and the second judge, what the reason says
    (+0.5, +0.5, ""),
    (+0.5, +0.0, ""),
    (+0.5, -0.5, "first is being gamed"),
    (-0.5, -0.5, "first itself fell"),
    (-0.5, +0.5, "first itself fell"),
]


@pytest.mark.parametrize(("up", "other", "reason"), CASES)
def test_the_rule_by_hand(up, other, reason):
    found, why = summarize_round([measured(WAVE, WAVE), measured(moved(up), moved(other))], 0.5)
    assert (reason in why) and bool(why) == bool(reason)
    change = found["judges"][0]["from_start"]
    assert change["estimate"] == pytest.approx(up + 0.01 * 7 / 8) and change == found["judges"][0]["from_previous"]


def test_slow_gaming_is_seen_from_the_start():
    """Each round's loss of the second judge hides in its spread; two rounds of it do not."""
    noise = [0.3, -0.3, 0.25, -0.25, 0.3, -0.3, 0.2, -0.2]
    down = [w - 0.1 + n for w, n in zip(WAVE, noise, strict=True)]
    further = [w - 0.25 + 0.2 * n for w, n in zip(WAVE, noise, strict=True)]
    rounds = [measured(WAVE, WAVE), measured(moved(0.2), down), measured(moved(0.4), further)]
    assert summarize_round(rounds[:2], 9.0)[1] == "" and "since the start it rose by" in summarize_round(rounds, 9.0)[1]


def test_kl_is_counted_per_token_with_its_end():
    kl = [one * 4 for one in (0.50, 0.52, 0.55, 0.58, 0.60, 0.62, 0.65, 0.70)]  # 4 tokens each, the end included
    end = measured(WAVE, WAVE)
    for line, own in zip(end["answers"], kl, strict=True):
        line["kl"] = own
    row, why = summarize_round([measured(WAVE, WAVE), end], 0.5)
    assert row["kl_per_token"] == pytest.approx(0.59) and "0.590 nats per token" in why
    assert summarize_round([measured(WAVE, WAVE), end], 0.58)[1] == ""  # above it, but not surely


def test_two_few_prompts_never_stop():
    one = [measured(WAVE[:1], WAVE[:1]), measured([9.0], [-9.0], kl=99.0)]
    assert summarize_round(one, 0.5)[1] == ""


def test_prompts_come_in_turn(place):
    config = load_config("r.yaml", {"rounds": {"prompts": 4}})
    prompts = Prompts([Asked(str(i), "") for i in range(10)], {})
    drawn = [[one.prompt for one in run.prompts_of(config, prompts, n).asked] for n in (1, 2, 3)]
    assert len({*drawn[0], *drawn[1]}) == 8 and drawn[2][2:] == drawn[0][:2] and len(set(drawn[2])) == 4
    assert run.drawing_of(config, 1).seed != run.drawing_of(config, 2).seed


def test_votes_go_through_a_whole_round_unedited(place):
    """What the app wrote, held-out prompts among it: those are left out and counted, the others are trained on."""
    from mlxdpo.ui.vote.tab import append_vote

    finish(load_config(None, {"model": "llama", "data": "old.jsonl", "out": "one"} | parts(place)))
    for i, prompt in enumerate(PROMPTS):
        line = {"id": str(i), "prompt": prompt, "a": f" runs {WORDS[i % 9]}", "b": " sleeps", "winner": "ab"[i % 2]}
        append_vote(Run.open("one"), line | {"tuned": "a", "blind": True, "source": "own"})
    words = ["iterate", "r.yaml", "--out", "out", "--rounds", "1", "--model.adapter", "one/adapter"]
    assert cli([*words, "--collect.judge", "votes:one/votes.jsonl"]) == 0
    report = json.loads((place / "out/round-1/data/pairs.report.json").read_text())
    out = sum(report["answers_left_out"].values())
    assert out > 0 and report["rows"] == len(PROMPTS) - out
    assert Run.open("out/round-1").manifest()["parent"]["run"] == "one"
    assert len(results(place / "out")["rounds"]) == 2


def parts(place):
    """Settings of the run that the votes are about."""
    rows = [{"prompt": p, "chosen": " runs", "rejected": " sleeps"} for p in PROMPTS[:6]]
    (place / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": "old.jsonl", "eval_fraction": 0.0, "template": "plain"}
    return {"data": data, "lora": BASE["lora"], "train": BASE["train"], "optim": BASE["optim"]}


def test_the_app_shows_rounds_side_by_side(after_one_round, monkeypatch):
    from mlxdpo.ui.runs.tab import rounds

    monkeypatch.chdir(after_one_round)
    shown = rounds(Path("out/round-1"))
    assert 'class="chosen" aria-current="true"><th scope="row">round-1' in shown and "longest" in shown
    assert "is not one of several rounds" in rounds(Path("out"))
