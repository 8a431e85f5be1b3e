"""A pair that computes to NaN or infinity stops the run, is named by file and line, and touches nothing."""

import importlib
import json
import math

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny_runs import adapter_bytes, finish, recipe
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.data.planning import outline, plan_epoch
from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint, preflight, step
from mlxdpo.training.step import NonFiniteError
from mlxdpo.types import UserError

story = importlib.import_module("mlxdpo.training.run")

pytestmark = pytest.mark.usefixtures("cache")
POISON = "~"  # a character of no other row
LINE = 12


def poisoned(folder, value, line=LINE, **sections):
    """A recipe whose pair on `line` holds a token whose embedding row is `value`."""
    config = recipe(folder, **sections)
    pairs = folder / "pairs.jsonl"
    rows = [json.loads(text) for text in pairs.read_text().splitlines()]
    rows[line - 1]["rejected"] += POISON + " no"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights = folder / "llama" / "model.safetensors"
    arrays = mx.load(str(weights))
    embedding = arrays["model.embed_tokens.weight"]
    # Untied, so that only rows that read the token meet the value.
    arrays["lm_head.weight"] = mx.array(embedding)
    embedding[chatml_tokenizer().convert_tokens_to_ids(POISON)] = value
    mx.eval(arrays)
    mx.save_safetensors(str(weights), arrays)
    settings = folder / "llama" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tie_word_embeddings": False}))
    return config


def poisoned_step(config):
    """The step (from 0) whose window holds the poisoned pair, and whether it opens the run's first batch."""
    events = story.train(config.model_copy(update={"out": f"{config.out}-look"}))
    data = next(events).values["data"]
    plan = plan_epoch(outline(data.train, "prompt"), 2, 2, config.train.seed, 0)
    index = next(i for i, e in enumerate(data.train) if e.where.endswith(f":{LINE}"))
    return next(n for n, window in enumerate(plan.windows) if any(index in batch for batch in window))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_pair_is_named_and_the_weights_are_those_of_the_step_before(tmp_path, monkeypatch, value):
    config = poisoned(tmp_path, value, train={"save_every": 1, "seed": 3})
    at, seen, check = poisoned_step(config), {}, preflight.check_start
    assert at >= 1  # there is something before it to keep
    monkeypatch.setattr(preflight, "check_start", lambda job: (seen.update(model=job.model), check(job)))
    with pytest.raises(NonFiniteError) as error:
        finish(config)
    assert str(error.value).startswith(f"the log-prob or loss is not a finite number at pairs.jsonl:{LINE};")
    run = Run.open(config.out)
    assert not run.adapter.exists()
    last = checkpoint.steps(run.checkpoints)[-1]
    assert last.name == f"step-{at:06d}" and [m["step"] for m in run.metrics()] == list(range(1, at + 1))
    saved = mx.load(str(last / "adapters.safetensors"))
    live = dict(tree_flatten(seen["model"].trainable_parameters()))
    assert all(mx.array_equal(saved[name], live[name]).item() for name in saved) and saved.keys() == live.keys()
    assert all(mx.isfinite(array).all().item() for array in saved.values())


def test_mending_the_row_is_another_run_and_skipping_ahead_is_refused(tmp_path):
    config = poisoned(tmp_path, float("nan"), train={"save_every": 1, "seed": 3})
    with pytest.raises(NonFiniteError):
        finish(config)
    run = Run.open(config.out)
    with pytest.raises(NonFiniteError, match=rf"pairs.jsonl:{LINE};"):
        finish(run.config(), run)  # the same inputs stop at the same pair


def test_a_held_out_pair_is_named_before_training(tmp_path):
    config = poisoned(tmp_path, float("inf"))
    lines = (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(lines[: LINE - 1]))
    (tmp_path / "held.jsonl").write_text("".join(lines[LINE - 1 :]))
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": str(tmp_path / "held.jsonl")})})
    with pytest.raises(NonFiniteError, match=r"not a finite number at .*held.jsonl:1;"):
        finish(config)
    assert list(read_lines(tmp_path / "run" / "metrics.jsonl")) == []


def test_a_first_batch_that_is_not_finite_blames_the_reference(tmp_path):
    config = poisoned(tmp_path, float("nan"), train={"seed": 3})
    seed = next(s for s in range(99) if poisoned_step(_seeded(config, s)) == 0 and _first(_seeded(config, s)))
    with pytest.raises(UserError, match=r"the reference's log-probs are not finite numbers"):
        finish(_seeded(config, seed))


def _seeded(config, seed):
    train = config.train.model_copy(update={"seed": seed})
    return config.model_copy(update={"train": train, "out": f"{config.out}-{seed}"})


def _first(config):
    data = next(story.train(config.model_copy(update={"out": f"{config.out}-peek"}))).values["data"]
    batch = plan_epoch(outline(data.train, "prompt"), 2, 2, config.train.seed, 0).windows[0][0]
    return any(data.train[i].where.endswith(f":{LINE}") for i in batch)


def test_a_gradient_that_is_not_finite_names_the_windows_pairs(tmp_path, monkeypatch):
    """Losses are finite and the gradient is not, as where a slope overflows: every pair of the window is suspect."""
    make, calls = step.make_gradient, []

    def broken(*arguments):
        gradient = make(*arguments)

        def damaged(batch, share, seen):
            calls.append(1)
            result = gradient(batch, share, seen)
            if len(calls) < 4:  # the second window's second batch
                return result
            return result._replace(gradients=tree_map(lambda g: g * math.inf, result.gradients))

        return damaged

    monkeypatch.setattr("mlxdpo.training.step.make_gradient", broken)
    config = recipe(tmp_path, train={"save_every": 1})
    with pytest.raises(
        NonFiniteError, match=r"^the gradient is not a finite number at (pairs.jsonl:\d+, ){3}pairs.jsonl:\d+;"
    ):
        finish(config)
    assert [path.name for path in checkpoint.steps(Run.open(config.out).checkpoints)] == ["step-000001"]


def test_an_infinite_embedding_that_no_pair_reads_harms_nobody(tmp_path):
    config = recipe(tmp_path)
    clean = finish(config)
    other = tmp_path / "other"
    other.mkdir()
    touched = poisoned(other, float("inf"))
    (other / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text())
    assert [e.kind for e in finish(touched)] == [e.kind for e in clean]
    assert adapter_bytes(other / "run") == adapter_bytes(tmp_path / "run")
