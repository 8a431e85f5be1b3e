"""Strength and averages: exact in the weights, nothing at 1, the untuned model at 0; what has none is refused."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_runs import adapter_bytes, copied, finish, recipe, trained

from mlxdpo.cli import run as command
from mlxdpo.inference.mixtures import at_strengths, merge_runs, run_at
from mlxdpo.inference.trained_run import open_trained_run
from mlxdpo.io.json_file import read_json
from mlxdpo.model.adapters import load_run, load_start, read_settings
from mlxdpo.model.strength import scaled
from mlxdpo.runs import Run, with_length
from mlxdpo.types import UserError

pytestmark = pytest.mark.usefixtures("cache")
TOKENS = mx.array([[5, 9, 2, 77, 31, 8]])
FAST = {"optim": {"lr": 2e-2}}


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


def deltas(run):
    """What a run's adapter adds to each weight, float64, from its files."""
    saved = mx.load(str(run.adapter / "adapters.safetensors"))
    arrays = {name: np.array(a.astype(mx.float32), np.float64) for name, a in saved.items()}
    scale = read_settings(run.adapter).multiplier
    ends = [name.removesuffix("lora_a") for name in arrays if name.endswith("lora_a")]
    return {name: scale * arrays[f"{name}lora_a"] @ arrays[f"{name}lora_b"] for name in ends}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder with a run, trained once."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder.with_name("once-cache")))
        trained(folder, **FAST)
    return folder


@pytest.fixture
def run(once, tmp_path):
    """A copy to change."""
    return copied(once, tmp_path)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.7])
def test_strength_scales_the_product(run, strength):
    other = run_at(run, strength)
    own = deltas(run)
    for name, delta in deltas(other).items():
        np.testing.assert_allclose(delta, strength * own[name], rtol=1e-6, atol=1e-12)
    tuned = load_run(run).model
    with scaled(tuned, strength) as model:
        np.testing.assert_allclose(logits(load_run(other).model), logits(model), atol=1e-6)


def test_at_one_nothing_is_made_and_at_zero_it_is_the_base_to_the_bit(run):
    assert run_at(run, 1.0) is run and not (run.path / "strengths").exists()
    start, tuned = logits(load_start(run).model), load_run(run).model
    before = logits(tuned)
    assert not np.array_equal(start, before)
    with scaled(tuned, 1.0) as model:
        assert logits(model).tobytes() == before.tobytes()
    with scaled(tuned, 0.0) as model:
        assert logits(model).tobytes() == start.tobytes()
    with scaled(tuned, 0.5) as model:
        assert not np.array_equal(logits(model), before)
    assert logits(tuned).tobytes() == before.tobytes()
    assert np.array_equal(logits(load_run(run_at(run, 0.0)).model), start)


def test_a_run_that_began_from_an_adapter_moves_from_there(tmp_path, run):
    config = recipe(tmp_path, "second", model={"adapter": str(run.adapter)}, **FAST)
    finish(config)
    second = Run.open(config.out)
    assert np.array_equal(logits(load_run(run_at(second, 0.0)).model), logits(load_start(second).model))
    first, last, half = deltas(run), deltas(second), deltas(run_at(second, 0.5))
    for name, delta in half.items():
        np.testing.assert_allclose(delta, (first[name] + last[name]) / 2, atol=1e-7)
    assert read_settings(run_at(second, 0.5).adapter).rank == 2 * read_settings(run.adapter).rank
    opened = open_trained_run(run_at(second, 0.5))
    with opened.start() as model:
        np.testing.assert_allclose(logits(model), logits(load_run(run).model), atol=1e-5)


def test_every_weight_is_interpolated(tmp_path):
    run = trained(tmp_path, lora={"method": "full", "rank": 4}, optim={"lr": 1e-3})
    start = dict(tree_flatten(load_start(run).model.parameters()))
    tuned = dict(tree_flatten(load_run(run).model.parameters()))
    half = dict(tree_flatten(load_run(run_at(run, 0.5)).model.parameters()))
    for name, array in half.items():
        np.testing.assert_allclose(np.array(array), (np.array(start[name]) + np.array(tuned[name])) / 2, atol=1e-7)
    assert np.array_equal(logits(load_run(run_at(run, 0.0)).model), logits(load_start(run).model))
    assert [strength for strength, _ in at_strengths(run, [0.5, 1.0])] == [0.5, 1.0]


def test_dora_has_no_strength(tmp_path):
    run = trained(tmp_path, lora={"method": "dora"})
    for refused in (
        lambda: run_at(run, 0.5),
        lambda: next(at_strengths(run, [0.5])),
        lambda: merge_runs([run] * 2, tmp_path / "a"),
    ):
        with pytest.raises(UserError, match=r"lora\.method dora trains row magnitudes separately from the product"):
            refused()
    assert run_at(run, 1.0) is run


@pytest.mark.parametrize("strength", [-0.1, float("inf"), float("nan")])
def test_what_is_no_strength(run, strength):
    with pytest.raises(UserError, match="expected 0"):
        run_at(run, strength)


def test_trained_on_the_strength_is_made_again(run, tmp_path):
    first = adapter_bytes(run_at(run, 0.5).path)
    assert adapter_bytes(run_at(run, 0.5).path) == first
    finish(with_length(run.config(), {"epochs": 2}), run)
    assert adapter_bytes(run_at(run, 0.5).path) != first


