"""Hand-worked values of every objective. Adding an objective without a row here fails `test_losses.py`.

The pair: pi(y_w) = -10, pi(y_l) = -12, ref(y_w) = -11, ref(y_l) = -11, |y_w| = 4, |y_l| = 5. So a = 1, b = -1, d = 2.
"""

from typing import NamedTuple


class Golden(NamedTuple):
    """Knobs, the value, and its derivatives by (pi(y_w), pi(y_l))."""

    knobs: dict
    value: float
    by_chosen: float
    by_rejected: float


GOLDENS = {
    # logit = 0.5 * 2 = 1; -log s(1) = log(1 + e^-1) = 0.3132617; slope -beta s(-1) = -0.5 * 0.2689414
    "sigmoid": [
        Golden({"beta": 0.5}, 0.31326169, -0.13447071, 0.13447071),
        # 0.9 * 0.3132617 + 0.1 * 1.3132617 = 0.4132617; slope -0.9*.5*.2689414 + 0.1*.5*.7310586
        Golden({"beta": 0.5, "label_smoothing": 0.1}, 0.41326169, -0.08447071, 0.08447071),
    ],
    # 1/4 - (-1/5) - 1/(2*0.5) = 0.45 - 1 = -0.55; squared 0.3025; slopes 2*(-.55)/4 and -2*(-.55)/5
    "ipo": [Golden({"beta": 0.5}, 0.3025, -0.275, 0.22)],
    # max(0, 1 - 0.25 * 2) = 0.5, slope -+0.25; with beta 0.5 the margin is reached
    "hinge": [Golden({"beta": 0.25}, 0.5, -0.25, 0.25), Golden({"beta": 0.75}, 0.0, 0.0, 0.0)],
}
