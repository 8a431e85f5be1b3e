"""Dirty rows: every refusal has its reason and says in one sentence which column is wrong and how."""

import pytest
from row_shapes import FIXTURES, items_of, turns, with_column

from mlxdpo.data import reasons
from mlxdpo.data.formats import FORMATS
from mlxdpo.data.report import BadRow


def refusal(row, name=None) -> tuple[str, str]:
    with pytest.raises(BadRow) as caught:
        items_of(row if isinstance(row, list) else [row], name or "text")
    return caught.value.reason, caught.value.sentence


@pytest.mark.parametrize(("name", "missing"), [(n, c) for n, f in FORMATS.items() for c in f.columns])
def test_a_missing_column_of_any_shape_is_named(name, missing):
    row = with_column(FIXTURES[name][0], missing)
    reason, sentence = refusal([row], name)
    assert reason == reasons.MISSING_COLUMN
    names = ", ".join(FORMATS[name].flattened(row)) or "none"
    assert sentence == f'"{missing}" is missing; the row has the columns {names}'


DIRTY = [None, 7, [1, 2], {}, [], [None], [[]], "\ud800", b"bytes"]
NUMBERS = ("helpfulness", "preference_strength", "overall_preference", "score_0", "score_1")
SOUND = [("system", None), *((name, 7) for name in NUMBERS), ("scores", [1, 2]), ("ratings", [1, 2])]


@pytest.mark.parametrize("name", FORMATS)
def test_a_wrong_value_in_any_column_of_the_shape_is_a_bad_row(name):
    spoiled = [(c, value) for c in FORMATS[name].columns for value in DIRTY if (c, value) not in SOUND]
    for column, value in spoiled:
        rows = [with_column(row, column, value) for row in FIXTURES[name]]
        assert refusal(rows, name)[0] in (reasons.WRONG_TYPE, reasons.INVALID_UTF8), (column, value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (True, "a Boolean"),
        (None, "null"),
        (3, "a number"),
        ([1.5, 2], "a list of numbers"),
        (["a"], "a list of text"),
        ([], "an empty list"),
        ({}, "an object"),
        ([{"x": 1}], "a list of objects"),
        ([1, "a"], "a list of mixed values"),
        (turns("a"), "messages"),
    ],
)
def test_what_stands_where_text_should_be(value, found):
    row = FIXTURES["text"][0] | {"chosen": value}
    assert refusal(row) == (reasons.WRONG_TYPE, f'"chosen" is {found}; expected text')


PAIR = FIXTURES["text"][0]
CHAT = FIXTURES["implicit"][0]


def conversation(**changed):
    return CHAT | changed


