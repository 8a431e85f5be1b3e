"""Every objective by name. Adding one: a function in its family's file, an entry here, and in the tests a golden row
and a formula (`tests/support`); `mlxdpo objectives`, the tables and the checks follow.
"""

from __future__ import annotations

import math
from typing import Any

from mlxdpo.losses import pairwise, reference_free, unpaired, winsorized
from mlxdpo.losses.objective import Objective

# Which modifiers make no sense for which family of objectives, and why: halves of sentences about an objective.

TOKEN_MEANS = "it compares means over tokens, which the longer completion's tail does not inflate"
ALONE = "it weighs each log-ratio by itself, and without a reference those have no zero"
IMITATES = "it has an imitation term, which is not a comparison"
SORTED = "it sorts the values of a step, so they no longer belong to single pairs"
SINGLE = "it reads single completions"
NO_REFERENCE = "it has no log-ratio to a reference"

DIFFERENCE_OF_TOKENS = {"ld_alpha": TOKEN_MEANS}
SEPARATE = {
    "f_divergence": "its targets are defined for log-ratios, not for scores of them",
    "reference_free": ALONE,
    "margin": "it has no reward difference to add a margin to",
}
RANKED = {
    "f_divergence": "it compares distributions of log-ratios, not scores",
    **dict.fromkeys(("wpo", "probability", "weight", "margin"), SORTED),
}
REFERENCE_FREE = {
    "f_divergence": NO_REFERENCE,
    "reference_free": "it has no reference",
    "ld_alpha": TOKEN_MEANS,
}
IMITATING = REFERENCE_FREE | dict.fromkeys(("ld_alpha", "wpo", "probability"), IMITATES)
UNPAIRED = {
    "f_divergence": "its targets are defined for log-ratios, not for scores of them",
    "reference_free": ALONE,
    **dict.fromkeys(("ld_alpha", "wpo", "probability", "margin"), SINGLE),
}


LN2 = math.log(2)


def _fixed(value: float) -> Any:
    return lambda **knobs: value


def _exo(*, label_smoothing: float, **knobs: Any) -> float:
    return -LN2 - 0.5 * math.log(label_smoothing * (1 - label_smoothing))


def _mean_weight(*, desirable_weight: float, undesirable_weight: float, **knobs: Any) -> float | None:
    """Half the weight of every row; with two different weights it depends on how many thumbs are up."""
    return desirable_weight / 2 if desirable_weight == undesirable_weight else None


