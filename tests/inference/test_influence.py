"""Which pairs taught an answer: the product of gradients is what a step does, and a planted pair is found."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from tiny_runs import trained

from mlxdpo.cli import run as command
from mlxdpo.data.batching import collate
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.forward.logprobs import score_pairs
from mlxdpo.inference import influence
from mlxdpo.inference.influence import (
    answer_gradient,
    answer_part,
    influences,
    pair_gradients,
    pair_loss,
    projected,
    token_ends,
    trained_gradient,
    training_pairs,
)
from mlxdpo.inference.trained_run import encode_pairs, open_trained_run
from mlxdpo.types import UserError


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_trained_run(trained(tmp_path_factory.mktemp("influence")))


def finished(steps):
    """All that a generator yields, and what it returns."""
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


def test_the_product_of_the_gradients_is_what_a_step_on_the_pair_does_to_the_answer(opened):
    """TracIn's first order, against a step in each direction: (log p after - log p before) / eta."""
    model, loss = opened.policy.model, pair_loss(opened)
    _, examples, _ = encode_pairs(opened, training_pairs(opened))
    forward = forward_fns(model).train
    asked = collate([answer_part(opened, "q3 red:", " blue ok").example], (0,), 1)
    pair = collate(examples, (3,), 1, np.full((len(examples), 2), -40, np.float32))
    step = trained_gradient(model, pair, forward, lambda pairs: -loss(pairs))
    wanted = trained_gradient(model, asked, forward, lambda pairs: pairs.chosen)
    product = sum((a * b).sum().item() for (_, a), (_, b) in zip(tree_flatten(step), tree_flatten(wanted), strict=True))
    start, after = model.trainable_parameters(), []
    for eta in (1e-3, -1e-3):
        model.update(tree_map(lambda w, g, eta=eta: w + eta * g, start, step))
        after.append(score_pairs(model, asked, forward).chosen.item())
    model.update(start)
    assert (after[0] - after[1]) / 2e-3 == pytest.approx(product, rel=2e-2)


def test_projections_keep_cosines_on_average_within_the_error_that_their_width_gives():
    draw = np.random.default_rng(0)
    one, noise = draw.normal(size=(2, 3000))
    other = 0.5 * one + noise
    tree = lambda v: {"a": mx.array(v[:1000].reshape(20, 50)), "b": [mx.array(v[1000:])]}  # noqa: E731
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    found = [float(projected(tree(one), 256, seed) @ projected(tree(other), 256, seed)) for seed in range(100)]
    assert np.mean(found) == pytest.approx(cosine, abs=4 / np.sqrt(256 * 100))
    assert np.std(found) == pytest.approx(1 / np.sqrt(256), rel=0.5)
    assert not np.array(projected(tree(0 * one), 256)).any()


def test_gradients_of_pairs_are_kept_and_damaged_ones_made_again(opened, monkeypatch):
    _, examples, _ = encode_pairs(opened, training_pairs(opened))
    monkeypatch.setattr(influence, "BLOCK", 5)
    seen, first = finished(pair_gradients(opened, examples[:8]))
    assert seen == [5, 8] and first.shape == (8, influence.WIDTH)
    monkeypatch.setattr(influence, "_block_gradients", lambda *_: pytest.fail("computed twice"))
    assert np.array_equal(finished(pair_gradients(opened, examples[:8]))[1], first)
    monkeypatch.undo()
    file = influence._cache_file(opened, examples[:5])
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr(influence, "BLOCK", 5)
    assert np.array_equal(finished(pair_gradients(opened, examples[:8]))[1], first)


def test_a_part_of_an_answer_is_the_tokens_in_which_it_stands(opened):
    whole = answer_part(opened, "q3 red:", " blue string ok")
    part = answer_part(opened, "q3 red:", " blue string ok", "string")
    ends = token_ends(opened.policy.tokenizer, whole.example, " blue string ok")
    assert ends[-1] == len(" blue string ok") or ends[-2] == len(" blue string ok")  # an end of text has no character
    asked = part.example.chosen_mask
    text = opened.policy.tokenizer.decode(part.example.chosen[asked].tolist())
    assert "string" in text and len(text) < len(" blue string ok")
    with pytest.raises(UserError, match='"green" does not occur'):
        answer_part(opened, "q3 red:", " blue string ok", "green")


def test_a_later_occurrence_of_a_part_is_asked_for_by_its_number(opened):
    text = " red blue red ok red"
    places = [np.flatnonzero(answer_part(opened, "q3:", text, "red", n).example.chosen_mask) for n in (1, 2, 3)]
    assert places[0].max() < places[1].min() and places[1].max() < places[2].min()
    with pytest.raises(UserError, match='"red" occurs 3 times'):
        answer_part(opened, "q3:", text, "red", 4)


def test_a_planted_pair_is_among_the_three_of_largest_influence(opened):
    """Each pair's own prompt and chosen answer, among 18 pairs of the same nine words."""
    rows = training_pairs(opened)
    rows, examples, _ = encode_pairs(opened, rows)
    gradients = finished(pair_gradients(opened, examples))[1]
    places = []
    for i, row in enumerate(rows):
        values = influences(gradients, answer_gradient(opened, answer_part(opened, row.prompt, row.chosen)))
        places.append(int((values > values[i]).sum()))
    assert sum(place < 3 for place in places) >= 0.9 * len(rows), places


def test_the_command_shows_pairs_and_writes_all(opened, tmp_path, capsys):
    out = tmp_path / "influence.jsonl"
    row = training_pairs(opened)[4]
    words = ["influence", str(opened.run.path), row.prompt, "--completion", row.chosen, "--top", "2"]
    assert command([*words, "--out", str(out), "--json"]) == 0, capsys.readouterr()
    shown = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(lines) == shown["pairs"] == 18 and lines[:2] == shown["taught"]
    assert [one["influence"] for one in lines] == sorted((one["influence"] for one in lines), reverse=True)
    assert row.where in {one["where"] for one in lines[:3]}
    assert command([*words, "--out", str(out)]) == 2 and "already exists" in capsys.readouterr().err
    assert command(["influence", str(opened.run.path), row.prompt, "--completion", " blue", "--part", "zebra"]) == 2
    assert '"zebra" does not occur in the answer' in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "name", "said"), [("sft", "sigmoid", "stage sft"), ("dpo", "kto", "thumbs")])
def test_runs_on_other_rows_are_refused(opened, stage, name, said):
    loss = opened.config.loss.model_copy(update={"name": name})
    other = opened._replace(config=opened.config.model_copy(update={"stage": stage, "loss": loss}))
    with pytest.raises(UserError, match=said):
        pair_loss(other)