REFUSED = [
    ("text", PAIR | {"chosen": " \n"}, reasons.EMPTY_COMPLETION, '"chosen" is empty; expected a completion'),
    (
        "text",
        PAIR | {"prompt": ""},
        reasons.EMPTY_PROMPT,
        '"prompt" is empty; expected the text to answer, or data.template plain to train on answers without one',
    ),
    ("text", PAIR | {"rejected": "Good."}, reasons.IDENTICAL, '"chosen" and "rejected" are the same'),
    (
        "text",
        PAIR | {"chosen": "ok \ud83d"},
        reasons.INVALID_UTF8,
        '"chosen" has a broken character at position 4; expected UTF-8',
    ),
    (
        "text",
        PAIR | {"chosen": "[{'role': 'user', 'content': 'x'}]"},
        reasons.WRONG_TYPE,
        '"chosen" is a list of messages printed as text; expected JSON',
    ),
    (
        "text",
        PAIR | {"score_chosen": 4, "score_rejected": 4.0},
        reasons.TIED,
        '"score_chosen" and "score_rejected" are both 4',
    ),
    ("text", PAIR | {"tools": "{"}, reasons.WRONG_TYPE, '"tools" is text that is not JSON; expected a list of tools'),
    ("text", PAIR | {"tools": [1]}, reasons.WRONG_TYPE, '"tools" is a list of numbers; expected a list of tools'),
    (
        "implicit",
        conversation(rejected=turns("Hi?")),
        reasons.DIVERGED,
        '"chosen" and "rejected" part at turn 2, where "rejected" is over; expected an assistant turn in both',
    ),
    (
        "implicit",
        {"chosen": turns("Hi?", "A", "B", "C"), "rejected": turns("Hi?", "A", "Z", "D")},
        reasons.DIVERGED,
        '"chosen" and "rejected" part at turn 3, which is a user turn; expected them to part at an assistant turn',
    ),
    (
        "implicit",
        {"chosen": turns("Hi?"), "rejected": turns("Ho?")},
        reasons.NOT_ONE_ANSWER,
        '"chosen" holds user after the prompt; expected one assistant turn',
    ),
    (
        "implicit",
        {"chosen": turns("", "A")[1:], "rejected": turns("", "B")[1:]},
        reasons.EMPTY_PROMPT,
        "the prompt has no user turn with text; expected one to answer",
    ),
    ("implicit", conversation(rejected=CHAT["chosen"]), reasons.IDENTICAL, '"chosen" and "rejected" are the same'),
    (
        "implicit",
        conversation(rejected=turns("Hi?", "")),
        reasons.EMPTY_COMPLETION,
        'the assistant turn of "rejected" is empty; expected a completion',
    ),
    (
        "implicit",
        {side: [*turns("Hi?", "Yes?"), *turns("", word)[1:]] for side, word in (("chosen", "A"), ("rejected", "B"))},
        reasons.NOT_ONE_ANSWER,
        "the prompt ends with an assistant turn; expected a user or tool turn (the beginning of an answer is for "
        "plain text: a prompt and answers as text, with data.template plain)",
    ),
    (
        "implicit",
        conversation(chosen=[{"role": "alien", "content": "x"}]),
        reasons.UNKNOWN_ROLE,
        "turn 1 of \"chosen\" has the role 'alien'; expected one of system, user, assistant, tool, developer, gpt, "
        "chatgpt, bot, model, bard, bing, function_call, human, function, observation, function_response",
    ),
    (
        "implicit",
        conversation(chosen=[{"content": "x"}]),
        reasons.WRONG_TYPE,
        'turn 1 of "chosen" has neither role nor from; it has content',
    ),
    (
        "implicit",
        conversation(chosen=[{"role": "user"}]),
        reasons.WRONG_TYPE,
        'the content of turn 1 of "chosen" is null; expected text',
    ),
    (
        "turns",
        FIXTURES["turns"][0] | {"prompt": "Other?"},
        reasons.PROMPT_MISMATCH,
        '"prompt" is in none of the shared turns of "chosen" and "rejected"; '
        "set data.format to implicit if the turns are right",
    ),
    (
        "hh",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
        reasons.DIVERGED,
        '"chosen" and "rejected" part before the last Assistant: turn; expected only that turn to differ',
    ),
    (
        "hh",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c\n\nHuman: d"},
        reasons.DIVERGED,
        '"chosen" and "rejected" part before the last Assistant: turn; expected only that turn to differ',
    ),
    (
        "hh",
        {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"},
        reasons.NOT_ONE_ANSWER,
        '"chosen" does not end with an Assistant: turn',
    ),
    (
        "hh",
        {"chosen": "\n\nHuman: \n\nAssistant: b", "rejected": "\n\nHuman: \n\nAssistant: c"},
        reasons.EMPTY_PROMPT,
        "the prompt has no user turn with text; expected one to answer",
    ),
    (
        "strength",
        FIXTURES["strength"][0] | {"preference_strength": 0},
        reasons.TIED,
        'neither "response_1" nor "response_2" is marked better',
    ),
    ("shp", FIXTURES["shp"][0] | {"score_ratio": 1.5}, reasons.WEAK, '"score_ratio" is 1.5, below 2'),
    (
        "ranked",
        FIXTURES["ranked"][0] | {"scores": [1, 1]},
        reasons.TIED,
        "all 2 completions have the score 1",
    ),
    (
        "ranked",
        FIXTURES["ranked"][0] | {"scores": [1]},
        reasons.WRONG_TYPE,
        '"completions" has 2 items and "scores" 1',
    ),
    (
        "ratings",
        FIXTURES["ratings"][0],
        reasons.LONE,
        "the prompt has this one response; expected the next row to have another",
    ),
    (
        "unpaired",
        FIXTURES["unpaired"][0] | {"label": "yes"},
        reasons.WRONG_TYPE,
        '"label" is text; expected true or false',
    ),
]


@pytest.mark.parametrize(("name", "row", "reason", "sentence"), REFUSED)
def test_each_refusal_says_what_is_wrong(name, row, reason, sentence):
    assert refusal(row, name) == (reason, sentence)
