"""TRL's metrics by hand, and what a tie is."""

import numpy as np

from mlxdpo.training.metrics import Scored, accuracy, concatenate_scored, pair_metrics


def scored(*rows):
    """(policy chosen, policy rejected, reference chosen, reference rejected) of each pair."""
    chosen, rejected, ref_chosen, ref_rejected = np.array(rows, np.float64).T
    return Scored(np.ones(len(rows)), chosen, rejected, ref_chosen, ref_rejected, *np.ones((2, len(rows))))


def test_by_hand():
    got = pair_metrics(scored((-10, -12, -11, -11), (-20, -20, -19, -22)), beta=0.5)
    assert got == {
        "loss": 1.0,
        "rewards/chosen": 0.0,  # 0.5 * (1 - 1) / 2
        "rewards/rejected": 0.25,  # 0.5 * (-1 + 2) / 2
        "rewards/margins": -0.25,
        "rewards/accuracies": 0.5,  # one right, one wrong
        "logps/chosen": -15.0,
        "logps/rejected": -16.0,
    }


def test_a_tie_is_one_half():
    tie, right, wrong = (-300, -250, -300, -250), (-299, -250, -300, -250), (-301, -250, -300, -250)
    assert [accuracy(scored(pair)) for pair in (tie, right, wrong)] == [0.5, 1.0, 0.0]
    assert accuracy(scored(tie, right, wrong, tie)) == 0.5


def test_averages_are_over_pairs_and_not_over_batches():
    parts = [scored((-1, -2, -1, -1)), scored(*[(-2, -1, -1, -1)] * 3)]
    assert pair_metrics(concatenate_scored(parts), 1.0)["rewards/accuracies"] == 0.25
