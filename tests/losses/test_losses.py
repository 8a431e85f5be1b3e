"""Every registered objective and every modifier: hand-worked values, an independent float64 version, symmetries, start
values, extremes. The tests walk the registry, so an objective without its golden row or formula fails."""

import inspect
import itertools
import math
import re

import formulas
import mlx.core as mx
import numpy as np
import pytest
from goldens import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_pairs import TOLERANCE, on_device, random_pairs, slopes_of, worst

from mlxdpo.config import OWN, LossConfig
from mlxdpo.losses import LOSSES, resolve
from mlxdpo.losses.loss import EXTRA_COLUMNS, SWITCHES
from mlxdpo.losses.modifiers import MODIFIERS, unpaired_rows
from mlxdpo.types import Pairs, UserError

NAMES = sorted(LOSSES)
PAIRED = [name for name in NAMES if LOSSES[name].paired]
PAIR = Pairs(*(mx.array([v]) for v in (-10.0, -12.0, -11.0, -11.0, 4.0, 5.0)), desirable=mx.array([1.0]))


def call(name, pairs, **knobs):
    return LOSSES[name](pairs if LOSSES[name].paired else unpaired_rows(pairs), **knobs)


def with_beta(name, beta, **knobs):
    return resolve(LossConfig(name=name, **({"beta": beta} if "beta" in LOSSES[name].knobs else {}), **knobs))


def bound(name):
    """wDPO's weights are differences of a step's losses, in which float32 loses a digit."""
    return 5 * TOLERANCE if name == "wdpo" else TOLERANCE


def compare(config, said=(), seed=1):
    """Worst relative error of mean, each pair's value and slopes against the independent version."""
    loss, wide = resolve(config, said), random_pairs(seed)
    pairs = on_device(wide)
    values = np.array(loss(pairs), np.float64)
    wanted = formulas.total(wide, config, wide, said)
    if "ranked" in {term.objective.family for term in loss.terms}:  # another order of the same numbers
        values, wanted = np.array([values.sum()]), np.array([wanted.sum()])
    return worst([values, *slopes_of(loss, pairs)], [wanted, *formulas.slopes(wide, config, said)])


def test_every_objective_has_a_golden_row_and_a_formula():
    assert set(GOLDENS) == set(formulas.FORMULAS) == set(LOSSES)


@pytest.mark.parametrize("name", NAMES)
def test_hand_worked_values_and_slopes(name):
    for golden in GOLDENS[name]:
        pair = PAIR._replace(**{field: mx.array([value]) for field, value in (golden.changes or {}).items()})
        assert call(name, pair, **golden.knobs).item() == pytest.approx(golden.value, abs=1e-6)
        chosen, rejected = slopes_of(lambda p, g=golden: call(name, p, **g.knobs), pair)
        assert chosen == pytest.approx([golden.by_chosen], abs=1e-6)
        assert rejected == pytest.approx([golden.by_rejected], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5])
def test_value_and_gradient_equal_an_independent_float64_version(name, beta):
    errors = [compare(with_beta(name, beta).config, seed=seed) for seed in (1, 2)]
    assert max(errors) <= bound(name)


