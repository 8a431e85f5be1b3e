"""Why a row is left out: the short constants that `Report` counts by, and which of them never stop a run."""

MALFORMED = "malformed row"
INVALID_UTF8 = "invalid UTF-8"
NOT_OBJECT = "row that is not an object"
MISSING_COLUMN = "missing column"
WRONG_TYPE = "wrong type"
UNKNOWN_ROLE = "unknown role"
EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
NOT_ONE_ANSWER = "completion that is not one assistant turn"
DIVERGED = "conversations that part before the last turn"
NOT_TEXT = "content that is not text"
CONTEXT = "context that cannot be used"
PROMPT_MISMATCH = "prompt that is not among the turns"
LONE = "prompt with a single response"
IDENTICAL = "identical pair"
DUPLICATE = "duplicate of an earlier row"
TIED = "tied scores"
WEAK = "score ratio below 2"

UNJUDGED = "turns after the last alternative skipped"
NO_PREFERENCE = frozenset({IDENTICAL, DUPLICATE, TIED, WEAK})
"""Sound rows that state no (new, clear) preference. Published sets are full of them and there is nothing to
mend, so they are left out and counted even where `data.on_bad_row` is stop."""

TOO_LONG = frozenset({"prompt too long", "completion too long"})
"""Sound rows that `data.on_long_prompt` or `data.on_long_completion` drops."""

CONTRADICTION = "label that contradicts an earlier row"
"""A change, not a refusal: two annotators may disagree, and both rows together teach indifference."""

INVERTED = "scores that say the opposite of the label"
"""A change too: the label is trained on. Where it is most rows, the two columns are the wrong way round."""

IN_WORDS = {
    DUPLICATE: ("row that repeats an earlier pair", "rows that repeat earlier pairs"),
    IDENTICAL: ("row whose two answers are the same", "rows whose two answers are the same"),
    TIED: ("row whose answers are rated equal", "rows whose answers are rated equal"),
    WEAK: ("row with a score ratio below 2", "rows with a score ratio below 2"),
    CONTRADICTION: (
        "row that prefers what an earlier row rejects; both are trained on and cancel out",
        "rows that prefer what an earlier row rejects; both are trained on and cancel out",
    ),
    INVERTED: (
        "row whose scores say the opposite of its label; the label is trained on",
        "rows whose scores say the opposite of their labels; the labels are trained on",
    ),
}
"""What one row, and several, of a reason are called in a sentence; others are called by the reason itself."""
