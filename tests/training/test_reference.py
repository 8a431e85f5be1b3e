"""The reference is scored once per row, kept, continued after a stop, and never reused where it must not be."""

import importlib
import json
import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model, write_model
from tiny_runs import finish, losses, recipe, stop_after, write_pairs
from tiny_tokenizers import chatml_tokenizer

from mlxdpo.data.batching import collate
from mlxdpo.data.planning import outline, plan_straight
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.runs import Run
from mlxdpo.training import reference
from mlxdpo.training.reference import digest_of, identity_of, read_table, row_digest, with_reference, write_table
from mlxdpo.types import Example

story = importlib.import_module("mlxdpo.training.run")

pytestmark = pytest.mark.usefixtures("cache")
BASE = {"digest": "d", "dtype": "float32", "quantization": None, "source": "somewhere"}
IDENTITY = identity_of(BASE, None)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def examples():
    draw = np.random.default_rng(4)
    ids = lambda: draw.integers(1, 300, draw.integers(2, 14)).astype(np.int32)  # noqa: E731
    return [Example(ids(), ids(), ids(), f"row {i}") for i in range(9)]


class Counter:
    """A scorer that counts its batches."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, batch):
        self.calls += 1
        return score_pairs(self.model, batch)


def plan(examples, size=2):
    return plan_straight(outline(examples, "none"), size)


def score(examples, scorer, identity=IDENTITY, size=2):
    return list(with_reference(examples, scorer, identity, plan(examples, size), size))[-1][1]


def fresh(examples, model):
    """Each pair alone."""
    pairs = [score_pairs(model, collate(examples, (i,), 1)) for i in range(len(examples))]
    return np.array([[p.chosen.item(), p.rejected.item()] for p in pairs])


def test_same_rows_are_scored_once_and_equal_fresh_scoring(model, examples):
    scorer = Counter(model)
    first = score(examples, scorer)
    assert scorer.calls == 5 and first == pytest.approx(fresh(examples, model), abs=1e-4)
    again = score(examples, scorer)
    assert scorer.calls == 5 and np.array_equal(first, again)
    shuffled = score(examples[::-1], scorer, size=3)
    assert scorer.calls == 5 and np.array_equal(shuffled, first[::-1])


def test_only_new_rows_are_scored(model, examples):
    scorer = Counter(model)
    score(examples[:4], scorer)
    assert scorer.calls == 2
    grown = score([*examples[:4], Example(examples[0].prompt, examples[0].chosen, examples[5].chosen, "new")], scorer)
    assert scorer.calls == 3 and np.isfinite(grown).all()


def test_swapped_pair_is_no_new_row(model, examples):
    scorer = Counter(model)
    first = score(examples[:1], scorer)
    one = examples[0]
    swapped = score([Example(one.prompt, one.rejected, one.chosen, "swapped")], scorer)
    assert scorer.calls == 1 and swapped.tolist() == first[:, ::-1].tolist()


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        ({"digest": "other"}, None),
        ({"dtype": "bfloat16"}, None),
        ({"quantization": {"bits": 4, "group_size": 64}}, None),
        ({}, "an adapter's digest"),
    ],
)
def test_what_changes_a_log_prob_cannot_hit_the_table(model, examples, base, adapter):
    scorer = Counter(model)
    score(examples, scorer)
    score(examples, scorer, identity_of(BASE | base, adapter))
    assert scorer.calls == 10


def test_another_library_version_or_device_cannot_hit_the_table(model, examples, monkeypatch):
    names = {digest_of(identity_of(BASE, None))}
    monkeypatch.setattr(reference, "versions", lambda: {"mlx": "9.9", "mlx-lm": "0"})
    names.add(digest_of(identity_of(BASE, None)))
    monkeypatch.setattr(reference, "this_machine", lambda: type("Machine", (), {"kind": "metal"}))
    names.add(digest_of(identity_of(BASE, None)))
    assert len(names) == 3
    names.add(digest_of(identity_of(BASE | {"source": "moved elsewhere"}, None)))
    assert len(names) == 3  # the same weights in another folder are the same reference


IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)


@given(IDS, IDS, IDS, IDS)
def test_rows_share_a_key_only_when_they_are_the_same(prompt, completion, other_prompt, other_completion):
    key = row_digest(np.array(prompt), np.array(completion))
    other = row_digest(np.array(other_prompt, np.int32), np.array(other_completion, np.int32))
    assert (key == other) == (prompt == other_prompt and completion == other_completion)
    assert key == row_digest(np.array(prompt, np.int32), np.array(completion, np.int64)) and len(key) == 16
    assert key != row_digest(np.array([*prompt, completion[0]]), np.array(completion[1:], np.int32))


def test_interrupted_scoring_goes_on_where_it_stopped(model, examples, monkeypatch):
    scorer = Counter(model)
    scoring = with_reference(examples, scorer, IDENTITY, plan(examples), 2)
    assert [next(scoring)[0] for _ in range(2)] == [1, 3]  # longest first: the odd pair, then two
    scoring.close()
    assert scorer.calls == 2
    assert score(examples, scorer) == pytest.approx(fresh(examples, model), abs=1e-4)
    assert scorer.calls == 5


def test_scoring_that_fails_keeps_what_was_scored(model, examples):
    scorer = Counter(model)

    def failing(batch):
        if scorer.calls == 3:
            raise MemoryError
        return scorer(batch)

    with pytest.raises(MemoryError):
        score(examples, failing)
    score(examples, scorer)
    assert scorer.calls == 5


def test_long_scoring_is_saved_on_the_way(model, examples, cache, monkeypatch):
    monkeypatch.setattr(reference, "SAVE_SECONDS", 0.0)
    scoring, sizes = with_reference(examples, Counter(model), IDENTITY, plan(examples), 2), []
    for _ in range(3):
        next(scoring)
        sizes.append(len(read_table(cache / "reference" / f"{digest_of(IDENTITY)}.safetensors")))
    assert sizes == [2, 6, 10]


def test_a_completion_in_several_pairs_is_kept_once(model, examples, cache):
    """Six pairs among four ranked answers are four rows in the table and one log-prob each."""
    prompt, answers = examples[0].prompt, [e.chosen for e in examples[:4]]
    pairs = [Example(prompt, answers[i], answers[j], f"{i} over {j}") for i in range(4) for j in range(i + 1, 4)]
    logps = score(pairs, Counter(model))
    table = read_table(cache / "reference" / f"{digest_of(IDENTITY)}.safetensors")
    assert len(table) == 4
    assert logps.tolist() == [[table[row_digest(prompt, c)] for c in (p.chosen, p.rejected)] for p in pairs]


def test_pairs_in_no_batch_are_not_a_number(model, examples):
    logps = list(with_reference(examples, Counter(model), IDENTITY, [(0, 3)], 2))[-1][1]
    assert np.isfinite(logps[[0, 3]]).all() and np.isnan(np.delete(logps, [0, 3], axis=0)).all()
    assert logps.dtype == np.float32 and logps.shape == (9, 2)


def test_no_pairs_give_an_empty_reference(model):
    assert [(done, logps.shape) for done, logps in with_reference([], Counter(model), IDENTITY, [], 2)] == [(0, (0, 2))]


def test_tables_of_two_writers_merge(tmp_path):
    file, rows = tmp_path / "table.safetensors", [bytes([n]) * 16 for n in range(4)]
    write_table(file, {rows[0]: -1.5, rows[1]: -2.0}, IDENTITY)
    write_table(file, {rows[1]: -2.0, rows[2]: -3.25, rows[3]: math.inf}, IDENTITY)
    assert read_table(file) == {rows[0]: -1.5, rows[1]: -2.0, rows[2]: -3.25, rows[3]: math.inf}
    assert json.loads(file.with_suffix(".json").read_text()) == IDENTITY
    assert read_table(tmp_path / "none.safetensors") == {}


def scored_batches(monkeypatch):
    """How many batches runs score from here on."""
    calls, make = [], story.make_scorer

    def counting(*arguments):
        scorer = make(*arguments)
        return lambda batch: calls.append(1) or scorer(batch)

    monkeypatch.setattr(story, "make_scorer", counting)
    return calls


def test_runs_share_a_reference_across_beta_rate_seed_and_objective(tmp_path, monkeypatch):
    calls = scored_batches(monkeypatch)
    finish(recipe(tmp_path, "first"))
    assert len(calls) == 9
    finish(recipe(tmp_path, "second", loss={"name": "ipo", "beta": 0.7}, optim={"lr": 1e-5}, train={"seed": 5}))
    finish(recipe(tmp_path, "third", lora={"method": "full"}))
    finish(recipe(tmp_path, "fourth", data={"eval_fraction": 0.3}))
    assert len(calls) == 9


def test_runs_score_again_when_weights_dtype_or_adapter_change(tmp_path, monkeypatch):
    calls = scored_batches(monkeypatch)
    finish(recipe(tmp_path, "first"))
    finish(recipe(tmp_path, "half", model={"dtype": "bfloat16"}, train={"steps": 1}))
    assert len(calls) == 9 + 2  # a run of one step scores its window of two batches
    finish(recipe(tmp_path, "warm", model={"adapter": str(tmp_path / "first" / "adapter")}))
    assert len(calls) == 20
    write_model(tmp_path / "llama", chatml_tokenizer(), seed=1)
    finish(recipe(tmp_path, "other"))
    assert len(calls) == 29
    write_pairs(tmp_path / "pairs.jsonl", count=20)  # the same 18 rows and two more
    finish(recipe(tmp_path, "more"))
    assert 29 < len(calls) <= 31  # the batches that hold a new row


def test_a_run_stopped_while_scoring_scores_the_rest_when_resumed(tmp_path, monkeypatch):
    calls = scored_batches(monkeypatch)
    events = finish(recipe(tmp_path), stop=stop_after(3))
    assert [e.kind for e in events][-1] == "interrupted" and len(calls) == 4
    run = Run.open(tmp_path / "run")
    events = finish(run.config(), run)
    assert [e.kind for e in events][-1] == "done" and len(calls) == 9
    assert losses(events)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_starting_from_an_adapter_the_reference_includes_it(tmp_path, method):
    finish(recipe(tmp_path, "first", lora={"method": method}))
    adapter = tmp_path / "first" / "adapter"
    events = finish(recipe(tmp_path, model={"adapter": str(adapter)}, lora={"method": method}))
    first = next(e.values for e in events if e.kind == "step")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["rewards/margins"], first["rewards/chosen"], first["rewards/accuracies"]) == (0.0, 0.0, 0.5)
    bare = next(e.values for e in finish(recipe(tmp_path, "bare")) if e.kind == "step")
    assert abs(first["logps/chosen"] - bare["logps/chosen"]) > 0.01  # the adapter does something
    manifest = Run.open(tmp_path / "run").manifest()
    assert manifest["reference"]["adapter"] == manifest["model"]["adapter"] is not None
    assert manifest["reference_source"]["adapter"] == str(adapter)
    assert (
        mx.load(str(adapter / "adapters.safetensors")).keys()
        == mx.load(str(tmp_path / "run" / "adapter" / "adapters.safetensors")).keys()
    )
