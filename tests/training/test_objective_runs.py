"""Objectives and modifiers through whole runs: steps however they are cut, references that move, rows that speak."""

import json
import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from slow_cases import rest_slow
from tiny_runs import adapter_bytes, finish, losses, recipe, stop_after, write_pairs

from mlxdpo.config import load_config
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.losses import LOSSES
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run
from mlxdpo.training.collapse import CollapseWatch
from mlxdpo.training.metrics import Scored, unpaired_metrics
from mlxdpo.training.reference_sync import ReferenceSync, swapped_in, trained_arrays
from mlxdpo.types import UserError

pytestmark = pytest.mark.usefixtures("cache")
HELDOUT = {"eval_fraction": 0.4}


def steps_of(events):
    return [event.values for event in events if event.kind == "step"]


def notes_of(events):
    return [event.values["text"] for event in events if event.kind == "note"]


COUPLED = sorted(name for name, objective in LOSSES.items() if objective.step_statistics)


@pytest.mark.parametrize("name", rest_slow([*COUPLED, "sigmoid+sft"], [COUPLED[0], "sigmoid+sft"]))
def test_a_step_is_the_same_however_it_is_cut(tmp_path, name, cache, monkeypatch):
    """Also where pairs are sorted, or a mean is taken, over the step: 8 x 1 against 2 x 4, and a last step of 2."""
    found = []
    for size, accumulate in ((8, 1), (2, 4)):
        monkeypatch.setenv("MLXDPO_CACHE", str(cache / str(size)))
        train = {"batch_size": size, "gradient_accumulation": accumulate, "epochs": 1}
        config = recipe(tmp_path, f"{size}", loss={"name": name}, train=train, optim={"name": "sgd", "lr": 1e-2})
        found.append(steps_of(finish(config)))
    assert len(found[0]) >= 3
    for a, b in zip(*found, strict=True):
        for key in ("loss", "grad_norm", "rewards/chosen"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The steps of the recipe without a modifier."""
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        return steps_of(finish(recipe(folder, data=HELDOUT)))


@pytest.mark.parametrize(
    "loss",
    rest_slow(
        [
            {"ld_alpha": 0.3},
            {"wpo": True},
            {"f_divergence": "js_divergence"},
            {"reference_free": True, "ld_alpha": 0.3},
            {"name": "simpo"},
        ],
        [{"wpo": True}, {"reference_free": True, "ld_alpha": 0.3}],
    ),
    ids=str,
)
def test_modifiers_reach_the_step_and_interrupted_runs_go_on_to_the_bit(tmp_path, loss, plain):
    events = finish(recipe(tmp_path, "straight", loss=loss, data=HELDOUT))
    straight = steps_of(events)
    assert abs(straight[-1]["grad_norm"] - plain[-1]["grad_norm"]) > 1e-4 * plain[-1]["grad_norm"]
    assert all(math.isfinite(v) for e in events if e.kind == "eval" for v in e.values.values())
    config = recipe(tmp_path, "broken", loss=loss, data=HELDOUT)
    finish(config, stop=stop_after(8))
    finish(config, Run.open(config.out))
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "straight")


def test_objectives_without_a_reference_score_none(tmp_path, cache):
    for name in ("simpo", "cpo", "orpo", "alphapo", "sft"):
        events = finish(recipe(tmp_path, name, loss={"name": name}, train={"steps": 1}))
        assert not [e for e in events if e.kind in ("reference", "referenced")]
    assert not list((cache / "reference").glob("*")) if (cache / "reference").exists() else True


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_moving_reference_has_the_mixed_weights(tmp_path, method):
    """By hand: w_ref = .6 w + .4 w_ref of the weights themselves, not of the matrices whose product they are."""
    config = recipe(tmp_path, lora={"method": method, "rank": 2, "scale": 2.0}, reference={"sync_every": 1})
    policy = load_policy(config.model)
    model = policy.model
    attach_lora(model, config.lora, 0)
    moving, x = ReferenceSync(model, config, forward_fns(model).score), mx.random.normal((3, 32))
    layer = model.layers[0].self_attn.q_proj
    base = np.array(layer(x), np.float64)
    expected = base
    for _ in range(3):
        arrays = tree_flatten(model.trainable_parameters())
        model.load_weights([(n, a + 0.1 * mx.random.normal(a.shape)) for n, a in arrays], strict=False)
        expected = 0.6 * np.array(layer(x), np.float64) + 0.4 * expected
        moving.move()
        own = trained_arrays(model)
        with swapped_in(model, moving.arrays):
            assert np.array(layer(x)) == pytest.approx(expected, abs=1e-4)
        assert all(mx.array_equal(a, own[n]).item() for n, a in trained_arrays(model).items())


@pytest.mark.parametrize("start", rest_slow(["fresh", "adapter", "full", "dora"], ["fresh"]))
def test_a_run_with_a_moving_reference_goes_on_to_the_bit(tmp_path, start):
    sections = {"reference": {"sync_every": 2}, "data": HELDOUT, "train": {"eval_every": 1, "save_every": 1}}
    if start == "adapter":
        finish(recipe(tmp_path, "first"))
        sections["model"] = {"adapter": str(tmp_path / "first" / "adapter")}
    elif start != "fresh":
        sections["lora"] = {"method": start}
    if start == "dora":
        with pytest.raises(
            UserError, match=r"^reference.sync_alpha 0.6: DoRA's weights are normed and cannot be mixed"
        ):
            finish(recipe(tmp_path, "refused", **sections))
        sections["reference"] = {"sync_every": 2, "sync_alpha": 1.0}
    straight = finish(recipe(tmp_path, "straight", **sections))
    for calls in (2, 5) if start == "fresh" else (5,):
        config = recipe(tmp_path, f"broken-{calls}", **sections)
        finish(config, stop=stop_after(calls + 8))
        finish(config, Run.open(config.out))
        assert adapter_bytes(config.out) == adapter_bytes(tmp_path / "straight")
    still = finish(recipe(tmp_path, "still", **sections | {"reference": {}}))
    assert losses(straight)[:2] == losses(still)[:2] and losses(straight)[2] != losses(still)[2]


def test_after_a_hard_update_the_policy_is_its_reference(tmp_path):
    """sync_alpha 1 after every step: every step starts at ln 2 with no margin."""
    config = recipe(tmp_path, reference={"sync_every": 1, "sync_alpha": 1.0})
    for values in steps_of(finish(config)):
        assert values["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(values["rewards/margins"]) < 1e-6


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        (
            {"reference": {"sync_every": 2, "model": "other"}},
            "reference.sync_every 2 mixes the policy into the weights",
        ),
        (
            {"reference": {"sync_every": 2}, "loss": {"name": "simpo"}},
            "reference.sync_every 2 has no effect: simpo asks no reference here",
        ),
    ],
)
def test_a_moving_reference_is_refused_where_there_is_none_to_move(tmp_path, sections, sentence):
    with pytest.raises(UserError) as error:
        finish(recipe(tmp_path, **sections))
    assert str(error.value).startswith(sentence) and not (tmp_path / "run").exists()


def test_a_mix_without_a_sync_is_refused():
    with pytest.raises(UserError, match=r"reference.sync_alpha 0.5 has no effect without reference.sync_every"):
        load_config(None, {"reference": {"sync_alpha": 0.5}})


def speaking(file, **columns):
    """The tiny pairs with more columns, each a function of the row's number."""
    rows = [json.loads(line) for line in write_pairs(file).read_text().splitlines()]
    for i, row in enumerate(rows):
        row |= {name: value(i) for name, value in columns.items()}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_rows_that_say_nothing_unusual_change_no_number(tmp_path):
    """Columns of these names count only where data.columns names them; the values that say nothing change nothing."""
    plain = finish(recipe(tmp_path, "plain"))
    said = {"p": lambda i: 1.0, "weight": lambda i: 1.0, "m": lambda i: 0.0}
    path = speaking(tmp_path / "said.jsonl", margin=lambda i: 7.0, probability=lambda i: "sure", **said)
    unnamed = finish(recipe(tmp_path, "unnamed", data={"path": path}))
    columns = {"probability": "p", "weight": "weight", "margin": "m"}
    named = finish(recipe(tmp_path, "named", data={"path": path, "columns": columns}))
    assert losses(unnamed) == losses(plain)
    assert losses(named) == pytest.approx(losses(plain), abs=1e-7)


def test_soft_labels_weights_and_margins_reach_the_step(tmp_path):
    """At the start every reward is 0, so the loss is known: ln 2 at p = 1/2 for ever; weights scale it; a margin m
    makes it log(1 + e^m)."""
    one = {"train": {"steps": 1}}
    half = speaking(tmp_path / "half.jsonl", p=lambda i: 0.5, w=lambda i: 0.5 if i % 2 else 1.5, m=lambda i: 2.0)
    two = {"train": {"steps": 2}}  # the second from where the first left off
    even = finish(recipe(tmp_path, "even", data={"path": half, "columns": {"probability": "p"}}, **two))
    assert [v["grad_norm"] for v in steps_of(even)] == pytest.approx([0.0, 0.0], abs=1e-5)
    bold = finish(recipe(tmp_path, "bold", data={"path": half, "columns": {"margin": "m"}}, **one))
    assert losses(bold) == pytest.approx([math.log(1 + math.exp(2))], rel=1e-5)
    heavy = finish(recipe(tmp_path, "heavy", data={"path": half, "columns": {"weight": "w"}}, **one))
    drawn = [round(value / math.log(2) * 4) for value in losses(heavy)]  # of 4 pairs, each worth 0.5 or 1.5
    assert losses(heavy)[0] == pytest.approx(math.log(2) * drawn[0] / 4, rel=1e-5) and 2 <= drawn[0] <= 6
    nothing = speaking(tmp_path / "nothing.jsonl", w=lambda i: 0.0)
    idle = finish(recipe(tmp_path, "idle", data={"path": nothing, "columns": {"weight": "w"}}, **two))
    assert losses(idle) == [0.0] * 2 and not any(v["grad_norm"] for v in steps_of(idle))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [(1.5, '"p" is 1.5; expected a probability from 0 to 1'), ("much", '"p" is text; expected a probability')],
)
def test_a_label_that_is_no_probability_is_a_bad_row(tmp_path, value, sentence):
    path = speaking(tmp_path / "bad.jsonl", p=lambda i: value if i == 4 else 0.9)
    with pytest.raises(UserError) as error:
        finish(recipe(tmp_path, data={"path": path, "columns": {"probability": "p"}}))
    assert str(error.value).startswith(f"{path}:5: ") or "bad.jsonl:5: " in str(error.value)
    assert sentence in str(error.value)


