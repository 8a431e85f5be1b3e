"""The grid of rates: planted pairs obey their rule, cells come in a useful order, the table compares equal seeds."""

import pytest
from tiny_models import write_model
from tiny_tokenizers import chatml_tokenizer

from benchmarks.planted_tasks import NOISE, TASKS, planted
from benchmarks.rates import EARLY, REST, Cell, cells, run_cell, table


@pytest.mark.parametrize("name", TASKS)
def test_planted_pairs_obey_their_rule_but_for_the_planted_noise(name):
    training, heldout = planted(name, 120, 48)
    better = lambda row: (  # noqa: E731
        TASKS[name].judge(row["prompt"], row["chosen"]) > TASKS[name].judge(row["prompt"], row["rejected"])
    )
    assert sum(map(better, training)) == 120 - NOISE * 120 and all(map(better, heldout))
    assert len({row["prompt"] for row in training + heldout}) == 168
    assert (training, heldout) == planted(name, 120, 48)
    with pytest.raises(ValueError, match="more than its"):
        planted(name, 400, 48)


def test_judges_do_not_reward_silence_or_one_word_said_again():
    assert TASKS["length"].judge("", "") < TASKS["length"].judge("", " It is old and common.")
    assert TASKS["refusal"].judge("How do I bake a cake?", " a a a") < 0
    assert TASKS["sentiment"].judge("", " good good good") == TASKS["sentiment"].judge("", " good")
    assert TASKS["format"].judge("", "\n- \n- \n- ") == 0


def test_cells_come_so_that_a_table_is_soon_of_use():
    every = list(cells("smollm2", list(TASKS), [*EARLY, *REST], 3, 120))
    assert len(every) == len(set(every)) == 6 * 10 * 3
    assert {(cell.rate, cell.seed) for cell in every[:36]} == {(rate, 0) for rate in EARLY}


def line(rate, seed, accuracy, task="tone"):
    values = {"accuracy": accuracy, "win_rate": 0.5, "rewards_apart": 1.0, "nats_a_token": 0.1, "lr": 3e-4}
    return {"model": "m", "task": task, "rate": rate, "seed": seed, "pairs": 120, "probe_share": 0.1} | values


def test_the_table_compares_seeds_that_both_sides_have():
    """The rate's second seed, which `auto` lacks yet, is in its row and not in the difference."""
    text = table([line("auto", 0, 0.8), line("1e-3", 0, 0.9), line("1e-3", 1, 0.5), line("1e-4", 0, 0.7)])
    assert "| 1e-3 | 70 / 50 | 70 / 50 | 1.00 | 0.100 |" in text
    assert "behind the best rate of each task by +10.0 points on average, at worst +10.0 (tone)" in text
    assert "behind 1e-3, the best single rate for all tasks, +10.0" in text


def test_a_cell_is_trained_and_measured_and_leaves_only_its_figures(tmp_path, cache):
    weights = str(write_model(tmp_path / "llama", chatml_tokenizer()))
    line = run_cell(Cell("tiny", "format", "1e-2", 0, 16), weights, tmp_path)
    assert line["lr"] == 0.01 and line["rewards_apart"] > 0 and 0 <= line["win_rate"] <= 1
    assert not list((tmp_path / "runs").iterdir())
    still = run_cell(Cell("tiny", "format", "1e-9", 0, 16), weights, tmp_path)
    assert still["win_rate"] == 0.5 and still["rewards_apart"] < 1e-3
