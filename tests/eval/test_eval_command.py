"""`mlxdpo eval` with best-of-k records, slices, a second asking, human votes: in results, page and Markdown alike."""

import json

import pytest
from planted_judges import Planted, coin, oracle
from tiny_runs import trained, untrain, write_pairs

from mlxdpo import Run, prompt_name
from mlxdpo.cli import run as cli
from mlxdpo_eval.compare import latest_results
from mlxdpo_eval.judge_quality import ask_again
from mlxdpo_eval.judges import AnswerPair, BothOrders, Verdict, ask_both
from mlxdpo_eval.report.blocks import roughly

ARGS = ["--prompts", "6", "--samples", "1", "--max-tokens", "4"]


def lines(file, rows):
    """A JSON lines file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def evaluated(run, *args):
    """Results of the command, and its reports as text."""
    assert cli(["eval", str(run.path), *args, *ARGS]) == 0
    return latest_results(run), (run.path / "report.html").read_text(), (run.path / "report.md").read_text()


def records(count=12):
    """The shape of RewardBench 2: one right and three wrong completions, and two with two right ones."""
    wrong = lambda i: [f"no {w} {i}" for w in ("red", "blue", "a")]  # noqa: E731
    one = [
        {"id": str(i), "prompt": f"q{i}", "chosen": [f"right {i}"], "rejected": wrong(i),
         "subset": ("math", "chat")[i % 2], "num_correct": 1}
        for i in range(count)
    ]  # fmt: skip
    tied = [
        {"id": f"{kind}:{i}", "prompt": f"name one {kind} {i}", "chosen": [f"red {i}", f"blue {i}"][:right],
         "rejected": [f"the {i}", f"user {i}"], "subset": "Ties", "num_correct": right}
        for i in range(2) for kind, right in (("ref", 1), ("tied", 2))
    ]  # fmt: skip
    return one + tied


def test_best_of_k_records_are_found_and_held_against_chance(run, tmp_path):
    data = lines(tmp_path / "records.jsonl", records())
    results, page, markdown = evaluated(run, "--data", data, "--slice", "subset")
    found = results["best_of"]
    assert found["sizes"] == {"3": 2, "4": 14}
    assert found["best"]["n"] == 16 and found["left_out"] == 0 and found["tied"] == 0
    assert found["best"]["interval"]["low"] <= found["best"]["accuracy"] <= found["best"]["interval"]["high"]
    assert found["best"]["chance"] == pytest.approx((12 / 4 + 2 / 3 + 2 * 2 / 4) / 16)
    assert found["ties"]["n"] == 2
    assert results["data"]["pairs"] == 12 * 3 + 2 * 2 + 2 * 2 * 2
    assert any("best-of-k records" in text for text in results["sentences"])
    for text in (page, markdown):
        assert "a right completion first" in text and "control: chance" in text and "by subset" in text


def test_best_of_k_accuracy_is_that_of_the_rewards_in_the_lines(run, tmp_path):
    """Each record's rewards again, from the lines beside the results."""
    data = lines(tmp_path / "records.jsonl", records())
    results, _, _ = evaluated(run, "--data", data)
    by_record = {}
    for line in map(json.loads, (run.path / "eval" / "eval_pairs.jsonl").read_text().splitlines()):
        right, wrong = (line[s] - line[f"ref_{s}"] for s in ("chosen", "rejected"))
        scores = by_record.setdefault(line["where"], ([], []))
        scores[0].append(right)
        scores[1].append(wrong)
    first = [max(right) > max(wrong) for right, wrong in by_record.values()]
    assert results["best_of"]["best"]["accuracy"] == pytest.approx(sum(first) / len(first))


def test_an_untuned_run_reaches_chance_exactly(run, tmp_path):
    data = lines(tmp_path / "records.jsonl", records()[:12])
    results, page, _ = evaluated(untrain(run), "--data", data)
    assert results["best_of"]["best"]["accuracy"] == results["best_of"]["best"]["chance"] == 0.25
    assert results["best_of"]["tied"] == 12 and results["headline"]["verdict"] == "no difference shown"
    assert "in all 12 best-of-k records the model is its reference" in page


def test_records_that_cannot_be_used_are_counted_or_stop(run, tmp_path, capsys):
    odd = [
        {"prompt": "q", "chosen": "same", "rejected": ["same", "b"]},
        {"prompt": "r", "completions": ["a", "b"], "n_correct": 1},
    ]
    results, _, _ = evaluated(run, "--data", lines(tmp_path / "odd.jsonl", records(3) + odd))
    assert results["best_of"]["best"]["n"] == 3 + 4 + 1
    assert any("two answers are the same" in text and "odd.jsonl:8" in text for text in results["data"]["left_out"])
    bad = [*records(2), {"prompt": "q", "chosen": ["a"], "rejected": "b"}]
    assert cli(["eval", str(run.path), "--data", lines(tmp_path / "bad.jsonl", bad), *ARGS]) == 2
    assert "bad.jsonl:7: not a best-of-k record" in capsys.readouterr().err


