"""Findings on pairs: each kind planted and found, nothing on clean rows, rules by hand, CHES against its definition."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_words import WORDS, write_words

from mlxdpo.cli import run as cli
from mlxdpo.config import ModelConfig
from mlxdpo.data.audit import FACTOR_PRIOR, PENALTIES, WRONG_PRIOR, cross_fit, fold_numbers, label_posterior
from mlxdpo.data.findings import (
    CONTRADICTORY,
    DUPLICATE,
    FLIP,
    OFF_TEMPLATE,
    SELECTIONS,
    AuditInput,
    audit_pairs,
    chosen_rows,
    form_counts,
    nearest_earlier,
    selected,
)
from mlxdpo.forward.reward_head import normed_states
from mlxdpo.inference.pair_states import ches_scores, pair_states
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.policy import load_policy
from mlxdpo.types import Example, Preference, UserError


def planted(count=300, share=0.2, seed=0, size=24):
    """Differences of features in which one direction is what labels follow, and which labels were turned round."""
    draw = np.random.default_rng(seed)
    found = draw.normal(0, 1, (count, size))
    found[:, 0] = abs(found[:, 0]) * 3
    flipped = draw.random(count) < share
    return np.where(flipped[:, None], -found, found), flipped


def auroc(scores, positive):
    ranks = np.argsort(np.argsort(scores))
    count = positive.sum()
    return (ranks[positive].sum() - count * (count - 1) / 2) / (count * (~positive).sum())


def test_planted_flips_are_ranked_first_by_models_that_have_not_seen_them():
    differences, flipped = planted()
    fit = cross_fit([differences], range(300))
    assert auroc(-fit.logits, flipped) > 0.9 and fit.penalty in PENALTIES
    clean = cross_fit([planted(share=0.0)[0]], range(300))
    assert clean.accuracy > 0.93


def test_labels_without_any_rule_are_predicted_no_better_than_by_a_coin():
    """What would be wrong if a fold had seen its own labels: with more columns than rows every label can be learnt."""
    noise = np.random.default_rng(1).normal(0, 1, (200, 400))
    fit = cross_fit([noise], range(200))
    assert abs(fit.accuracy - 0.5) < 0.12 and fit.penalty >= 0.1


def test_exchanging_the_answers_of_one_pair_changes_the_sign_of_its_logit_alone_within_its_fold():
    differences, _ = planted(120, 0.0)
    number = fold_numbers(range(120), 5)
    before = cross_fit([differences], range(120))
    other = differences.copy()
    other[7] *= -1
    after = cross_fit([other], range(120))
    if before.penalty == after.penalty:
        own = number == number[7]
        assert after.logits[7] == pytest.approx(-before.logits[7], rel=1e-3, abs=1e-4)
        assert np.delete(after.logits[own], np.flatnonzero(own).tolist().index(7)) == pytest.approx(
            np.delete(before.logits[own], np.flatnonzero(own).tolist().index(7)), rel=1e-3, abs=1e-4
        )


def drawn_labels(share, count=2000, factor=0.5, seed=3):
    """Logits at 1 / `factor` times their true size, of labels of which a share is turned round; which ones."""
    draw = np.random.default_rng(seed)
    true = draw.normal(0, 3, count)
    label = np.where(draw.random(count) < 1 / (1 + np.exp(-true)), 1, -1)
    wrong = draw.random(count) < share
    return np.where(wrong, -label, label) * true / factor, wrong


@pytest.mark.parametrize("share", [0.02, 0.1, 0.2, 0.35])
def test_the_share_of_wrong_labels_is_found_and_probabilities_are_what_they_say(share):
    logits, wrong = drawn_labels(share)
    right, found = label_posterior(logits)
    assert found == pytest.approx(share, abs=0.04)
    assert right.mean() == pytest.approx(1 - wrong.mean(), abs=0.03)
    for low in np.arange(0, 1, 0.2):
        inside = (right >= low) & (right < low + 0.2)
        if inside.sum() > 100:
            assert (~wrong)[inside].mean() == pytest.approx(right[inside].mean(), abs=0.1)


def test_the_share_of_wrong_labels_is_the_most_likely_by_a_grid():
    """The formula term by term, over factors and shares."""
    logits, _ = drawn_labels(0.15, 200)
    right, found = label_posterior(logits)
    factors, shares = np.exp(np.linspace(-3, 2, 200))[:, None, None], np.linspace(0.005, 0.45, 200)[:, None]
    s = 1 / (1 + np.exp(-factors * logits))
    value = np.log((1 - shares) * s + shares * (1 - s)).sum(axis=2)
    value += (WRONG_PRIOR[0] * np.log(shares) + WRONG_PRIOR[1] * np.log(1 - shares))[:, 0]
    value -= ((np.log(factors) - FACTOR_PRIOR[0]) / FACTOR_PRIOR[1])[:, :, 0] ** 2 / 2
    factor, share = np.unravel_index(value.argmax(), value.shape)
    factor, share = factors[factor, 0, 0], shares[share, 0]
    assert found == pytest.approx(share, abs=0.01)
    s = 1 / (1 + np.exp(-factor * logits))
    assert right == pytest.approx((1 - share) * s / ((1 - share) * s + share * (1 - s)), abs=0.03)


def test_a_label_stands_where_the_others_say_nothing():
    right, share = label_posterior(np.zeros(50))
    assert right == pytest.approx(np.full(50, 1 - share)) and share == pytest.approx(2 / 10, abs=0.02)


def test_an_obviously_wrong_label_is_called_so_however_many_there_are():
    logits = np.where(np.arange(100) < 20, -30.0, 30.0)
    right, share = label_posterior(logits)
    assert right[:20].max() < 0.01 and right[20:].min() > 0.99 and share == pytest.approx(22 / 110, abs=0.01)


def test_pairs_of_a_prompt_share_their_fold_and_every_fold_is_used():
    groups = [i // 3 for i in range(60)]
    number = fold_numbers(groups, 4)
    assert all(len(set(number[3 * k : 3 * k + 3].tolist())) == 1 for k in range(20))
    assert np.bincount(number).tolist() == [15, 15, 15, 15]
    with pytest.raises(ValueError, match="2 prompts are too few for 5 folds"):
        cross_fit([np.ones((4, 2))], [0, 0, 1, 1])


ROWS = [Preference(f"Question {i}?", f"Yes {i}.", f"Not {i}.", f"p.jsonl:{i + 1}") for i in range(40)]


def given(rows, seed=0):
    """Numbers in which every row is another one and every label is right."""
    draw = np.random.default_rng(seed)
    differences = draw.normal(0, 1, (len(rows), 6))
    differences[:, 0] = abs(differences[:, 0]) + 2
    reference = -draw.uniform(5, 50, (len(rows), 2))
    return AuditInput(draw.normal(0, 1, (len(rows), 16)), differences, draw.normal(0, 1, len(rows)), reference,
                      np.full((len(rows), 2), 10.0))  # fmt: skip


def test_clean_rows_have_no_flag_and_each_planted_fault_has_its_own():
    clean = given(ROWS)
    assert all(one["flags"] == [] for one in audit_pairs(ROWS, clean, 5).rows)
    rows = list(ROWS)
    rows[9] = Preference(ROWS[3].prompt, ROWS[3].rejected, ROWS[3].chosen, "p.jsonl:10")
    rows[12] = Preference("Question?", "Yes.<|im_end|>", "No..<|im_end|>", "p.jsonl:13")
    clean.embeddings[20] = clean.embeddings[5] + 0.01
    clean.differences[30] *= -1
    found = audit_pairs(rows, clean, 5)
    flags = {i: one["flags"] for i, one in enumerate(found.rows) if one["flags"]}
    assert flags == {3: [CONTRADICTORY], 9: [CONTRADICTORY], 12: [OFF_TEMPLATE], 20: [DUPLICATE], 30: [FLIP]}
    assert found.rows[20]["similar_to"] == "p.jsonl:6" and found.rows[9]["contradicted_by"] == "p.jsonl:4"
    assert found.summary["flags"] == {FLIP: 1, DUPLICATE: 1, CONTRADICTORY: 2, OFF_TEMPLATE: 1}
    assert found.rows[30]["probability"] < 0.25 < 0.75 < found.rows[0]["probability"]


def test_nearest_earlier_by_hand():
    unit = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [-1.0, -1.1]])
    of, cosine = nearest_earlier(unit, block=2)
    assert of.tolist()[0] == -1 and of[2] == 0 and cosine[2] > 0.9 and cosine[0] == -1
    assert np.allclose(nearest_earlier(unit, block=512)[1], cosine)


def test_form_is_counted_whatever_is_said():
    text = "# Head\n- one\n2. two\n**bold** 3!\n```\nx\n```"
    assert form_counts(text) == [len(text), 11, 7, 2, 1, 2, 1, 2, 1]


def test_rules_keep_the_share_they_name():
    rows = audit_pairs(ROWS, given(ROWS), 5).rows
    for name, key in SELECTIONS.items():
        kept = selected(rows, f"{name}:0.25")
        assert len(kept) == 10
        assert min(key(rows[i]) for i in kept) >= max(key(rows[i]) for i in range(40) if i not in kept)
    for rule in ("hard", "hard:2", "best:0.5", "hard:x"):
        with pytest.raises(UserError, match=r"expected NAME:SHARE such as low-ches:0\.8; names: agreed, hard"):
            selected(rows, rule)
    flags = [{"flags": flags} for flags in ([FLIP], [], [DUPLICATE], [FLIP, DUPLICATE])]
    assert chosen_rows(flags, [DUPLICATE], True, None) == ([0, 1], {0})
    with pytest.raises(UserError, match="--drop odd: no such flag; flags: flip, near-duplicate"):
        chosen_rows(flags, ["odd"], False, None)
    with pytest.raises(UserError, match="either exchanged or left out"):
        chosen_rows(flags, [FLIP], True, None)


def test_ches_by_hand():
    """S_w = (1, 2), S_l = (3, -1): 3 - 2 - 5 = -4; means of 2 and 4 states: (.5, 1), (.75, -.25): .375 - .25 - 1.25."""
    whole, per_token = ches_scores(mx.array([[1.0, 2.0]]), mx.array([[3.0, -1.0]]), mx.array([2.0]), mx.array([4.0]))
    assert whole.tolist() == [-4.0] and per_token.tolist() == pytest.approx([-1.125])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    write_words(folder / "llama")
    return folder


def test_states_are_those_of_each_row_by_itself_whatever_it_is_batched_with(words):
    """Against the definition, row by row without padding: mean of the answer's states; the states that predict it."""
    policy = load_policy(ModelConfig(path=str(words / "llama")))
    draw = np.random.default_rng(0)
    ids = lambda count: draw.integers(2, 40, count).astype(np.int32)  # noqa: E731
    examples = [Example(ids(a), ids(b), ids(c), f"{a}") for a, b, c in ((3, 4, 1), (9, 2, 30), (1, 1, 5), (40, 7, 7))]
    found = pair_states(policy.model, examples, batch_size=3)
    for i, one in enumerate(examples):
        sums, means = [], []
        for answer in (one.chosen, one.rejected):
            states = np.array(normed_states(policy.model, mx.array(np.concatenate([one.prompt, answer])[None])))[0]
            means.append(states[len(one.prompt) :].mean(axis=0))
            sums.append(states[len(one.prompt) - 1 : -1].sum(axis=0))
        assert found.chosen[i] == pytest.approx(means[0], abs=1e-4)
        assert found.rejected[i] == pytest.approx(means[1], abs=1e-4)
        assert found.ches[i] == pytest.approx(sums[0] @ sums[1] - sums[0] @ sums[0], rel=1e-3, abs=1e-3)