LOSSES: dict[str, Objective] = {
    "sigmoid": Objective(
        pairwise.sigmoid,
        "DPO; conservative DPO with label_smoothing",
        "2305.18290",
        "difference",
        _fixed(LN2),
        "the default; label_smoothing where labels are noisy",
        opposite=True,
    ),
    "ipo": Objective(
        pairwise.ipo,
        "IPO, length-averaged",
        "2310.12036",
        "difference",
        lambda *, beta: 1 / (4 * beta**2),
        "little or clean data: it stops at a margin of 1/(2 beta) nats a token instead of growing it indefinitely",
        per_token=True,
        refuses=DIFFERENCE_OF_TOKENS | {"margin": "its target 1/(2 beta) is the margin"},
    ),
    "hinge": Objective(
        pairwise.hinge,
        "hinge on implicit rewards (SLiC, RSO)",
        "2305.10425",
        "difference",
        _fixed(1.0),
        "pairs won by a sufficient margin have no gradient",
        opposite=True,
    ),
    "sigmoid_norm": Objective(
        pairwise.sigmoid_norm,
        "DPO on token means (Tulu 3, OLMo 2)",
        "2411.15124",
        "difference",
        _fixed(LN2),
        "answers of very different length; beta is larger than DPO's, as token means are smaller than sums",
        per_token=True,
        refuses=DIFFERENCE_OF_TOKENS,
    ),
    "exo_pair": Objective(
        pairwise.exo_pair,
        "EXO: reverse KL to the label's distribution",
        "2402.00856",
        "difference",
        _exo,
        "prefers one good answer over covering all",
        opposite=True,
        refuses={"probability": "label_smoothing is the label's distribution in it"},
    ),
    "robust": Objective(
        pairwise.robust,
        "rDPO: unbiased under flipped labels",
        "2403.00409",
        "difference",
        _fixed(LN2),
        "a known share of labels is flipped",
        opposite=True,
    ),
    "fa_dpo": Objective(
        pairwise.fa_dpo,
        "FA-DPO: the likelihood of labels that may be flipped",
        "2512.00709",
        "difference",
        _fixed(LN2),
        "each row has the probability that its label is right (`mlxdpo data audit` estimates it)",
        opposite=True,
        reads_label=True,
    ),
    "wdpo": Objective(
        winsorized.wdpo,
        "wDPO: few labels flipped in part, large losses drawn in",
        "2603.07211",
        "difference",
        _fixed(LN2),
        "some labels are wrong or say little, and no row says which; needs many pairs a step",
        step_statistics=winsorized.winsor_weights,
        entries=3,
        over="log-probs",
        opposite=True,
        refuses={
            "probability": "it decides itself which labels are flipped",
            "margin": "its thresholds are those of losses without a margin",
        },
    ),
    "discopop": Objective(
        pairwise.discopop,
        "DiscoPOP: log-ratio modulated loss",
        "2406.08414",
        "difference",
        _fixed(0.5 * LN2 + 0.5),
        "an objective found by search; stronger than DPO on pairs that are nearly even",
        opposite=True,
    ),
    "dpop": Objective(
        pairwise.dpop,
        "DPO-Positive (Smaug)",
        "2402.13228",
        "difference",
        _fixed(LN2),
        "chosen and rejected differ by a few tokens, where DPO lowers both",
        lifts=True,
        refuses={
            "f_divergence": "its penalty is defined for the log-ratio, not for a score of it",
            "reference_free": ALONE,
        },
    ),
    "r_dpo": Objective(
        pairwise.r_dpo,
        "length-regularised DPO",
        "2403.19159",
        "difference",
        None,
        "the policy's answers get longer without getting better",
        opposite=True,
    ),
    "nca_pair": Objective(
        pairwise.nca_pair,
        "NCA on pairs",
        "2402.05369",
        "separate",
        _fixed(2 * LN2),
        "the chosen answers' likelihood must not fall",
        lifts=True,
        refuses=SEPARATE,
    ),
    "bco_pair": Objective(
        pairwise.bco_pair,
        "BCO on pairs, without reward shift",
        "2404.04656",
        "separate",
        _fixed(2 * LN2),
        "chosen answers are good and rejected ones bad in absolute terms",
        lifts=True,
        refuses=SEPARATE,
    ),
    "sppo_hard": Objective(
        pairwise.sppo_hard,
        "SPPO with win probabilities 1 and 0",
        "2405.00675",
        "separate",
        lambda *, beta: 1 / (2 * beta**2),
        "rounds of on-policy pairs; the target log-ratios are +-1/(2 beta)",
        lifts=True,
        refuses=SEPARATE,
    ),
    "apo_zero": Objective(
        pairwise.apo_zero,
        "APO-zero",
        "2408.06266",
        "separate",
        _fixed(1.0),
        "chosen answers are better than the policy's own",
        lifts=True,
        refuses=SEPARATE,
    ),
    "apo_down": Objective(
        pairwise.apo_down,
        "APO-down",
        "2408.06266",
        "separate",
        _fixed(1.0),
        "chosen answers are worse than the policy's own: both likelihoods fall, by design",
        refuses=SEPARATE,
    ),
    "aot": Objective(
        pairwise.aot,
        "AOT on pairs",
        "2406.05882",
        "ranked",
        _fixed(LN2),
        "the preference should hold in distribution; needs many pairs a step",
        step_statistics=pairwise.aot_matches,
        over="log-probs",
        opposite=True,
        refuses=RANKED,
    ),
    "aot_unpaired": Objective(
        pairwise.aot_unpaired,
        "AOT across pairs",
        "2406.05882",
        "ranked",
        _fixed(LN2),
        "chosen and rejected answers of different prompts; needs many pairs a step",
        step_statistics=pairwise.aot_unpaired_matches,
        entries=2,
        over="log-probs",
        refuses=RANKED | {"reference_free": ALONE},
    ),
    "sft": Objective(
        reference_free.sft,
        "imitation of the chosen completions (token mean)",
        "2404.19733",
        "reference-free",
        None,
        "a term added to another objective (RPO, MPO), which keeps the chosen answers likely",
        step_statistics=reference_free.mean_length,
        over="lengths",
        reports=reference_free.imitation,
        lifts=True,
        refuses=IMITATING | {"margin": IMITATES},
    ),
    "cpo": Objective(
        reference_free.cpo,
        "CPO",
        "2401.08417",
        "reference-free",
        None,
        "no reference and no SFT stage before",
        step_statistics=reference_free.mean_length,
        over="lengths",
        reports=reference_free.imitation,
        lifts=True,
        refuses=IMITATING,
    ),
    "orpo": Objective(
        reference_free.orpo,
        "ORPO",
        "2403.07691",
        "reference-free",
        None,
        "SFT and preferences in one run from a base model",
        step_statistics=reference_free.mean_length,
        over="lengths",
        reports=reference_free.odds,
        lifts=True,
        per_token=True,
        refuses=IMITATING | {"margin": "it compares odds, not rewards"},
    ),
    "simpo": Objective(
        reference_free.simpo,
        "SimPO",
        "2405.14734",
        "reference-free",
        None,
        "no reference, answers of different length; sensitive to beta, gamma and the learning rate",
        per_token=True,
        refuses=REFERENCE_FREE,
    ),
    "alphapo": Objective(
        reference_free.alphapo,
        "AlphaPO: SimPO with a shaped reward",
        "2501.03884",
        "reference-free",
        None,
        "SimPO with control over how far likelihoods fall",
        per_token=True,
        refuses=REFERENCE_FREE,
    ),
    "kto": Objective(
        unpaired.kto,
        "KTO: thumbs up and down",
        "2402.01306",
        "unpaired",
        _mean_weight,
        "single answers with a thumb, unbalanced, or pairs with noisy labels",
        step_statistics=unpaired.kl_estimate,
        over="log-probs",
        lifts=True,
        mismatched=True,
        refuses=UNPAIRED,
    ),
    "apo_zero_unpaired": Objective(
        unpaired.apo_zero_unpaired,
        "APO-zero on thumbs",
        "2408.06266",
        "unpaired",
        _mean_weight,
        "KTO without its KL term",
        lifts=True,
        refuses=UNPAIRED,
    ),
}
"""Every objective by name: `LOSSES["sigmoid"](pairs, beta=0.1)` gives one loss per pair, (B,). The names are those of
`loss.name`; what each is for stands in docs/objectives.md."""
