"""Which modifiers make no sense for which family of objectives, and why: halves of sentences about an objective."""

from __future__ import annotations

TOKEN_MEANS = "it compares means over tokens, which the longer completion's tail does not inflate"
ALONE = "it weighs each log-ratio by itself, and without a reference those have no zero"
IMITATES = "it holds an imitation term, which is no comparison"
SORTED = "it sorts the pairs of a step, which belong to no pair any more"
SINGLE = "it reads single completions"
NO_REFERENCE = "it has no log-ratio to a reference"

DIFFERENCE_OF_TOKENS = {"ld_alpha": TOKEN_MEANS}
SEPARATE = {
    "f_divergence": "its targets are stated for log-ratios, not for scores of them",
    "reference_free": ALONE,
    "margin": "it has no difference of rewards that a margin could raise",
}
RANKED = {
    "f_divergence": "it compares distributions of log-ratios, not scores",
    **dict.fromkeys(("wpo", "probability", "weight", "margin"), SORTED),
}
REFERENCE_FREE = {
    "f_divergence": NO_REFERENCE,
    "reference_free": "it needs no reference anyway",
    "ld_alpha": TOKEN_MEANS,
}
IMITATING = REFERENCE_FREE | dict.fromkeys(("ld_alpha", "wpo", "probability"), IMITATES)
UNPAIRED = {
    "f_divergence": "its targets are stated for log-ratios, not for scores of them",
    "reference_free": ALONE,
    **dict.fromkeys(("ld_alpha", "wpo", "probability", "margin"), SINGLE),
}
