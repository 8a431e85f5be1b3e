"""The reward model: its loss, its number for a row, its gradients, and what is left of it when it is opened again."""

import json
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from levels_of import rewards_at
from mlx.utils import tree_flatten
from slow_cases import rest_slow
from tiny_models import tiny_model
from tiny_runs import finish, recipe, write_pairs

from mlxdpo import open_reward_model
from mlxdpo.config import DataConfig, LoraConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.report import Report
from mlxdpo.data.transforms import with_end
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.forward.reward_head import NAME, attach_head, normed_states
from mlxdpo.losses.reward import bradley_terry, reward_loss, start_bradley_terry
from mlxdpo.model.adapters import attach_lora, load_run
from mlxdpo.runs import Run
from mlxdpo.types import Example, Message, Pairs, UserError
from mlxdpo_eval.judges import AnswerPair, Question, ask_both, open_judge

COUNT, MARGIN, CENTER = 6, 0.3, 0.05
KINDS = ("llama", "qwen3", "gemma2", "gemma3_text")


def pairs_of(chosen, rejected, margin=None):
    nothing = mx.zeros(len(chosen))
    both = mx.array(chosen, mx.float32), mx.array(rejected, mx.float32)
    said = None if margin is None else mx.array(margin, mx.float32)
    return Pairs(*both, nothing, nothing, nothing + 1, nothing + 1, margin=said)


def wide(chosen, rejected, margin, center):
    """Value and both slopes of one pair in float64, by hand: with x = r_w - r_l - m the first term is log(1 + e^-x),
    whose slope in r_w is -1/(1 + e^x); the second's slope is 2c(r_w + r_l) in both."""
    x = np.asarray(chosen, np.float64) - rejected - margin
    pull, both = -np.exp(-np.logaddexp(0, x)), np.asarray(chosen, np.float64) + rejected
    return np.logaddexp(0, -x) + center * both**2, pull + 2 * center * both, -pull + 2 * center * both


@pytest.mark.parametrize("own", [None, [0.5, 0.0, 2.0, 0.0]])
def test_value_and_slopes_equal_the_closed_form(own):
    chosen, rejected = [1.5, -2.0, 30.0, 0.0], [0.25, 1.0, -40.0, 0.0]
    margin = MARGIN + np.array(own or 0.0)
    want = wide(chosen, rejected, margin, CENTER)
    pairs = pairs_of([0] * 4, [0] * 4, own)

    def call(c, r):
        return bradley_terry(pairs._replace(chosen=c, rejected=r), margin=MARGIN, center=CENTER)

    c, r = mx.array(chosen), mx.array(rejected)
    slopes = mx.grad(lambda c, r: call(c, r).sum(), argnums=(0, 1))(c, r)
    for got, expected in zip((call(c, r), *slopes), want, strict=True):
        assert np.allclose(np.array(got), expected, rtol=1e-5, atol=1e-7)


def test_by_hand():
    """r = 1 and 0, margin 1, center 0.1: log 2 + 0.1 * 1. Equal rewards 2 and 2 without either: log 2."""
    assert bradley_terry(pairs_of([1], [0]), margin=1.0, center=0.1).item() == pytest.approx(math.log(2) + 0.1)
    assert bradley_terry(pairs_of([2], [2])).item() == pytest.approx(math.log(2))
    assert start_bradley_terry(margin=0.0, center=1.0) == pytest.approx(math.log(2))


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_far_rewards_stay_finite(gap):
    call = lambda c: bradley_terry(pairs_of([0], [0])._replace(chosen=c)).sum()  # noqa: E731
    value, slope = mx.value_and_grad(call)(mx.array([gap]))
    assert value.item() == pytest.approx(max(-gap, 0.0)) and slope.item() == pytest.approx(-1.0 if gap < 0 else 0.0)


def test_only_differences_count_without_centring_and_a_swap_mirrors_the_slope():
    shifted, plain = pairs_of([3.0], [2.0]), pairs_of([1.0], [0.0])
    assert bradley_terry(shifted).item() == pytest.approx(bradley_terry(plain).item())
    assert bradley_terry(shifted, center=0.1).item() > bradley_terry(plain, center=0.1).item()


