"""What objectives are made of, by itself: accurate logarithms, shapes of rewards, and what a loss says of its terms."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlxdpo.commands.objectives import facts
from mlxdpo.config import LossConfig
from mlxdpo.losses import LOSSES, resolve
from mlxdpo.losses.modifiers import unpaired_rows, without_reference
from mlxdpo.losses.ratios import bounded_expm1, log1mexp
from mlxdpo.losses.reference_free import imitation, odds, shaped_reward
from mlxdpo.losses.reward import OBJECTIVE, bradley_terry, reward_loss, reward_range
from mlxdpo.losses.winsorized import sparsemax, wdpo, winsor_weights
from mlxdpo.types import Pairs, UserError

FAR_AND_NEAR = [-1e-4, -1e-3, -0.01, -0.3, -0.6, -0.8, -2.0, -8.0, -16.0, -20.0, -40.0]


def exact(values):
    """The float32 numbers as float64."""
    return np.array(values, np.float32).astype(np.float64)


def test_log_of_1_minus_e_to_the_x_is_accurate_at_both_ends():
    """Relative error of a float32 from -1e-4, where it is -9.2, to -40, where it is -4e-18."""
    x = exact(FAR_AND_NEAR)
    want = np.where(x > -0.7, np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
    assert np.array(log1mexp(mx.array(FAR_AND_NEAR))) == pytest.approx(want, rel=1e-6)


def test_its_slope_is_the_closed_form_at_both_ends():
    """-e^x / (1 - e^x), also where the other branch's slope is infinite."""
    x = exact(FAR_AND_NEAR)
    slopes = mx.grad(lambda v: log1mexp(v).sum())(mx.array(FAR_AND_NEAR))
    assert np.array(slopes) == pytest.approx(np.exp(x) / np.expm1(x), rel=1e-5)


def test_a_certain_completion_counts_as_a_millionth_from_certain():
    assert log1mexp(mx.array([0.0, -1e-9, 1e-9])).tolist() == pytest.approx([math.log(1e-6)] * 3, rel=1e-5)


def test_expm1_is_accurate_near_0_and_bounded_far_away():
    values = [-30.0, -2.0, -0.5, -0.4, -1e-6, 1e-6, 0.4, 0.5, 3.0]
    assert np.array(bounded_expm1(mx.array(values))) == pytest.approx(np.expm1(exact(values)), rel=1e-6)
    assert bounded_expm1(mx.array([100.0, 1e6])).tolist() == pytest.approx([math.exp(40)] * 2, rel=1e-5)
    slopes = mx.grad(lambda v: bounded_expm1(v).sum())(mx.array(values))
    assert np.array(slopes) == pytest.approx(np.exp(exact(values)), rel=1e-6)


def test_a_shaped_reward_hand_worked():
    """p = 1/e: (1 - e^alpha) / alpha, and log p itself at alpha = 0."""
    logp = mx.array([-1.0])
    assert shaped_reward(logp, 0).tolist() == [-1.0]
    assert shaped_reward(logp, 1).item() == pytest.approx(1 - math.e, rel=1e-6)
    assert shaped_reward(logp, 0.5).item() == pytest.approx((1 - math.exp(0.5)) / 0.5, rel=1e-6)
    assert shaped_reward(logp, -1).item() == pytest.approx(math.exp(-1) - 1, rel=1e-6)


def test_without_a_reference_its_beginnings_are_nothing_too():
    ones = mx.ones((1,))
    both = mx.ones((2, 1))
    free = without_reference(Pairs(ones, ones, ones, ones, ones, ones, shared=both, ref_shared=both))
    assert free.ref_chosen.tolist() == free.ref_rejected.tolist() == [0.0]
    assert free.ref_shared.tolist() == [[0.0], [0.0]] and free.shared.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize(
    ("name", "statistics", "logps", "paired", "mismatched", "per_token"),
    [
        ("sigmoid", False, False, True, False, False),
        ("sigmoid+sft", True, False, True, False, False),
        ("sigmoid+aot", True, True, True, False, False),
        ("aot+sft", True, True, True, False, False),
        ("simpo", False, False, True, False, True),
        ("kto", True, True, False, True, False),
        ("kto+apo_zero_unpaired", True, True, False, True, False),
        ("apo_zero_unpaired", False, False, False, False, False),
    ],
)
def test_what_a_sum_asks_of_a_step(name, statistics, logps, paired, mismatched, per_token):
    """One term that looks at all pairs, or that needs strangers' completions, is enough."""
    loss = resolve(LossConfig(name=name))
    assert (loss.needs_step_statistics, loss.needs_step_logps, loss.paired) == (statistics, logps, paired)
    assert (loss.mismatched, loss.per_token) == (mismatched, per_token)


def test_an_objectives_family_is_the_file_it_stands_in():
    files = {**dict.fromkeys(("difference", "separate", "ranked"), "pairwise"), "reference-free": "reference_free"}
    for name, objective in LOSSES.items():
        file = {"wdpo": "winsorized"}.get(name, files.get(objective.family, objective.family))
        assert objective.function.__module__ == f"mlxdpo.losses.{file}", name