def test_the_command_writes_findings_and_a_smaller_set_that_trains(words, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"the {a} {b}", "chosen": f" {a} sleeps", "rejected": f" {b} runs and falls", "source": a}
        for a in WORDS[:6]
        for b in WORDS[12:17]
    ]
    rows[4] |= {"chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs.jsonl").write_text(text)
    line = ["data", "audit", "pairs.jsonl", "--model", str(words / "llama"), "--folds", "3"]
    assert cli([*line, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    found = list(read_lines(tmp_path / "pairs.audit.jsonl"))
    assert summary["pairs"] == len(found) == 30
    assert min(found, key=lambda one: one["probability"])["where"] == "pairs.jsonl:5" and found[4]["flags"] == [FLIP]
    assert list((cache / "reference").glob("*.safetensors"))  # a training finds the log-probs there
    assert cli([*line, "--flip", "--out", "fixed.jsonl"]) == 0
    mended = list(read_lines(tmp_path / "fixed.jsonl"))
    assert len(mended) == 30 and mended[4]["chosen"] == rows[4]["rejected"] and mended[4]["probability"] > 0.75
    assert mended[0]["source"] == rows[0]["source"] and (tmp_path / "pairs.jsonl").read_text() == text
    assert cli([*line, "--drop", "flip", "--select", "hard:0.5", "--out", "small.jsonl"]) == 0
    assert 10 <= len(list(read_lines(tmp_path / "small.jsonl"))) <= 15
    assert "the other pairs agree with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["pairs.jsonl"], "no model given; pass --model"),
        (
            ["pairs.jsonl", "--model", "m", "--out", "o.jsonl"],
            "--out FILE requires --drop, --flip or --select",
        ),
        (
            ["pairs.jsonl", "--model", "m", "--flip"],
            "--out FILE requires --drop, --flip or --select, and vice versa",
        ),
        (
            ["owner/name", "--model", "m"],
            "owner/name is not a file, so there is no default place for the findings; name one with",
        ),
        (["pairs.jsonl", "--model", "m", "--drop", "odd", "--out", "o.jsonl"], "--drop odd: no such flag"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_before_the_work(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert cli(["data", "audit", *words]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "o.jsonl").exists()
