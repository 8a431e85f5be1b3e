"""Stages: each trains on its rows, refuses what means nothing in it, is one trajectory however cut, and goes on to the
bit; what the supervised stage leaves is where the next one starts."""

import json
import math
from pathlib import Path
from typing import get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from slow_cases import rest_slow
from tiny_runs import DEFAULTS, assert_same, finish, interrupted, losses, recipe, stop_after, write_pairs

from mlxdpo.cli import run as command
from mlxdpo.config import Config, load_config
from mlxdpo.forward.logprobs import next_token_logps
from mlxdpo.losses import resolve
from mlxdpo.model.adapters import attach_lora, load_adapter, load_arrays
from mlxdpo.model.policy import load_policy
from mlxdpo.runs import Run
from mlxdpo.training.plan import settled
from mlxdpo.training.stages import STAGES, stage_of
from mlxdpo.types import UserError

pytestmark = pytest.mark.usefixtures("cache")
KINDS = {
    "sft": {"stage": "sft"},
    "reward": {"stage": "reward"},
    "kto": {"loss": {"name": "kto"}},
    "apo_zero_unpaired": {"loss": {"name": "apo_zero_unpaired"}},
}


def made(folder, kind, out="run", **sections):
    given = {name: {**sections.get(name, {}), **values} for name, values in KINDS[kind].items() if name != "stage"}
    return recipe(folder, out, stage=KINDS[kind].get("stage", "dpo"), **(sections | given))


def test_the_schema_names_every_stage_and_one_that_no_recipe_can_run_is_refused():
    named = set(get_args(Config.model_fields["stage"].annotation))
    assert set(STAGES) <= named
    for other in named - set(STAGES):
        with pytest.raises(UserError, match=f"stage {other}"):
            stage_of(load_config(None, {"stage": other}))


@pytest.mark.parametrize("stage", [name for name, stage in STAGES.items() if stage.rate is not None])
def test_a_stage_brings_its_rate_and_every_source_wins_over_it(stage, tmp_path):
    open_recipe = load_config(None, {"stage": stage})
    assert open_recipe.optim.lr == "auto" == load_config(None).optim.lr
    assert settled(open_recipe, STAGES[stage].rate, 1.0).optim.lr == STAGES[stage].rate
    (tmp_path / "r.yaml").write_text("optim: {lr: 3e-3}\n")
    given = load_config(tmp_path / "r.yaml", {"stage": stage})
    assert given.optim.lr == 3e-3 and settled(given, STAGES[stage].rate, 1.0) == given.model_copy(
        update={"train": given.train.model_copy(update={"epochs": 1.0})}
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"stage": "sft", "loss": {"beta": 0.2}}, r"loss.beta 0.2 has no meaning in stage sft; drop it"),
        ({"stage": "sft", "reference": {"model": "m"}}, r"reference.model m has no meaning in stage sft"),
        ({"stage": "reward", "loss": {"name": "ipo"}}, r"loss.name ipo has no meaning in stage reward"),
        ({"stage": "dpo", "reward": {"center": 0.01}}, r"reward.center 0.01 has no meaning in stage dpo"),
        ({"stage": "sft", "reward": {"margin": 1}}, r"reward.margin 1.0 has no meaning in stage sft"),
    ],
)
def test_a_knob_without_meaning_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        stage_of(load_config(None, given))


def test_an_unknown_stage_names_the_known_ones():
    with pytest.raises(UserError, match="'dpo', 'sft'"):
        load_config(None, {"stage": "grpo"})
    with pytest.raises(UserError):
        load_config(None, {"stage": ["sft"]})


def plain_nll(model, rows):
    """-mean over all completion tokens, each row alone, whole and unpadded."""
    logps, count = mx.array(0.0), 0
    for prompt, completion in rows:
        tokens = mx.array(np.concatenate([prompt, completion]))[None]
        logps = logps + next_token_logps(model, tokens)[0, len(prompt) - 1 :].sum()
        count += len(completion)
    return -logps / count


def test_the_supervised_step_is_the_mean_over_completion_tokens(tmp_path):
    """Loss and gradient of the first step against a plain computation: prompts masked, chosen completions alone."""
    every = {
        "train": {"batch_size": 4, "gradient_accumulation": 5, "steps": 1},
        "optim": {"name": "sgd", "max_grad_norm": 0.0, "lr": 1e-2},
    }
    config = made(tmp_path, "sft", **every)
    events = finish(config)
    data = next(event.values["data"] for event in events if event.kind == "start")
    policy = load_policy(config.model)
    attach_lora(policy.model, config.lora, config.train.seed)
    rows = [(e.prompt, e.chosen) for e in data.train]
    value, gradients = nn.value_and_grad(policy.model, lambda model: plain_nll(model, rows))(policy.model)
    [step] = [event.values for event in events if event.kind == "step"]
    assert step["loss"] == pytest.approx(value.item(), rel=1e-5)
    start = dict(tree_flatten(policy.model.trainable_parameters()))
    load_arrays(policy.model, Path(config.out) / "adapter")
    moved = dict(tree_flatten(policy.model.trainable_parameters()))
    for name, slope in tree_flatten(gradients):
        found, scale = (start[name] - moved[name]) / 1e-2, mx.abs(slope).max().item() + 1e-4
        assert mx.abs(found - slope).max().item() < 2e-3 * scale + 1e-5, name