def test_slices_by_any_column_with_the_worst_and_what_is_not_there(tmp_path, cache, capsys):
    rows = [json.loads(x) for x in write_pairs(tmp_path / "pairs.jsonl", 60).read_text().splitlines()]
    rows = [r | {"topic": "ab"[i % 2], "score": i / 7, "tags": ["x"]} for i, r in enumerate(rows)]
    lines(tmp_path / "pairs.jsonl", rows)
    run = trained(tmp_path)
    several = ["--slice", "topic", "--slice", "score", "--slice", "tags", "--judge", "longest"]
    assert cli(["eval", str(run.path), *several, "--prompts", "60", "--samples", "2", "--max-tokens", "24"]) == 0
    results = latest_results(run)
    found = results["pairs"]["slices"]
    assert list(found) == ["topic", "score", "tags"] and results["settings"]["slices"] == ["topic", "score", "tags"]
    assert [s["n"] for s in found["topic"]["shown"]] == [30, 30] and found["topic"]["worst"] == found["topic"]["shown"][
        0
    ]
    assert (found["score"]["hidden"], found["score"]["hidden_rows"]) == (4, 60)  # quarters of 15: fewer than 20
    assert [s["name"] for s in found["tags"]["shown"]] == ['["x"]']
    won = results["winrates"][0]["slices"]
    topics, answered = won["topic"]["shown"], results["winrates"][0]["answered"]
    assert sum(s["n"] for s in topics) == answered > 80 and len(won["score"]["shown"]) == 4
    assert sum(s["share"] * s["n"] for s in topics) / answered == pytest.approx(results["winrates"][0]["rate"])
    for name in ("report.html", "report.md"):
        text = (run.path / name).read_text()
        assert all(
            part in text for part in ("accuracy by topic", "win rate by score, longest", "Worst: ", "accuracy by tags")
        )
    assert cli(["eval", str(run.path), "--slice", "colour", *ARGS]) == 2
    assert "--slice colour: the held-out rows have no such column; their columns are score, tags, topic" in (
        capsys.readouterr().err
    )


def test_a_program_repeats_itself_when_asked_again(run):
    many = ["--judge", "longest", "--retest", "4", "--temperature", "5"]  # hot: answers that differ
    results, page, markdown = evaluated(run, *many)
    again = results["winrates"][0]["retest"]
    count = results["winrates"][0]["asked"]
    assert count > 0 and (again["asked"], again["n"]) == (min(4, count),) * 2
    assert (again["invalid"], again["same"], again["moved"]) == (0, 1.0, 0.0)
    assert f"100.0&nbsp;% of {again['n']}" in page and f"100.0 % of {again['n']}" in markdown
    without, page, _ = evaluated(run, "--judge", "longest")
    assert without["winrates"][0]["retest"] is None and "not asked" in page


def test_a_second_asking_goes_past_the_cache_and_leaves_it_alone(cache):
    """A judge that turns round: the cache would hide it."""
    turned = []
    judge = Planted(lambda q: Verdict(-oracle(q).logit if turned else oracle(q).logit), "turns", cached=True)
    pairs = [AnswerPair(f"p{i}", "bad", "good") for i in range(10)]
    first = ask_both(judge, pairs)
    turned.append(True)
    again = ask_again(judge, pairs, first, [t.prompt for t in pairs], 5)
    assert (again.asked, again.n, again.same, again.moved) == (5, 5, 0.0, 20.0)
    assert ask_both(judge, pairs) == first  # still kept
    few = ask_again(Planted(coin), pairs, first, [t.prompt for t in pairs], 100)
    assert few.asked == 10
    assert ask_again(judge, pairs, [BothOrders(None, None, "odd")] * 10, [], 5) is None


def test_a_second_asking_that_fails_is_counted_apart():
    pairs = [AnswerPair(f"p{i}", "bad", "good") for i in range(10)]
    first = [BothOrders(10.0, 10.0)] * 10
    judge = Planted(lambda q: Verdict(None, "timeout") if q.prompt in ("p0", "p9") else oracle(q))
    again = ask_again(judge, pairs, first, [t.prompt for t in pairs], 10)
    assert (again.asked, again.n, again.invalid, again.same) == (10, 8, 2, 1.0)