def test_a_row_of_several_pairs_cannot_say_whose_number_it_is(tmp_path):
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 2, 3], "w": 2.0}
    (tmp_path / "ranked.jsonl").write_text(json.dumps(row) + "\n")
    data = {"path": str(tmp_path / "ranked.jsonl"), "columns": {"weight": "w"}}
    with pytest.raises(UserError, match=r'ranked.jsonl:1: the row makes several pairs, so "w" belongs to none'):
        finish(recipe(tmp_path, data=data))


def test_thumbs_carry_weights(tmp_path):
    """Every row weighs 3: the loss before the first update is 3/2 instead of 1/2."""
    path = speaking(tmp_path / "heavy.jsonl", w=lambda i: 3.0)
    config = recipe(tmp_path, loss={"name": "kto"}, data={"path": path, "columns": {"weight": "w"}})
    assert losses(finish(config))[0] == pytest.approx(1.5, abs=1e-5)


def test_a_named_column_that_an_objective_cannot_use_is_refused(tmp_path):
    path = speaking(tmp_path / "said.jsonl", p=lambda i: 0.9)
    with pytest.raises(UserError, match=r"^data.columns probability does not apply to aot: it sorts the values"):
        finish(recipe(tmp_path, loss={"name": "aot"}, data={"path": path, "columns": {"probability": "p"}}))