@pytest.fixture(scope="module")
def examples():
    """Prompts of 2 to 40 tokens (so that some share a prefix and some do not), completions of 1 to 9."""
    draw = np.random.default_rng(3)
    ids = lambda low, high: draw.integers(1, 300, draw.integers(low, high)).astype(np.int32)  # noqa: E731
    made = [Example(ids(33, 41), ids(1, 10), ids(1, 10), f"row {i}") for i in range(COUNT)]
    short = [replace(e, prompt=e.prompt[:2], where="short") for e in made[:2]]
    return made, short


def rewarded(kind="llama", seed=0):
    """A tiny model with adapters and a head that both matter."""
    model = attach_head(attach_lora(tiny_model(kind), LoraConfig(rank=4)))
    mx.random.seed(seed + 1)
    arrays = [(n, p + mx.random.normal(p.shape) * 0.05) for n, p in tree_flatten(model.trainable_parameters())]
    model.load_weights(arrays, strict=False)
    return model


def one_by_one(model, examples):
    """(N, 2) rewards: every row alone, whole, without padding, the state of its very last token."""
    head = model[NAME].weight[0]
    rows = [[np.concatenate([e.prompt, c]) for c in (e.chosen, e.rejected)] for e in examples]
    return mx.stack([mx.stack([normed_states(model, mx.array(r)[None])[0, -1] @ head for r in both]) for both in rows])


def batch_of(examples):
    longer = list(with_end(examples, DataConfig(), Report()))
    return collate(longer, tuple(range(len(longer))), len(longer) + 1)


@pytest.mark.parametrize("kind", rest_slow(list(KINDS), list(KINDS)[:2]))
def test_rewards_and_gradients_are_those_of_whole_rows(kind, examples):
    """Shared prefix, packed rows, checkpoints, plain padded rows: one number, that of each row run alone."""
    model = rewarded(kind)
    for some in (*examples, [*examples[0], *examples[1]]):
        batch = batch_of(some)

        def loss(model, forward, batch=batch):
            pairs = score_pairs(model, batch, forward)
            return (bradley_terry(pairs, margin=MARGIN, center=CENTER) * batch.weight).sum()

        def plain(model, some=some):
            both = one_by_one(model, some)
            return bradley_terry(
                pairs_of([0] * len(some), [0] * len(some))._replace(chosen=both[:, 0], rejected=both[:, 1]),
                margin=MARGIN,
                center=CENTER,
            ).sum()

        want_value, want = nn.value_and_grad(model, plain)(model)
        wanted = dict(tree_flatten(want))
        for forward in (*map(rewards_at, ("head", "prefix", None)), rewards_at(checkpoint=True)):
            value, gradients = nn.value_and_grad(model, loss)(model, forward)
            assert value.item() == pytest.approx(want_value.item(), rel=1e-5)
            for name, found in tree_flatten(gradients):
                scale = mx.abs(wanted[name]).max().item() + 1e-6
                assert mx.abs(found - wanted[name]).max().item() < 1e-4 * scale, name


def test_the_head_starts_at_zero_and_so_do_all_rewards(examples):
    model = attach_head(tiny_model())
    found = rewards_at()(model, batch_of(examples[0]))
    assert not np.array(found).any()
    assert reward_loss(0.0, 0.01).start() == pytest.approx(math.log(2))


def test_a_soft_label_has_no_place():
    with pytest.raises(UserError, match=r"data\.columns probability does not apply in stage reward"):
        reward_loss(0.0, 0.0, ["probability"])


