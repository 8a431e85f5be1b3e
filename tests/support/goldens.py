"""Hand-worked values of every objective. Adding an objective without a row here fails `test_losses.py`.

The pair: pi(y_w) = -10, pi(y_l) = -12, ref(y_w) = -11, ref(y_l) = -11, |y_w| = 4, |y_l| = 5. So a = 1, b = -1, d = 2.
Of unpaired objectives it is a thumb up, and b is the log-ratio of another prompt's completion.

s(1) = .7310586, s(-1) = .2689414, log s(1) = -.3132617, log s(-1) = -1.3132617;
s(.5) = .6224593, s(-.5) = .3775407, log s(.5) = -.4740770, log s(-.5) = -.9740770.
"""

from typing import NamedTuple


class Golden(NamedTuple):
    """Knobs, the value, and its derivatives by (pi(y_w), pi(y_l)); `changes` are laid over the pair."""

    knobs: dict
    value: float
    by_chosen: float
    by_rejected: float
    changes: dict | None = None


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
    # logit 5 (1/4 + 1/5) = 2.25; log(1 + e^-2.25); slopes -5 s(-2.25)/4 and 5 s(-2.25)/5, s(-2.25) = .0953495
    "sigmoid_norm": [Golden({"beta": 5.0}, 0.10020656, -0.11918683, 0.09534946)],
    # s(1)(log s(1) - log .9) + s(-1)(log s(-1) - log .1);
    # slope by the logit s(1) s(-1) ((log s(1) - log .9) - (log s(-1) - log .1)) = .1966119 * -1.1972246, times 1/2
    "exo_pair": [Golden({"beta": 0.5, "label_smoothing": 0.1}, 0.11408211, -0.11769432, 0.11769432)],
    # (.9 * .3132617 - .1 * 1.3132617) / .8; slope -(.9 s(-1) + .1 s(1)) / .8 / 2
    "robust": [Golden({"beta": 0.5, "label_smoothing": 0.1}, 0.18826169, -0.19697071, 0.19697071)],
    # .9 s(1) + .1 s(-1) = .6848469; -log; slope -.5 (.9 - .1) s(1) s(-1) / .6848469, s(1) s(-1) = .1966119;
    # with e = .1 and a row that is right with .75: (.9*.75 + .1*.25) = .7, so .7 s(1) + .3 s(-1) = .5924234;
    # a row that is right with 0, e = 0: the swapped pair, -log s(-1)
    "fa_dpo": [
        Golden({"beta": 0.5, "label_smoothing": 0.1}, 0.37855994, -0.11483551, 0.11483551),
        Golden({"beta": 0.5, "label_smoothing": 0.1}, 0.52353370, -0.06637548, 0.06637548, {"label": 0.75}),
        Golden({"beta": 0.5, "label_smoothing": 0.0}, 1.31326169, 0.36552929, -0.36552929, {"label": 0.0}),
    ],
    # one pair is its own quantile, so nothing is drawn in; won (z = 1): nothing is flipped, DPO. Lost, a = -3, d = -2,
    # z = -1: all of the budget is its: .8 * 1.3132617 + .2 * .3132617; slope .5 (-.8 s(1) + .2 s(-1))
    "wdpo": [
        Golden({"beta": 0.5}, 0.31326169, -0.13447071, 0.13447071),
        Golden({"beta": 0.5, "flip_budget": 0.2}, 1.11326169, -0.26552929, 0.26552929, {"chosen": -14.0}),
    ],
    # m = s(1/.5) = .8807971, m' = m (1-m) / .5 = .2099872; (1-m) .3132617 + m e^-1;
    # slope (m' log s(1) - (1-m) s(-1) + m' e^-1 - m e^-1) / 2
    "discopop": [Golden({"beta": 0.5, "discopop_tau": 0.5}, 0.36136885, -0.17230836, 0.17230836)],
    "dpop": [
        # a = 1 > 0: no penalty, so DPO
        Golden({"beta": 0.5, "dpop_lambda": 3.0}, 0.31326169, -0.13447071, 0.13447071),
        # a = -1, d = 0: logit .5 (0 - 3 * 1) = -1.5; slopes -.5 (1 + 3) s(1.5) and .5 s(1.5), s(1.5) = .8175745
        Golden({"beta": 0.5, "dpop_lambda": 3.0}, 1.70141328, -1.63514895, 0.40878724, {"chosen": -12.0}),
        # a = 0, where every run starts: logit .5, and no slope of the penalty yet
        Golden({"beta": 0.5, "dpop_lambda": 3.0}, 0.47407698, -0.18877033, 0.18877033, {"chosen": -11.0}),
    ],
    # logit 1 + .1 (4 - 5) = .9; log(1 + e^-.9); slope -.5 s(-.9), s(-.9) = .2890505
    "r_dpo": [Golden({"beta": 0.5, "length_alpha": 0.1}, 0.34115387, -0.14452525, 0.14452525)],
    # beta a = .5, beta b = -.5: .4740770 + .9740770/2 + .4740770/2;
    # slopes .5 (-s(-.5) + s(.5)/2) and .5 s(-.5)/2
    "nca_pair": [Golden({"beta": 0.5}, 1.19815397, -0.03315550, 0.09438517)],
    # 2 * .4740770; slopes -+.5 s(-.5)
    "bco_pair": [Golden({"beta": 0.5}, 0.94815397, -0.18877033, 0.18877033)],
    # targets +-1 are reached with beta .5; +-2 with beta .25: (1-2)^2 + (-1+2)^2, slopes 2(1-2) and 2(-1+2)
    "sppo_hard": [Golden({"beta": 0.5}, 0.0, 0.0, 0.0), Golden({"beta": 0.25}, 2.0, -2.0, 2.0)],
    # 1 - s(.5) + s(-.5) = 2 * .3775407; slopes -+.5 s(.5) s(-.5)
    "apo_zero": [Golden({"beta": 0.5}, 0.75508134, -0.11750186, 0.11750186)],
    # s(.5) + 1 - s(1); slopes .5 (s(.5) s(-.5) - s(1) s(-1)) and .5 s(1) s(-1)
    "apo_down": [Golden({"beta": 0.5}, 0.89140075, 0.01919589, 0.09830597)],
    # one pair is its own match: smoothed DPO
    "aot": [Golden({"beta": 0.5, "label_smoothing": 0.1}, 0.41326169, -0.08447071, 0.08447071)],
    "aot_unpaired": [Golden({"beta": 0.5, "label_smoothing": 0.1}, 0.41326169, -0.08447071, 0.08447071)],
    # 10/4
    "sft": [Golden({}, 2.5, -0.25, 0.0)],
    # logit .5 (-10 + 12) = 1, and .2 * 10/4; slope by pi(y_w) -.5 s(-1) - .2/4
    "cpo": [Golden({"beta": 0.5, "cpo_alpha": 0.2}, 0.81326169, -0.18447071, 0.13447071)],
    # token means -2.5 and -2.4; log odds -.1 - (log(1-e^-2.5) - log(1-e^-2.4)) = -.1091 = L; 2.5 + .5 log(1+e^-L);
    # slopes -1/4 - .5 s(-L) / (1-e^-2.5) / 4 and .5 s(-L) / (1-e^-2.4) / 5
    "orpo": [Golden({"beta": 0.5}, 2.87468428, -0.32181154, 0.05799467)],
    # 2 (-2.5 + 2.4) - .5 = -.7; log(1 + e^.7); slopes -2 s(.7)/4 and 2 s(.7)/5, s(.7) = .6681878
    "simpo": [Golden({"beta": 2.0, "gamma": 0.5}, 1.10318605, -0.33409389, 0.26727511)],
    # rewards (1 - e^1.25)/.5 = -4.9806859 and (1 - e^1.2)/.5 = -4.6402338; logit 2 (-.3404521) - .5 = -1.1809041;
    # slopes -2 s(1.1809) e^1.25/4 and 2 s(1.1809) e^1.2/5, s(1.1809041) = .7651107
    "alphapo": [
        Golden({"beta": 2.0, "gamma": 0.5, "alphapo_alpha": 0.5}, 1.44863937, -1.33524873, 1.01610230),
    ],
    # z = max(0, -1) = 0: 1 - s(.5), slope -.5 s(.5) s(-.5); a thumb down of weight 2: 2 s(.5)
    "kto": [
        Golden({"beta": 0.5}, 0.37754067, -0.11750186, 0.0),
        Golden({"beta": 0.5, "undesirable_weight": 2.0}, 1.24491866, 0.23500371, 0.0, {"desirable": 0.0}),
    ],
    "apo_zero_unpaired": [Golden({"beta": 0.5}, 0.37754067, -0.11750186, 0.0)],
}
