"""Every registered row shape has a fixture, is detected as itself and gives the pair it states; dirty rows say why."""

import itertools

import pytest
from row_shapes import FIXTURES, KNOWN_SETS, items_of, turns

from mlxdpo.data.formats import FORMATS, detect, detect_by_names, named_format
from mlxdpo.types import Message, Preference, UnpairedExample, UserError

PAIR = FIXTURES["text"][0]
CHAT = FIXTURES["implicit"][0]


def said(text):
    """A prompt or completion as one line: roles do not matter where the contents tell."""
    return text if isinstance(text, str) else " | ".join(turn.content for turn in text)


def test_every_shape_has_a_fixture_and_no_fixture_is_orphaned():
    assert FIXTURES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_each_shape_is_detected_as_itself_and_says_what_it_is(name):
    shape = FORMATS[name]
    assert detect(FIXTURES[name][0]) is shape
    assert shape.about and shape.example and shape.columns


@pytest.mark.parametrize("name", FORMATS)
def test_each_shape_gives_the_better_completion_as_chosen(name):
    [item] = items_of(FIXTURES[name])
    if isinstance(item, UnpairedExample):
        assert (said(item.prompt), said(item.completion), item.desirable) == ("Hi?", "Good.", True)
    elif name == "hh":
        assert said(item.prompt) == "Hi? | Yes? | Go on."
        assert (said(item.chosen), said(item.rejected)) == ("I think so.", "I doubt it.")
    else:
        post = "SUBREDDIT: r/cooking\n\nTITLE: Tea.\n\nPOST: Hi?\n\nTL;DR:"
        prompt = {"system": "Be kind. | Hi?", "summaries": post}.get(name, "Hi?")
        assert (said(item.prompt), said(item.chosen), said(item.rejected)) == (prompt, "Good.", "Bad.")
    assert item.where == "x.jsonl:1"


@pytest.mark.parametrize("name", KNOWN_SETS)
def test_known_sets_are_read_as_their_shape_with_the_right_sides(name):
    shape, rows = KNOWN_SETS[name]
    assert detect(rows[0]) is FORMATS[shape]
    [item] = items_of(rows)
    better = item.completion if isinstance(item, UnpairedExample) else item.chosen
    assert said(better) == "Good."
    assert "Hi?" in said(item.prompt)
    if isinstance(item, Preference):
        assert said(item.rejected) == "Bad."


def test_system_prompt_is_a_turn_and_an_empty_one_is_none():
    for name, column in (("system", "prompt"), ("orca", "question")):
        row = {"system": "Be kind.", column: "Hi?", "chosen": "Good.", "rejected": "Bad."}
        [pair] = items_of([row], name)
        assert pair.prompt == (Message("system", "Be kind."), Message("user", "Hi?"))
        for system in ("", " ", None):
            [pair] = items_of([row | {"system": system}], name)
            assert pair.prompt == (Message("user", "Hi?"),)
    [pair] = items_of([{"question": "Hi?", "chosen": "Good.", "rejected": "Bad."}], "orca")
    assert pair.prompt == (Message("user", "Hi?"),)


def test_hh_does_not_move_shared_openings_into_the_prompt():
    """TRL's longest common prefix would give the prompt "... I" and the completions " think so." and " doubt it."."""
    [pair] = items_of(FIXTURES["hh"])
    assert pair.prompt == (Message("user", "Hi?"), Message("assistant", "Yes?"), Message("user", "Go on."))
    assert pair.chosen == (Message("assistant", "I think so."),)


def test_texts_are_kept_as_they_stand():
    row = {"prompt": " The sky is ", "chosen": " blue.\n", "rejected": "🙂 שלום  "}
    [pair] = items_of([row])
    assert (pair.prompt, pair.chosen, pair.rejected) == tuple(row.values())


def test_mixed_text_and_messages_become_messages():
    answer = (Message("assistant", "Good."),)
    [pair] = items_of([FIXTURES["messages"][0] | {"chosen": "Good.", "rejected": "Bad."}])
    assert (pair.prompt, pair.chosen) == ((Message("user", "Hi?"),), answer)
    [pair] = items_of([FIXTURES["messages"][0] | {"prompt": "Hi?"}])
    assert (pair.prompt, pair.chosen) == ((Message("user", "Hi?"),), answer)