TRAINED = {"data": {"eval_fraction": 0.3}, "optim": {"lr": 1e-2}, "train": {"epochs": 3, "eval_every": 2}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of stage reward: its folder and its events."""
    folder = tmp_path_factory.mktemp("reward")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        return Run(folder / "run"), finish(recipe(folder, stage="reward", **TRAINED))


def rows_of(run):
    """Prompt, chosen, rejected of every row of the recipe's file."""
    file = run.config().data.path
    with open(file) as lines:
        return [json.loads(line) for line in lines]


def test_a_run_says_what_trl_says_and_learns(trained):
    _, events = trained
    steps = [event.values for event in events if event.kind == "step"]
    held = [event.values for event in events if event.kind == "eval"]
    assert {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward", "grad_norm"} <= steps[0].keys()
    assert not [name for name in steps[0] if name.startswith(("rewards/", "logps/"))]
    assert held[0]["eval_loss"] == pytest.approx(math.log(2)) and held[0]["eval_accuracy"] == 0.5
    assert steps[-1]["accuracy"] == 1.0 and steps[-1]["loss"] < 0.5 * steps[0]["loss"]


def test_opened_again_it_gives_the_rewards_it_was_trained_to(trained):
    """The last held-out evaluation again, out of the files: accuracy, margin and mean of all rewards."""
    run, events = trained
    last = [event.values for event in events if event.kind == "eval"][-1]
    data = next(event.values["data"] for event in events if event.kind == "start")
    at = [int(example.where.rpartition(":")[2]) - 1 for example in data.heldout]
    rows = [rows_of(run)[i] for i in at]
    model = open_reward_model(run, batch_size=3)
    chosen, rejected = (model([r["prompt"] for r in rows], [r[side] for r in rows]) for side in ("chosen", "rejected"))
    assert np.mean(chosen > rejected) == pytest.approx(last["eval_accuracy"])
    assert np.mean(chosen - rejected) == pytest.approx(last["eval_margin"], abs=1e-4)
    for name in ("min", "mean", "max"):
        found = getattr(np.concatenate([chosen, rejected]), name)()
        assert found == pytest.approx(last[f"eval_{name}_reward"], abs=1e-4)


@pytest.mark.parametrize("method", ["dora", "full"])
def test_whatever_is_trained_comes_back(tmp_path, cache, method):
    """DoRA and every weight: the mean of the held-out rewards, out of the files."""
    lora = {"method": method} | ({} if method == "full" else {"rank": 2})
    sections = {"data": {"eval_fraction": 0.3}, "optim": {"lr": 1e-3}, "train": {"steps": 2}, "lora": lora}
    events = finish(recipe(tmp_path, stage="reward", **sections))
    run, last = Run(tmp_path / "run"), [event.values for event in events if event.kind == "eval"][-1]
    data = next(event.values["data"] for event in events if event.kind == "start")
    rows = [rows_of(run)[int(example.where.rpartition(":")[2]) - 1] for example in data.heldout]
    model = open_reward_model(run)
    found = [model([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")]
    assert np.mean(found) == pytest.approx(last["eval_mean_reward"], abs=1e-5) and np.abs(found).max() > 1e-4


def test_rewards_do_not_depend_on_company_and_an_empty_answer_has_none(trained):
    run, _ = trained
    texts = [row["chosen"] for row in rows_of(run)[:5]]
    prompts = [row["prompt"] for row in rows_of(run)[:5]]
    model = open_reward_model(run)
    together, alone = (
        model(prompts, texts),
        np.concatenate([model([p], [t]) for p, t in zip(prompts, texts, strict=True)]),
    )
    assert np.allclose(together, alone, atol=1e-5)
    long = model([prompts[0]], [" red" * 500])  # longer than data.max_length: judged by what fits
    assert np.isfinite(long).all() and model([], []).shape == (0,)
    chat = model([(Message("user", "hi"),)], ["red"])
    assert np.isfinite(chat).all()
    with pytest.raises(ValueError, match="shorter"):
        model(prompts, texts[:2])


def test_the_adapter_folder_is_one_like_any_other(trained):
    """The head stands beside it: adapter/ holds adapters alone, as mlx-lm wants it."""
    run, _ = trained
    assert not [name for name in mx.load(str(run.adapter / "adapters.safetensors")) if NAME in name]
    assert (run.path / "head.safetensors").exists()
    with pytest.raises(UserError, match="a reward model writes no text"):
        load_run(run)


def test_it_is_a_judge(trained):
    """The logit of a verdict is the difference of two rewards, in either order; equal answers are a tie."""
    run, _ = trained
    judge, row = open_judge(f"reward:{run.path}"), rows_of(run)[0]
    first, second = judge.ask([Question(row["prompt"], row["chosen"], row["rejected"])] * 2)[:2]
    values = judge.scores([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
    assert first.logit == second.logit == pytest.approx(values[0] - values[1])
    trio = AnswerPair(row["prompt"], row["rejected"], row["chosen"])
    both, same = ask_both(judge, [trio, trio._replace(before=row["chosen"])])
    assert both.logit == pytest.approx(values[0] - values[1]) and same.equal
    assert judge.ask([]) == [] and judge.name == "reward:run"


def test_what_is_no_reward_model_is_refused(tmp_path, cache):
    write_pairs(tmp_path / "pairs.jsonl", 4)
    finish(recipe(tmp_path))
    with pytest.raises(UserError, match="a run of stage dpo is not a reward model"):
        open_reward_model(Run(tmp_path / "run"))