def fell(per_token, count=4, length=20.0):
    column = lambda x: np.full(count, x)  # noqa: E731
    fall = per_token * length
    ends = (-40.0 - fall, -80.0, -40.0, -40.0, length, length)
    return Scored(column(0.1), *map(column, ends))


def test_falling_chosen_log_probs_are_told_once_with_what_counters_them():
    from mlxdpo.config import LossConfig
    from mlxdpo.losses import resolve

    watch = CollapseWatch(resolve(LossConfig()), heldout=True)
    assert watch.step(fell(9.0)) is None and watch.evaluation(fell(0.09)) is None
    said = watch.evaluation(fell(0.11))
    assert said.startswith("the chosen answers are 0.11 nats a token less likely than under the reference (held-out")
    for name in ("dpop", "apo_zero", "nca_pair", "sigmoid+sft"):
        assert name in said
    assert "kto" not in said and "orpo" not in said
    assert watch.evaluation(fell(0.5)) is None
    steps = CollapseWatch(resolve(LossConfig(name="ipo")), heldout=False)
    assert [steps.step(fell(0.2)) for _ in range(9)] == [None] * 9 and "last 10 steps" in steps.step(fell(0.2))
    for silent in (LossConfig(name="apo_down"), LossConfig(name="simpo")):
        assert CollapseWatch(resolve(silent), heldout=True).evaluation(fell(0.5)) is None
    assert (
        CollapseWatch(resolve(LossConfig()), heldout=True).evaluation(fell(0.5, length=3.0)) is None
    )  # 1.5 nats in all