def test_message_prompt_repeated_in_the_answers_is_taken_off():
    prompt = turns("Hi?", "Yes?", "Go on.")
    row = {
        "prompt": prompt,
        "chosen": prompt + turns("", "Good.")[1:],
        "rejected": turns("", "Bad.")[1:],
    }
    [pair] = items_of([row])
    assert (said(pair.prompt), said(pair.chosen), said(pair.rejected)) == ("Hi? | Yes? | Go on.", "Good.", "Bad.")


def test_a_text_prompt_may_be_any_shared_user_turn():
    both = {"chosen": turns("Hi?", "Yes?", "Go  on.", "A"), "rejected": turns("Hi?", "Yes?", "Go  on.", "B")}
    for prompt in ("Hi?", "Go on.", "Human: Hi?\nBot: Yes?\nHuman: Go on."):
        [pair] = items_of([{"prompt": prompt, **both}])
        assert said(pair.prompt) == "Hi? | Yes? | Go  on."


def test_extra_keys_of_a_turn_are_kept_and_nulls_are_not():
    call = [{"function": {"name": "f"}}]
    chosen = [*turns("Hi?"), {"role": "assistant", "content": None, "tool_calls": call, "name": None}]
    [pair] = items_of([CHAT | {"chosen": chosen}])
    assert pair.chosen == (Message("assistant", "", {"tool_calls": call}),)


def test_tools_are_read_from_a_list_or_json_and_other_columns_are_kept():
    tool = {"name": "f"}
    for value in ([tool], '[{"name": "f"}]'):
        [pair] = items_of([PAIR | {"tools": value, "margin": 2.0}])
        assert (pair.tools, pair.columns) == ((tool,), {"margin": 2.0})
    for value in (None, "", []):
        [pair] = items_of([PAIR | {"tools": value}])
        assert (pair.tools, pair.columns) == ((), {})


@pytest.mark.parametrize(("label", "desirable"), [(True, True), (0, False), (1.0, True), ("False", False), ("1", True)])
def test_labels_as_booleans_numbers_or_cells(label, desirable):
    [opinion] = items_of([FIXTURES["unpaired"][0] | {"label": label}])
    assert opinion.desirable is desirable


def test_signs_and_labels_pick_the_winner():
    [pair] = items_of([FIXTURES["strength"][0] | {"preference_strength": -1}])
    assert (said(pair.chosen), said(pair.rejected)) == ("Bad.", "Good.")
    [pair] = items_of([FIXTURES["shp"][0] | {"labels": 1}])
    assert (said(pair.chosen), said(pair.rejected)) == ("Bad.", "Good.")


def test_helpsteer_turns_and_columns_the_responses_agree_in():
    prompt = "Hi?\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nGo on."
    rows = [row | {"prompt": prompt, "source": "x"} for row in FIXTURES["ratings"]]
    [pair] = items_of(rows)
    assert pair.prompt == (Message("user", "Hi?"), Message("assistant", "Yes?"), Message("user", "Go on."))
    assert pair.columns["source"] == "x" and "verbosity" not in pair.columns


def test_ranked_completions_make_every_pair_with_different_scores():
    scores = {"a": 1, "b": 3, "c": 3, "d": 2}
    pairs = items_of([{"prompt": "Hi?", "completions": list(scores), "scores": list(scores.values())}])
    expected = {(x, y) for x, y in itertools.permutations(scores, 2) if scores[x] > scores[y]}
    assert {(p.chosen, p.rejected) for p in pairs} == expected
    assert len(pairs) == len(expected) == 5


def test_types_decide_where_columns_do_not():
    assert detect({"prompt": "Hi?", "chosen": "a", "rejected": "b"}).name == "text"
    assert detect({"prompt": None, **CHAT}).name == "implicit"
    assert detect({"chosen": "a", "rejected": "b"}) is None
    assert detect({"prompt": "Hi?", "chosen": True, "rejected": "b"}) is None
    assert detect_by_names({"prompt": "Hi?", "chosen": True, "rejected": "b"}).name == "text"
    assert detect_by_names({"prompt": "Hi?", "chosen": turns("a"), "rejected": None}).name == "turns"
    assert detect_by_names({"chosen": "a", "rejected": "b"}) is None


def test_unknown_format_names_the_nearest_or_all():
    with pytest.raises(UserError) as caught:
        named_format("implict")
    assert str(caught.value) == "data.format 'implict' is not a known row shape; did you mean implicit?"
    with pytest.raises(UserError) as caught:
        named_format("zzz")
    assert str(caught.value) == "data.format 'zzz' is not a known row shape; `mlxdpo data formats` lists them"