def test_an_average_is_the_weighted_sum_of_what_the_runs_add(tmp_path, run):
    others = [trained(tmp_path, f"seed{n}", train={"seed": n}, lora={"rank": 2 + n}, **FAST) for n in (1, 2)]
    runs, shares = [run, *others], [0.5, 0.3, 0.2]
    made = merge_runs(runs, tmp_path / "average", shares)
    own = [deltas(one) for one in runs]
    for name, delta in deltas(made).items():
        expected = sum(share * one[name] for share, one in zip(shares, own, strict=True))
        np.testing.assert_allclose(delta, expected, atol=1e-7)
    assert read_settings(made.adapter).rank == 4 + 3 + 4
    assert [one["run"] for one in made.manifest()["made_of"]["runs"]] == ["run", "seed1", "seed2"]
    assert open_trained_run(made).run.path == made.path
    again = merge_runs([run, run], tmp_path / "twice")
    np.testing.assert_allclose(logits(load_run(again).model), logits(load_run(run).model), atol=1e-5)


def test_one_run_with_its_base_is_that_run_at_a_strength(tmp_path, run):
    made = merge_runs([run], tmp_path / "half", [0.5])
    assert made.manifest()["made_of"]["strength"] == 0.5
    assert np.array_equal(logits(load_run(made).model), logits(load_run(run_at(run, 0.5)).model))


@pytest.mark.parity
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_merges_by_name_are_peft_s_own(method, tmp_path, run):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    runs = [run, trained(tmp_path, "seed1", train={"seed": 1}, **FAST)]
    made = merge_runs(runs, tmp_path / "merged", [1.0, 0.5], method, density=1.0)
    own, kept = [deltas(one) for one in runs], made.manifest()["made_of"]["kept"]
    far = whole = 0.0
    for name, delta in deltas(made).items():
        tensors = [torch.from_numpy(np.array(one[name])) for one in own]
        expected = getattr(theirs, method)(tensors, torch.tensor([1.0, 0.5]), 1.0).numpy()
        far, whole = far + float(((delta - expected) ** 2).sum()), whole + float((expected**2).sum())
    assert 0 < kept <= 1 + 1e-6 and far / whole == pytest.approx(1 - kept, abs=1e-4)


def test_what_cannot_be_averaged(tmp_path, run):
    other = trained(tmp_path, "other", lora={"keys": ["self_attn.q_proj"]})
    full = trained(tmp_path, "full", lora={"method": "full", "rank": 4})
    plain = trained(tmp_path, "plain", model={"dtype": "float32"})
    refusals = {
        "adapts other layers than": [run, other],
        "one run is not enough to merge": [run],
        "trained every weight": [plain, full],
    }
    for words, runs in refusals.items():
        with pytest.raises(UserError, match=words):
            merge_runs(runs, tmp_path / "no")
    with pytest.raises(UserError, match=r"--weight: 1 for 2 runs; give a number for each run"):
        merge_runs([run, run], tmp_path / "no", [1.0])
    with pytest.raises(UserError, match=r"--density is 0; expected a share"):
        merge_runs([run, run], tmp_path / "no", method="ties", density=0)
    assert not (tmp_path / "no").exists()


def test_what_was_not_trained_is_not_trained_on(run):
    other = run_at(run, 0.5)
    with pytest.raises(UserError, match="is made of other runs and was not trained"):
        finish(other.config(), other)


def test_runs_that_held_out_different_pairs_hold_out_none_together(tmp_path):
    runs = []
    for seed in (0, 1):
        config = recipe(tmp_path, f"seed{seed}", data={"eval_fraction": 0.4}, train={"seed": seed})
        finish(config)
        runs.append(Run.open(config.out))
    assert merge_runs(runs, tmp_path / "average").config().data.eval_fraction == 0
    assert merge_runs([runs[0]] * 2, tmp_path / "same").config().data.eval_fraction == 0.4


SHORT = ["--prompts", "3", "--samples", "1", "--max-tokens", "3"]


def test_the_commands_take_it(run, capsys, tmp_path):
    name = str(run.path)
    answer = lambda *more: command(["generate", name, "--prompt", "q1", "--max-tokens", "4", *more])  # noqa: E731
    assert answer("--before") == 0 and answer("--strength", "0") == 0
    before, at_zero = capsys.readouterr().out.splitlines()
    assert before == at_zero
    assert answer("--before", "--strength", "0.5") == 2
    assert command(["export", name, "--to", "mlx,fused", "--out", str(tmp_path / "out"), "--strength", "0.5"]) == 0
    record, card = read_json(tmp_path / "out" / "export.json"), (tmp_path / "out" / "README.md").read_text()
    assert record["strength"] == 0.5 and "strength 0.5 of run" in card
    assert all(target["fidelity"]["passed"] for target in record["targets"].values())
    assert command(["export", name, "--to", "mlx", "--out", str(tmp_path / "no"), "--strength", "0"]) == 2
    assert command(["eval", name, "--strength", "0.5", *SHORT]) == 0
    assert not (run.path / "eval").exists() and list(run.path.glob("strengths/run-strength-0.5/eval/results_*.json"))
    assert command(["frontier", name, "--judge", "longest", "--strength", "0.5", "--strength", "2", *SHORT]) == 0
    assert "strength 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("judge", [(), ("--judge", "longest")])
def test_the_dial_is_swept_and_one_is_recommended(run, capsys, judge):
    words = ["dial", str(run.path), "--strength", "0", "--strength", "1", "--strength", "2"]
    assert command([*words, *judge, *SHORT]) == 0
    assert "* take strength" in capsys.readouterr().out
    found = read_json(run.path / "eval" / "dial.json")
    zero, one, two = found["points"]
    assert zero["kl"] == 0 and zero["margin"] == 0 and zero["accuracy"] == 0.5
    assert zero["loss"] == pytest.approx(np.log(2))
    assert 0 < one["kl"] < two["kl"]
    assert (one["win_rate"] is None) == (not judge) and found["recommended"] in (0, 1, 2)
    assert "every smaller one" not in found["reason"] or found["recommended"] > 0
    assert command([*words[:4], *SHORT]) == 2