def test_a_run_whose_chosen_answers_sink_says_so_once(tmp_path):
    sections = {"optim": {"lr": 0.05}, "loss": {"beta": 0.01}, "train": {"epochs": 3, "eval_every": 1}, "data": HELDOUT}
    notes = [text for text in notes_of(finish(recipe(tmp_path, **sections))) if "less likely" in text]
    assert len(notes) == 1 and "dpop" in notes[0]


def test_imitation_and_odds_are_reported():
    """Token means -2 and -3; odds e^-2/(1 - e^-2) and e^-3/(1 - e^-3)."""
    column = lambda *values: np.array(values, float)  # noqa: E731
    rows = Scored(column(1), column(-8), column(-9), column(0), column(0), column(4), column(3))
    found = LOSSES["orpo"].reports(rows)
    odds = lambda mean: math.log(math.exp(mean) / (1 - math.exp(mean)))  # noqa: E731
    assert found["nll_loss"] == 2 and found["log_odds_chosen"] == pytest.approx(odds(-2) - odds(-3))
    assert found["log_odds_ratio"] == pytest.approx(-math.log(1 + math.exp(odds(-3) - odds(-2))))
    assert LOSSES["cpo"].reports(rows) == {"nll_loss": 2.0}


def test_a_run_reports_what_its_objectives_do(tmp_path):
    events = finish(recipe(tmp_path, loss={"name": "sigmoid+sft"}, data=HELDOUT, train={"steps": 1}))
    step, start = steps_of(events)[0], next(e.values for e in events if e.kind == "eval")
    assert step["nll_loss"] > 0 and start["eval_nll_loss"] > 0
    assert start["eval_loss"] == pytest.approx(math.log(2) + start["eval_nll_loss"], rel=1e-5)


def test_metrics_of_thumbs():
    """Rewards of ups 1 and 3, of downs 1 and 0: of four couples three are won and one is a tie; kl mean of -1 and 3."""
    column = lambda *values: np.array(values, float)  # noqa: E731
    found = unpaired_metrics(
        Scored(
            column(0.1, 0.2, 0.3, 0.4), column(-9, -7, -9, -10), column(-11, -7, -11, -7), column(-10, -10, -10, -10),
            column(-10, -10, -10, -10), column(3, 3, 3, 3), column(3, 3, 3, 3), column(1, 1, 0, 0),
        ),
        0.5,
    )  # fmt: skip
    assert found["rewards/chosen"] == pytest.approx(0.5 * 2) and found["rewards/rejected"] == pytest.approx(0.5 * 0.5)
    assert found["rewards/margins"] == pytest.approx(0.75) and found["rewards/accuracies"] == pytest.approx(3.5 / 4)
    assert found["logps/chosen"] == -8 and found["kl"] == 1.0 and found["loss"] == pytest.approx(0.25)


def test_what_a_checkpoint_keeps_of_a_moving_reference_is_the_reference(tmp_path):
    """After a hard update that is the adapter of the same step."""
    finish(recipe(tmp_path, reference={"sync_every": 1, "sync_alpha": 1.0}, train={"save_every": 1}))
    last = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    saved, adapter = (mx.load(str(last / f"{name}.safetensors")) for name in ("reference", "adapters"))
    assert saved.pop("moved").item() and saved.keys() == adapter.keys()
    assert all(mx.array_equal(saved[name], array).item() for name, array in adapter.items())