def test_the_supervised_stage_counts_its_tokens_once_and_speaks_of_no_rewards(tmp_path):
    events = finish(made(tmp_path, "sft", data={"eval_fraction": 0.3}))
    data = next(event.values["data"] for event in events if event.kind == "start")
    last = [event.values for event in events if event.kind == "step"][-1]
    assert last["num_tokens"] == sum(len(e.prompt) + len(e.chosen) for e in data.train)
    assert not [name for name in last if "reward" in name or "reject" in name]
    held = [event.values for event in events if event.kind == "eval"]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_however_a_window_is_cut_it_is_one_trajectory(tmp_path, kind):
    """8 x 1 = 2 x 4: the mean over tokens, the KL term and the rewards are those of the whole step."""
    runs = []
    for size, accumulate in ((8, 1), (2, 4)):
        config = made(
            tmp_path, kind, f"run{size}", train={"batch_size": size, "gradient_accumulation": accumulate, "steps": 3}
        )
        runs.append(losses(finish(config)))
    assert len(runs[0]) >= 2
    assert np.allclose(runs[0], runs[1], rtol=2e-4)


HARD = {
    "lora": DEFAULTS["lora"] | {"dropout": 0.1},
    "data": DEFAULTS["data"] | {"eval_fraction": 0.4},
    "train": DEFAULTS["train"] | {"epochs": 2, "eval_every": 2, "save_every": 3},
}


@pytest.mark.parametrize("kind", rest_slow(list(KINDS), list(KINDS)[:2]))
def test_stopped_and_resumed_it_is_the_straight_run(tmp_path, kind):
    straight, asked = made(tmp_path, kind, "straight", **HARD), iter(range(10**6))
    finish(straight, stop=lambda: next(asked) < 0)
    last = next(asked)  # questions in a run that is not stopped
    steps = len([line for line in Run(Path(straight.out)).metrics() if "loss" in line])
    assert steps >= 4
    for number, calls in enumerate((last // 2, last - 2) if kind == "kto" else (last // 2,)):
        run, _ = interrupted(made(tmp_path, kind, f"run{number}", **HARD), stop_after(calls))
        finish(run.config(), run)
        assert_same(run.path, Path(straight.out))
        if kind == "reward":
            heads = [(Path(path) / "head.safetensors").read_bytes() for path in (run.path, straight.out)]
            assert heads[0] == heads[1]


def test_what_was_imitated_is_the_next_stage_s_reference(tmp_path):
    """DPO from the supervised adapter starts at ln 2: its reference includes that adapter, and so is the imitator."""
    first = made(tmp_path, "sft", "sft")
    finish(first)
    adapter = str(Path(first.out) / "adapter")
    second = recipe(tmp_path, "dpo", model={"adapter": adapter})
    events = finish(load_config(None, second.model_dump(exclude_unset=True, exclude={"lora"})))
    assert losses(events)[0] == pytest.approx(math.log(2), abs=1e-5)
    manifest = Run(Path(second.out)).manifest()
    assert manifest["reference_source"]["adapter"] == adapter and manifest["reference"]["adapter"]
    before, imitator = load_policy(first.model).model, load_policy(first.model).model
    load_adapter(imitator, Path(adapter))
    data = next(event.values["data"] for event in events if event.kind == "start")
    rows = [(e.prompt, e.chosen) for e in data.train]
    assert plain_nll(imitator, rows).item() < plain_nll(before, rows).item()


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_demonstrations_of_every_shape_train(tmp_path, template):
    shapes = {
        "completion": [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(4)],
        "conversation": [
            {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(4)
        ],
    }
    for name, rows in shapes.items():
        if name == "conversation" and template == "plain":
            continue
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        events = finish(made(tmp_path, "sft", f"{name}-{template}", data={"path": str(file), "template": template}))
        assert [event.kind for event in events][-1] == "done" and len(losses(events)) == 1


def test_thumbs_are_counted_and_shown_and_train_from_rows(tmp_path, capsys):
    """From the command line: both kinds counted, the balance said, a first row shown as what it is."""
    write_pairs(tmp_path / "pairs.jsonl")
    rows = [
        {"prompt": f"q{n}:", "completion": f" {'good' if n % 3 else 'bad'} {n}", "label": bool(n % 3)}
        for n in range(12)
    ]
    file = tmp_path / "thumbs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(tmp_path)
    words = ["train", "--model", config.model.path, "--data", str(file), "--data.template", "plain"]
    words += [
        "--data.eval-fraction",
        "0.25",
        "--loss.name",
        "kto",
        "--train.steps",
        "2",
        "--out",
        str(tmp_path / "kto"),
    ]
    assert command(words) == 0
    shown = capsys.readouterr().out
    assert "thumbs up and" in shown and "held out)" in shown
    assert "thumb down: " in shown or "thumb up: " in shown
    assert "completion of another prompt, for the KL term" in shown
    assert resolve(Run(tmp_path / "kto").config().loss).mismatched


@pytest.mark.parametrize("kind", ["sft", "kto"])
def test_plan_reads_what_the_stage_reads(tmp_path, kind, capsys):
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "label": True} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(tmp_path)
    words = ["plan", "--model", config.model.path, "--data", str(tmp_path / "rows.jsonl"), "--data.template", "plain"]
    words += ["--stage", "sft"] if kind == "sft" else ["--loss.name", "kto"]
    assert command(words) == 0, capsys.readouterr()