@pytest.mark.parametrize("name", [n for n, o in LOSSES.items() if o.paired and n != "sft"])
def test_means_over_tokens_do_not_see_a_text_repeated(name):
    """Twice the tokens at twice the log-probs have the same means; imitation alone compares nothing."""
    numbers = ([-6.0, -8.0], [-9.0, -5.0], [-7.0, -6.0], [-8.0, -6.0], [2.0, 3.0], [3.0, 2.0])
    loss = resolve(LossConfig(name=name))
    once, twice = (loss(Pairs(*(mx.array(n) * k for n in numbers))) for k in (1, 2))
    assert mx.allclose(once, twice, rtol=1e-5).item() == LOSSES[name].per_token


def test_what_is_looked_at_is_said():
    """`entries` vectors; of lengths alone where other log-probs give the same, else of log-probs."""
    numbers = ([-6.0, -8.0], [-9.0, -5.0], [-7.0, -6.0], [-8.0, -6.0], [2.0, 3.0], [3.0, 2.0])
    pairs = Pairs(*map(mx.array, numbers), desirable=mx.ones((2,)))
    others = pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen + 3.0)
    for name, objective in LOSSES.items():
        if objective.step_statistics is None:
            assert (objective.over, objective.entries) == ("", 1), name
            continue
        knobs = resolve(LossConfig(name=name)).terms[0].knobs
        both = (p if objective.paired else unpaired_rows(p) for p in (pairs, others))
        seen, again = (objective.statistics_of(p, knobs) for p in both)
        same = all(mx.array_equal(a, b).item() for a, b in zip(seen, again, strict=True))
        assert objective.over == ("lengths" if same else "log-probs"), name
        assert len(seen) == objective.entries and all(v.shape == (2,) for v in seen), name


def test_facts_of_two_objectives():
    hinge, kto = facts("hinge"), facts("kto")
    assert (hinge["formula"], hinge["rows"], hinge["over"]) == ("max(0, 1 - beta d)", "pairs", "")
    formula = "D (1 - s(beta (r - z))) for a thumb up, U (1 - s(beta (z - r))) for a thumb down"
    assert (kto["formula"], kto["rows"], kto["over"]) == (formula, "thumbs", "log-probs")
    assert (
        set(hinge)
        == set(kto)
        == {
            *(
                "name",
                "title",
                "arxiv",
                "formula",
                "knobs",
                "start",
                "rows",
                "reference",
                "lifts",
                "over",
                "use",
                "refuses",
            )
        }
    )


def test_what_is_reported_besides():
    found = {name: objective.reports for name, objective in LOSSES.items() if objective.reports}
    assert found == {"sft": imitation, "cpo": imitation, "orpo": odds}


def test_margins_of_rows_leave_no_constant_to_start_from():
    assert resolve(LossConfig()).start() == pytest.approx(math.log(2))
    assert resolve(LossConfig(), ["margin"]).start() is None
    assert resolve(LossConfig(), ["weight"]).start() == pytest.approx(math.log(2))


def test_imitation_beside_another_objective_hides_no_refusal_of_that():
    with pytest.raises(UserError, match="margin does not apply to ipo"):
        resolve(LossConfig(name="sft+ipo"), ["margin"])


def test_a_knob_without_effect_is_told_what_has_one():
    with pytest.raises(UserError, match=r"which takes: beta, label_smoothing$"):
        resolve(LossConfig(gamma=3.0))
    with pytest.raises(UserError, match=r"which takes: nothing$"):
        resolve(LossConfig(name="sft", beta=0.5))


def columns(chosen, rejected, chosen_len=(1, 1), rejected_len=(1, 1)):
    names = ("chosen", "rejected", "chosen_len", "rejected_len")
    values = (chosen, rejected, chosen_len, rejected_len)
    return SimpleNamespace(**{n: np.array(v, np.float64) for n, v in zip(names, values, strict=True)})


def test_what_imitation_and_odds_report_hand_worked():
    """Mean token probabilities 1/2, 1/2 of the chosen and 1/4, 1/2 of the rejected: odds 1 against 1/3, 1 against 1.
    Log-sigmoids of log 3 and 0: -log(4/3) and -log 2. The chosen ones' 3 tokens have log-prob -log 2 each."""
    half, quarter = math.log(0.5), math.log(0.25)
    scored = columns([2 * half, half], [3 * quarter, half], [2, 1], [3, 1])
    assert imitation(scored) == {"nll_loss": pytest.approx(math.log(2))}
    assert odds(scored) == {
        "nll_loss": pytest.approx(math.log(2)),
        "log_odds_chosen": pytest.approx(math.log(3) / 2),
        "log_odds_ratio": pytest.approx(-(math.log(4 / 3) + math.log(2)) / 2),
    }