OTHER = {
    "beta": 0.35, "label_smoothing": 0.2, "flip_budget": 0.3, "winsor_budget": 0.9,
    "discopop_tau": 0.7, "dpop_lambda": 3.0, "length_alpha": 0.1,
    "cpo_alpha": 0.2, "gamma": 0.7, "alphapo_alpha": -0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_knob_moves_the_loss_as_its_formula_says(name):
    plain = resolve(LossConfig(name=name))
    pairs = on_device(random_pairs(3))
    for knob in LOSSES[name].knobs:
        config = LossConfig(name=name, **{knob: OTHER[knob]})
        assert compare(config) <= bound(name), knob
        gap = mx.abs(resolve(config)(pairs) - plain(pairs)).max().item()
        assert gap > 1e-2, knob


def test_every_knob_belongs_to_an_objective_or_a_modifier():
    taken = {knob for objective in LOSSES.values() for knob in objective.knobs}
    assert taken == set(OTHER) == set(LossConfig.model_fields) - {"name", "weights", "f_alpha", *SWITCHES}


@pytest.mark.parametrize("name", NAMES)
def test_knobs_of_the_function_and_of_the_recipe_have_the_same_defaults(name):
    config = LossConfig(name=name)
    for knob, parameter in inspect.signature(LOSSES[name].function).parameters.items():
        if knob in LOSSES[name].knobs and parameter.default is not parameter.empty:
            assert parameter.default == getattr(config, knob), knob
    assert set(OWN.get(name, {})) <= set(LOSSES[name].knobs)


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_names_its_paper(name):
    assert re.fullmatch(r"\d{4}\.\d{5}", LOSSES[name].paper)
    assert LOSSES[name].paper in (inspect.getdoc(LOSSES[name].function) or "") or name == "aot_unpaired"


MODIFIED = {
    "f_divergence": [
        {"f_divergence": "forward_kl"},
        {"f_divergence": "js_divergence"},
        {"f_divergence": "alpha_divergence"},
        {"f_divergence": "alpha_divergence", "f_alpha": 1.5},
        {"f_divergence": "alpha_divergence", "f_alpha": 1.0},
    ],
    "ld_alpha": [{"ld_alpha": 0.0}, {"ld_alpha": 0.4}],
    "wpo": [{"wpo": True}],
    "reference_free": [{"reference_free": True}],
    "probability": [{}],
    "weight": [{}],
    "margin": [{}],
}


def refused(name, modifier):
    return LOSSES[name].refuses.get(modifier)


@pytest.mark.parametrize("modifier", sorted(MODIFIERS))
@pytest.mark.parametrize("name", NAMES)
def test_modifiers_equal_their_formulas_or_are_refused_with_the_reason(name, modifier):
    said = (modifier,) if modifier in EXTRA_COLUMNS else ()
    for knobs in MODIFIED[modifier]:
        config = with_beta(name, 0.1).config.model_copy(update=knobs)
        if reason := refused(name, modifier):
            with pytest.raises(UserError, match=rf"{modifier}.* does not apply to {name}: {re.escape(reason)}"):
                resolve(config, said)
            continue
        assert compare(config, said) <= bound(name), knobs
        pairs = on_device(random_pairs(1))
        if knobs.get("f_alpha") != 1.0:  # that one is reverse KL
            values, plain = resolve(config, said)(pairs), with_beta(name, 0.1)(pairs)
            assert mx.abs(values - plain).max().item() > 1e-3


def test_every_modifier_is_tried():
    assert set(MODIFIED) == set(MODIFIERS) == {*SWITCHES, *EXTRA_COLUMNS}
    assert all(set(objective.refuses) <= set(MODIFIERS) for objective in LOSSES.values())


@pytest.mark.parametrize(
    ("name", "weights", "knobs", "said"),
    [
        ("sigmoid+sft", [1.0, 0.1], {}, ()),  # RPO
        ("sigmoid+bco_pair+sft", [0.8, 0.2, 1.0], {}, ()),  # MPO
        ("ipo+sigmoid", [], {"f_divergence": "js_divergence"}, ()),
        ("sigmoid+sft", [1.0, 0.3], {"ld_alpha": 0.5, "wpo": True, "label_smoothing": 0.1}, EXTRA_COLUMNS),
        ("sigmoid", [], {"ld_alpha": 0.4, "reference_free": True}, ()),
        ("hinge", [], {"ld_alpha": 0.4, "f_divergence": "js_divergence"}, ("margin",)),
        ("aot+aot_unpaired+sft", [1.0, 2.0, 0.5], {}, ()),
        ("kto+apo_zero_unpaired", [1.0, 0.5], {"desirable_weight": 1.3}, ("weight",)),
    ],
)
def test_weighted_sums_and_stacked_modifiers(name, weights, knobs, said):
    assert compare(LossConfig(name=name, weights=weights, **knobs), said) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_value_where_policy_and_reference_agree(name, beta):
    loss, wide = with_beta(name, beta), random_pairs(4)
    pairs = on_device(wide._replace(ref_chosen=wide.chosen, ref_rejected=wide.rejected))
    values = np.array(loss(pairs))
    if loss.start() is None:
        assert np.ptp(values) > 1e-3  # no constant could be stated
    elif loss.terms[0].objective.family == "ranked":
        assert values.mean() == pytest.approx(loss.start(), rel=1e-5)
    else:
        assert values == pytest.approx([loss.start()] * len(values), rel=1e-5)


def test_start_values_of_the_papers():
    at = lambda name, **knobs: resolve(LossConfig(name=name, **knobs)).start()  # noqa: E731
    for name in ("sigmoid", "robust", "aot", "sigmoid_norm", "dpop"):
        assert at(name) == pytest.approx(0.693147, abs=1e-6)
    assert at("nca_pair") == at("bco_pair") == pytest.approx(1.386294, abs=1e-6)
    assert at("hinge") == at("apo_zero") == at("apo_down") == 1
    assert (at("ipo"), at("sppo_hard")) == (pytest.approx(25), pytest.approx(50))
    assert at("discopop") == pytest.approx(0.846574, abs=1e-6)
    assert at("exo_pair") == pytest.approx(2.761231, abs=1e-6)
    assert at("kto") == at("apo_zero_unpaired") == 0.5
    assert at("sigmoid+bco_pair", weights=[0.8, 0.2]) == pytest.approx(0.8 * 0.693147 + 0.2 * 1.386294, abs=1e-6)
    assert at("sigmoid+sft") is None and at("sigmoid", wpo=True) is None


def far_pairs(margin):
    """Two pairs whose log-ratios differ by `margin`, by the chosen or by the rejected completion; log-probs below 0."""
    near, far = mx.array([-10.0, -10.0]), -1e4 - 10
    one, other = mx.array([far, -10.0]), mx.array([-10.0, far])
    policy, ref = ([near, one], [other, near]) if margin > 0 else ([one, near], [near, other])
    both = mx.stack(policy) / 2
    return Pairs(
        *policy, *ref, mx.array([4.0, 4.0]), mx.array([5.0, 5.0]),
        label=mx.array([0.5, 0.9]), weight=mx.array([2.0, 1.0]), margin=mx.array([0.5, 0.0]),
        desirable=mx.array([1.0, 0.0]), shared=both, ref_shared=both, squares=mx.full((2, 2), -3.0),
    )  # fmt: skip


EXTREMES = [(name, {}, ()) for name in NAMES] + [
    (name, knobs, (modifier,) if modifier in EXTRA_COLUMNS else ())
    for name, modifier in itertools.product(NAMES, MODIFIED)
    for knobs in MODIFIED[modifier]
    if not refused(name, modifier)
]


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_finite_values_and_slopes_at_extreme_margins(margin):
    pairs = far_pairs(margin)
    d = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
    assert d.tolist() == pytest.approx([margin] * 2)
    for (name, knobs, said), beta in itertools.product(EXTREMES, (0.1, 1.0)):
        loss = resolve(with_beta(name, beta).config.model_copy(update=knobs), said)
        values = np.array(loss(pairs))
        assert np.isfinite(values).all(), (name, knobs)
        assert np.isfinite(slopes_of(loss, pairs)).all(), (name, knobs)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(shift=st.floats(-30, -1), d=st.floats(-9, 9))
def test_shifting_policy_and_reference_together_changes_nothing(name, shift, d):
    """Where there is a reference. Without one, shifting that alone changes nothing."""
    pairs, loss = PAIR._replace(chosen=PAIR.chosen + d), with_beta(name, 0.3)
    by = [shift] * 4 if LOSSES[name].reference else [0, 0, shift, shift]
    moved = pairs._replace(**{n: getattr(pairs, n) + s for n, s in zip(Pairs._fields[:4], by, strict=True)})
    assert loss(moved).item() == pytest.approx(loss(pairs).item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", PAIRED)
def test_slopes_are_opposite_exactly_where_the_difference_alone_counts(name):
    found = slopes_of(with_beta(name, 0.3), on_device(random_pairs(5)))
    gap = abs(found[0] + found[1]).max() / abs(found[0]).max()
    assert (gap < 1e-6) == LOSSES[name].opposite


@pytest.mark.parametrize("name", [name for name in PAIRED if not refused(name, "probability")])
def test_a_pair_with_label_p_is_the_swapped_pair_with_label_1_minus_p(name):
    loss = resolve(
        with_beta(name, 0.2).config, ("probability", "margin") if not refused(name, "margin") else EXTRA_COLUMNS[:1]
    )
    wide = random_pairs(6)
    there = on_device(wide)
    back = on_device(formulas.exchanged(wide)._replace(label=1 - wide.label))
    assert np.array(loss(there)) == pytest.approx(np.array(loss(back)), rel=1e-5, abs=1e-5)
    by_chosen, by_rejected = slopes_of(loss, there)
    swapped = slopes_of(loss, back)
    assert by_chosen == pytest.approx(swapped[1], rel=1e-4, abs=1e-6)
    assert by_rejected == pytest.approx(swapped[0], rel=1e-4, abs=1e-6)


def test_soft_labels_of_one_half_and_smoothing_are_the_same():
    pairs = on_device(random_pairs(7))
    soft = resolve(LossConfig(), ("probability",))(pairs._replace(label=mx.full(16, 0.8)))
    assert soft.tolist() == pytest.approx(resolve(LossConfig(label_smoothing=0.2))(pairs).tolist(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_loss_per_pair_independent_of_the_others_but_for_what_was_looked_at(name):
    pairs, loss = on_device(random_pairs(8, count=7)), with_beta(name, 0.2)
    seen, together = loss.step_statistics(pairs), loss(pairs).tolist()
    one = lambda i: Pairs(*(None if a is None else a[..., i : i + 1] for a in pairs))  # noqa: E731
    alone = [loss(one(i), None if seen is None else seen[:, i : i + 1]).item() for i in range(7)]
    assert together == pytest.approx(alone, rel=1e-6)
    assert (seen is None) == (LOSSES[name].step_statistics is None)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_said_to_lift_pull_up_a_chosen_completion_that_fell(name):
    """a = -4, b = -84: the pair is won by far, and the chosen completion fell below the reference."""
    values = (-14.0, -95.0, -10.0, -11.0, 4.0, 5.0)
    fallen = Pairs(*(mx.array([v]) for v in values), desirable=mx.array([1.0]))
    by_chosen, by_rejected = (slope.item() for slope in slopes_of(with_beta(name, 0.5), fallen))
    # Not only away from the rejected one: `robust` still pulls both apart here.
    assert (by_chosen < -0.01 and by_chosen + by_rejected < -0.01) == LOSSES[name].lifts


def test_margins_raise_the_bar():
    pairs = on_device(random_pairs(9))
    for name in (n for n in PAIRED if not refused(n, "margin")):
        config = with_beta(name, 0.2).config
        low, high = (
            resolve(config, ("margin",))(pairs._replace(margin=mx.full(16, m))).sum().item() for m in (0.0, 1.0)
        )
        assert low == pytest.approx(resolve(config)(pairs._replace(margin=None)).sum().item()) and high > low


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"name": "dpo"}, "loss.name `dpo` is unknown; known: sigmoid, ipo, hinge"),
        ({"name": "ipo", "label_smoothing": 0.1}, "loss.label_smoothing 0.1 has no effect on `ipo`, which takes: beta"),
        ({"name": "sft", "beta": 0.2}, "loss.beta 0.2 has no effect on `sft`, which takes: nothing"),
        ({"f_alpha": 2.0}, "loss.f_alpha 2.0 has no effect without loss.f_divergence alpha_divergence"),
        ({"name": "sigmoid+kto"}, "loss.name sigmoid+kto mixes pairs with single completions; of these kto reads"),
        ({"name": "sigmoid+sft", "weights": [1.0]}, "loss.weights has 1 numbers for the 2 objectives of sigmoid+sft"),
        ({"name": "exo_pair", "label_smoothing": 0.0}, "exo_pair needs loss.label_smoothing above 0"),
        (
            {"reference_free": True, "f_divergence": "js_divergence"},
            "loss.f_divergence scores log-ratios to a reference; drop it or loss.reference_free",
        ),
        ({"name": "sigmoid+aot", "wpo": True}, "loss.wpo True does not apply to aot: it sorts the values of a step"),
    ],
)
def test_what_has_no_effect_or_makes_no_sense_is_refused(knobs, sentence):
    with pytest.raises(UserError) as error:
        resolve(LossConfig(**knobs))
    assert str(error.value).startswith(sentence)


def test_an_objective_brings_its_own_defaults_which_a_recipe_overrides():
    assert (LossConfig(name="simpo").beta, LossConfig(name="simpo").gamma) == (2.0, 1.0)
    assert LossConfig(name="simpo", beta=3.0).beta == 3.0
    assert "beta" not in LossConfig(name="simpo").model_fields_set  # so a command line does not override a recipe's
    assert LossConfig(name=["sigmoid", "sft"]).name == "sigmoid+sft"
    assert resolve(LossConfig(name="sigmoid", beta=0.2)).terms[0].knobs == {"beta": 0.2, "label_smoothing": 0.0}


def test_needs_of_a_loss():
    needs = lambda **knobs: resolve(LossConfig(**knobs)).needs  # noqa: E731
    assert needs() == {"reference"} and needs(name="simpo") == set() and needs(reference_free=True) == set()
    assert needs(name="sigmoid+sft", ld_alpha=0.5, wpo=True) == {"reference", "shared", "squares"}
    assert math.isclose(resolve(LossConfig()).start(), math.log(2))