def votes_on(run, count, winner):
    """Votes on prompts of the run's own pairs, as the app writes them."""
    rows = [json.loads(x) for x in (run.path.parent / "pairs.jsonl").read_text().splitlines()][:count]
    return [
        {"id": str(i), "prompt": row["prompt"], "response_a": f"mine {i}", "response_b": f"other {i} longer",
         "winner": winner, "tuned": "a", "blind": True, "seed": i}
        for i, row in enumerate(rows)
    ]  # fmt: skip


def test_votes_say_cannot_tell_yet_or_better_and_stand_in_every_report(run):
    lines(run.path / "votes.jsonl", [*votes_on(run, 3, "a"), {"winner": "c"}])
    results, page, markdown = evaluated(run, "--judge", "longest")
    votes = results["votes"]
    assert (votes["n"], votes["wins"], votes["decided_at"]) == (3, 3, None) and votes["needed"] > 0
    assert sum(votes["left_out"].values()) == 1
    (said,) = [text for text in results["sentences"] if "people prefer" in text]
    assert said.startswith("Cannot tell yet") and f"about {roughly(votes['needed'])} more votes" in said
    for text in (page, markdown):
        assert "Human votes" in text and "e-value against no difference" in text and "Not counted: 1 x " in text
    humans = results["winrates"][0]["humans"]
    assert (humans["agreement"]["n"], humans["agreement"]["raw"], humans["agreement"]["longest"]) == (3, 0.0, 0.0)
    assert humans["corrected"] == 3
    lines(run.path / "votes.jsonl", votes_on(run, 18, "b"))
    results, page, _ = evaluated(run)
    assert results["votes"]["decided_at"] == 8 and results["headline"]["verdict"] == "worse"
    assert "<h1>Worse</h1>" in page  # without a judge, people are the headline


def test_a_vote_knows_its_prompt_as_the_run_does(run):
    (vote, *_) = votes_on(run, 1, "a")
    evaluated(run)
    names = [json.loads(x)["prompt_id"] for x in (run.path / "eval" / "eval_samples.jsonl").read_text().splitlines()]
    assert prompt_name(vote["prompt"]) in names


def test_a_compared_run_with_its_adapter_turned_round_is_worse(run, tmp_path, capsys):
    """B's update is A's with the sign changed: whatever A learned, B unlearned."""
    import mlx.core as mx

    rows = [json.loads(x) for x in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    other = trained(tmp_path, "other")
    file = other.adapter / "adapters.safetensors"
    arrays = mx.load(str(file))
    mx.save_safetensors(str(file), {k: -v if "lora_b" in k else v for k, v in arrays.items()})
    a, _, _ = evaluated(run)
    b, _, _ = evaluated(Run.open(other.path))
    accuracy = [x["pairs"]["rewards"]["accuracy"] for x in (a, b)]
    assert accuracy[0] > 0.8 and accuracy[1] < 0.2 and len(rows) == 18
    capsys.readouterr()
    assert cli(["compare", str(run.path), str(other.path)]) == 1
    assert "Worse: held-out accuracy" in capsys.readouterr().out
    assert cli(["compare", str(other.path), str(run.path)]) == 0
    assert "Better: held-out accuracy; nothing got worse." in capsys.readouterr().out


def test_two_runs_of_the_same_recipe_show_no_difference(run, tmp_path, capsys):
    twin = trained(tmp_path, "twin")
    for one in (run, twin):
        evaluated(one, "--judge", "longest")
    capsys.readouterr()
    assert cli(["compare", str(run.path), str(twin.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sentence"].startswith("No difference shown") and found["flips"] == []
    assert all(c["change"] == 0 for c in found["changes"]) and len(found["changes"]) == 2


def test_the_frontier_knows_where_nothing_moved_and_what_beats_what(tmp_path, cache, capsys):
    """An untuned run is at KL 0 and 1/2; a tuned one that wins always is on the frontier beside it."""
    tuned = trained(tmp_path, "tuned")
    still = untrain(trained(tmp_path, "still", train={"steps": 1}))
    reward = tmp_path / "reward.py"
    reward.write_text("def alike(prompt, answer):\n    return 0.0\n")
    args = ["--prompts", "4", "--max-tokens", "4", "--json"]
    capsys.readouterr()
    assert cli(["frontier", str(tuned.path), str(still.path), "--judge", f"{reward}:alike", *args]) == 0
    points = {p["name"]: p for p in json.loads(capsys.readouterr().out)}
    (name,) = [n for n in points if n.startswith("still") and n.endswith("adapter")]
    assert (points[name]["kl"], points[name]["reward"], points[name]["best"]) == (0.0, 0.5, True)
    drifted = [p for n, p in points.items() if n.startswith("tuned")]
    # a judge that sees no difference: drift buys nothing, so no tuned point is on the frontier
    assert drifted and all(p["kl"] > 0 and p["reward"] == 0.5 and not p["best"] for p in drifted)