def rewards(chosen, rejected, **extras):
    one = mx.ones((1,))
    return Pairs(mx.array([chosen]), mx.array([rejected]), one, one, one, one, **extras)


def test_reward_loss_hand_worked():
    """Rewards 2 and 1/2: log(1 + e^-1.5); with margin 1/2 log(1 + e^-1), to which center .1 adds .1 * 2.5^2."""
    assert bradley_terry(rewards(2.0, 0.5)).item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-6)
    want = math.log1p(math.exp(-1)) + 0.625
    assert bradley_terry(rewards(2.0, 0.5), margin=0.5, center=0.1).item() == pytest.approx(want, rel=1e-6)
    loss = reward_loss(0.5, 0.1)
    assert loss(rewards(2.0, 0.5)).item() == pytest.approx(want, rel=1e-6)
    assert loss.start() == pytest.approx(math.log1p(math.exp(0.5))) and loss.needs == frozenset() and loss.paired
    assert loss.terms[0].name == "bradley_terry" and OBJECTIVE.paper == "2203.02155"


def test_a_reward_models_rows_bring_margins_and_weights():
    loss = reward_loss(0.0, 0.0, ["margin", "weight", "prompt"])
    rows = rewards(2.0, 0.5, margin=mx.array([0.5]), weight=mx.array([3.0]))
    assert loss(rows).item() == pytest.approx(3 * math.log1p(math.exp(-1)), rel=1e-6)
    assert loss.extra_columns == {"margin", "weight"}
    with pytest.raises(UserError, match="probability does not apply in stage reward"):
        reward_loss(0.0, 0.0, ["probability"])


def test_what_a_reward_model_reports():
    found = reward_range(columns([3.0, 1.0], [-2.0, 0.0]))
    assert found == {"min_reward": -2.0, "mean_reward": 0.5, "max_reward": 3.0}
    assert OBJECTIVE.reports is reward_range


def test_sparsemax_by_hand():
    """(1, .5, 0): two are kept, (1 + .5 - 1) / 2 = .25 is taken off each. Far apart one takes all; equal ones share."""
    assert sparsemax(mx.array([1.0, 0.5, 0.0])).tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert sparsemax(mx.array([0.0, 9.0, -3.0])).tolist() == pytest.approx([0.0, 1.0, 0.0])
    assert sparsemax(mx.full(4, -7.0)).tolist() == pytest.approx([0.25] * 4)


def pairs_with_rewards(z):
    """Pairs whose reward leads are z at beta 1."""
    zero = mx.zeros(len(z))
    return Pairs(mx.array(z) - 50, zero - 50, zero - 50, zero - 50, zero + 4, zero + 4)


def test_the_two_stages_of_wdpo_by_hand():
    """z = (-2, -1, 1, 3). Scores 2, 1, 0, 0: sparsemax gives all to the first, an eighth of four pairs is q = .5. Then
    m = .5 (2.1269280 + .1269280), 1.3132617, .3132617, .0485874; the .7 quantile is a tenth of the way from the
    third to the fourth of them, 1.1455614; mean s(-z / 1.75) = .4777031, so w = .02 + .48 * .4777031 = .2492975 of
    four pairs, all for the second."""
    pairs = pairs_with_rewards([-2.0, -1.0, 1.0, 3.0])
    q, r, threshold = winsor_weights(pairs, 1.0, 0.125, 0.5)
    assert q.tolist() == pytest.approx([0.5, 0, 0, 0], abs=1e-6)
    assert r.tolist() == pytest.approx([0, 0.9971900, 0, 0], abs=1e-5)
    assert threshold.tolist() == pytest.approx([1.1455614] * 4, abs=1e-6)
    values = wdpo(pairs, beta=1.0, flip_budget=0.125)
    assert values.tolist() == pytest.approx([1.126928, 1.1460326, 0.3132617, 0.0485874], abs=1e-5)
    slopes = mx.grad(lambda c: wdpo(pairs._replace(chosen=c), beta=1.0, flip_budget=0.125).sum())(pairs.chosen)
    s = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    wanted = [0.5 * (s(-2) - s(2)), -(1 - 0.9971900) * s(1), -s(-1), -s(-3)]
    assert slopes.tolist() == pytest.approx(wanted, abs=1e-5)


def test_what_a_full_flip_cuts_off_goes_to_the_others():
    """Scores 2, 1.5, 0, 0: sparsemax (.75, .25, 0, 0), times .4 of four pairs 1.2 and .4; the first keeps 1, and .2
    goes to the second."""
    q = winsor_weights(pairs_with_rewards([-2.0, -1.5, 1.0, 3.0]), 1.0, 0.4, 0.5)[0]
    assert q.tolist() == pytest.approx([1.0, 0.6, 0, 0], abs=1e-6)
    won = winsor_weights(pairs_with_rewards([2.0, 1.5]), 1.0, 0.4, 0.5)[0]
    assert won.tolist() == [0, 0]
