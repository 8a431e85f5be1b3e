"""Rows that judge several turns: what is compared with what, and which tokens are scored of it, decoded back."""

import functools
import itertools
import json

import numpy as np
import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import load
from row_shapes import turns

from mlxdpo.config import DataConfig
from mlxdpo.data import reasons
from mlxdpo.data.dataset import encode_split, read_split, source_key
from mlxdpo.data.encode import encode_all, shown_example
from mlxdpo.data.examples import Examples
from mlxdpo.data.fields import Row
from mlxdpo.data.formats import check_columns, convert, detect
from mlxdpo.data.planning import outline, plan_epoch
from mlxdpo.data.read import read_preferences
from mlxdpo.data.report import BadRow
from mlxdpo.data.transforms import DEMONSTRATIONS, PAIRS, REWARDED, THUMBS, thumbs_with_kl
from mlxdpo.types import Message, Preference, UnpairedExample, UserError

ENDS = {
    "chatml": (tiny.chatml_tokenizer, "<|im_end|>"),
    "llama3": (tiny.llama3_tokenizer, "<|eot_id|>"),
    "gemma": (tiny.gemma_tokenizer, "<end_of_turn>"),
    "thinking": (tiny.thinking_tokenizer, "<|im_end|>"),
    "llama2": (tiny.llama2_tokenizer, " </s>"),
}


@functools.cache
def family(name):
    return ENDS[name][0]()


def items(row, credit=None):
    shape = detect(row)
    check_columns(shape, row)
    return convert(shape, [Row("x.jsonl:1", row, credit)])


def told(item):
    """(context, chosen, rejected) as words."""
    sides = [item.completion] if isinstance(item, UnpairedExample) else [item.chosen, item.rejected]
    return item.context, *(" ".join(turn.content for turn in side) for side in sides)


STEPS = {
    "prompt": turns("Do it."),
    "steps": [
        {"chosen": "a1", "rejected": ["b1", "c1"]},
        {"role": "tool", "content": "t1"},
        {"chosen": [{"role": "assistant", "content": "a2"}, {"role": "tool", "content": "t2"}]},
        {"chosen": "a3", "rejected": [turns("", "d3", "what", "d4")[1:]]},
        {"role": "tool", "content": "t3"},
        {"role": "assistant", "content": "a4"},
    ],
}


@pytest.mark.parametrize(
    ("credit", "last"),
    [(None, (4, "a1 t1 a2 t2 a3 t3 a4", "a1 t1 a2 t2 d3 what d4")), ("turn", (4, "a1 t1 a2 t2 a3", "a1 t1 a2 t2 d3"))],
)
def test_steps_with_alternatives(credit, last):
    found = items(STEPS, credit)
    assert [told(item) for item in found] == [(0, "a1", "b1"), (0, "a1", "c1"), last]
    assert all(item.prompt == (Message("user", "Do it."),) for item in found)


@pytest.mark.parametrize("shape", ["implicit", "messages", "turns"])
@pytest.mark.parametrize(
    ("credit", "chosen", "rejected"), [(None, "a1 u2 a2 u3 a3", "a1 u2 b2 w3 b3"), ("turn", "a1 u2 a2", "a1 u2 b2")]
)
def test_pairs_of_trajectories(shape, credit, chosen, rejected):
    both = {
        "chosen": turns("Do it.", "a1", "u2", "a2", "u3", "a3"),
        "rejected": turns("Do it.", "a1", "u2", "b2", "w3", "b3"),
    }
    row = both if shape == "implicit" else both | {"prompt": "Do it." if shape == "turns" else turns("Do it.")}
    assert detect(row).name == shape
    [item] = items(row, credit)
    assert told(item) == (2, chosen, rejected) and item.prompt == (Message("user", "Do it."),)


def test_answers_of_several_turns_behind_a_prompt_that_has_turns_too():
    """The root is the same for every pair of a conversation, wherever it parts."""
    row = {
        "prompt": turns("Do it.", "a1", "u2"),
        "chosen": turns("", "a2", "u3", "a3")[1:],
        "rejected": turns("", "b2")[1:],
    }
    [item] = items(row)
    assert told(item) == (2, "a1 u2 a2 u3 a3", "a1 u2 b2") and item.prompt == (Message("user", "Do it."),)


def test_a_plain_pair_stays_one():
    for row in (
        {"chosen": turns("u", "v", "w", "x"), "rejected": turns("u", "v", "w", "y")},
        {"prompt": "u", "chosen": turns("u", "x"), "rejected": turns("u", "y")},
    ):
        [item] = items(row)
        assert item.context is None and len(item.chosen) == 1


def test_nodes_of_a_published_tree_share_their_root():
    before = [
        {"from": role, "value": value} for role, value in (("user", "Do it."), ("assistant", "a1"), ("user", "u2"))
    ]
    rows = [{"trajectory": before[:n], "chosen": f"a{n}", "rejected": f"b{n}"} for n in (1, 3)]
    found = [item for row in rows for item in items(row)]
    assert [told(item) for item in found] == [(0, "a1", "b1"), (2, "a1 u2 a3", "a1 u2 b3")] and found[
        0
    ].prompt == found[1].prompt


def test_labels_and_rewards_of_steps():
    conversation = {"messages": turns("Do it.", "a1", "u2", "a2", "u3", "a3")}
    found = items(conversation | {"labels": [True, 0, "true"]})
    assert [(*told(item), item.desirable) for item in found] == [
        (0, "a1", True),
        (2, "a1 u2 a2", False),
        (4, "a1 u2 a2 u3 a3", True),
    ]
    [whole] = items(conversation | {"labels": [1, 0, 1]}, "trajectory")
    assert (*told(whole), whole.desirable) == (0, "a1 u2 a2 u3 a3", False)
    up, zero, down = items(conversation | {"rewards": [1, 0, -0.5]})
    assert (up.desirable, zero.reason, down.desirable) == (True, reasons.TIED, False)
    [whole] = items(conversation | {"rewards": [1, 0, -0.5]}, "trajectory")
    assert whole.desirable and whole.context == 0


REFUSED = {
    "no alternative": (
        STEPS | {"steps": STEPS["steps"][3:][1:]},
        None,
        'no step has "rejected"; expected at least one alternative',
    ),
    "tool turn as alternative": (
        {
            "prompt": "u",
            "steps": [
                {"chosen": "a", "rejected": [{"role": "assistant", "content": "b"}, {"role": "tool", "content": "t"}]}
            ],
        },
        None,
        '"rejected" of step 1 lists turns that are not the assistant\'s; expected alternatives, one of '
        "several turns as a nested list",
    ),
    "tool turn as choice": (
        {"prompt": "u", "steps": [{"chosen": {"role": "tool", "content": "t"}, "rejected": "b"}]},
        None,
        '"step 1 chosen" begins with a tool turn; expected an assistant turn',
    ),
    "empty": (
        {"prompt": "u", "steps": [{"chosen": "a", "rejected": " "}]},
        None,
        'an assistant turn of "rejected" is empty; expected what is to be judged',
    ),
    "parting at a tool turn": (
        {
            "chosen": [*turns("u", "a"), {"role": "tool", "content": "1"}, *turns("", "b")[1:]],
            "rejected": [*turns("u", "a"), {"role": "tool", "content": "2"}, *turns("", "c")[1:]],
        },
        "turn",
        '"chosen" and "rejected" part at turn 3, which is a tool turn; expected them to part at an assistant turn',
    ),
    "labels that do not count": (
        {"messages": turns("u", "a"), "labels": [1, 0]},
        None,
        '"messages" has 1 assistant turns and "labels" 2 values; expected one for each',
    ),
    "one label for turns": (
        {"prompt": "u", "completion": turns("", "a", "v", "b")[1:], "label": True},
        "turn",
        "one label judges several turns, so data.credit turn has nothing to go by; leave it unset, or give a label for "
        'each turn: columns "messages" and "labels"',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(name):
    row, credit, sentence = REFUSED[name]
    with pytest.raises(BadRow) as caught:
        items(row, credit)
    assert caught.value.sentence == sentence


def written(tmp_path, rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def test_an_alternative_that_is_the_choice_is_left_out_and_counted(tmp_path):
    rows = [{"prompt": "u", "steps": [{"chosen": "a", "rejected": ["a", "b"]}]}]
    found, report = read_preferences(DataConfig(path=written(tmp_path, rows)))
    assert len(found) == 1 and not report.refused and report.changed == {reasons.IDENTICAL: 1}


def test_turns_behind_the_last_alternative_are_counted(tmp_path):
    step = {"chosen": "a", "rejected": "b"}
    rows = [{"prompt": "u", "steps": [step, {"role": "tool", "content": "t"}, {"role": "assistant", "content": "c"}]}]
    found, report = read_preferences(DataConfig(path=written(tmp_path, rows)))
    assert len(found) == 1 and report.changed == {reasons.UNJUDGED: 1}
    rest = rows[0]["steps"][1:]
    longer = step | {"rejected": [[{"role": "assistant", "content": "b"}, *rest]]}
    rows = [{"prompt": "u", "steps": [longer, *rest]}]
    assert not read_preferences(DataConfig(path=written(tmp_path, rows)))[1].changed


def test_credit_is_refused_where_no_row_is_a_trajectory(tmp_path):
    path = written(tmp_path, [{"prompt": "u", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"data\.credit turn is for conversations in which several turns are judged"):
        read_preferences(DataConfig(path=path, credit="turn"))


def test_credit_changes_the_name_that_encoded_rows_are_kept_under(tmp_path):
    data = DataConfig(path=written(tmp_path, [STEPS]))
    assert len({source_key(data.model_copy(update={"credit": c}), 0) for c in (None, "turn", "trajectory")}) == 3


def pair(context, chosen, rejected, prompt=("Do it.",)):
    """Turns of user and assistant in alternation behind a prompt of one user turn."""
    role = lambda n: ("assistant", "user")[n % 2]  # noqa: E731
    sides = [tuple(Message(role(n), text) for n, text in enumerate(side)) for side in (chosen, rejected)]
    return Preference(tuple(Message("user", text) for text in prompt), *sides, "x.jsonl:1", context=context)


def scored_texts(item, name, **data):
    """The scored segments of both sides, and the example."""
    examples, report = encode_all([item], family(name), DataConfig(**data))
    assert examples, report
    sides = shown_example(examples[0], family(name))
    return [[text for text, scored in side if scored] for side in sides], examples[0], report


@pytest.mark.parametrize("name", ENDS)
def test_scored_are_the_judged_turns_through_their_ends(name):
    """Never what the user says, nor the turn that both have; an empty thinking block of the last turn is prompt."""
    end, space = ENDS[name][1], " " if name == "llama2" else ""
    item = pair(
        2, ("same", "obs", "good one", "seen", "good two"), ("same", "obs", "bad", "other", "worse", "w", "worst")
    )
    (chosen, rejected), _, _ = scored_texts(item, name)
    assert chosen == [f"{space}good one{end}", f"{space}good two{end}"]
    assert rejected == [f"{space}{word}{end}" for word in ("bad", "worse", "worst")]
    (unended, _), _, _ = scored_texts(item, name, eos="leave")
    assert unended == [f"{space}good one{end[: -len(end.strip())]}", f"{space}good two{end[: -len(end.strip())]}"]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", [*ENDS, "headings"])
def test_the_pairs_of_a_conversation_have_one_prompt_and_their_tokens_are_those_of_a_plain_pair(name, thinking):
    """A judged turn alone: the row, and what is scored of it, are those of the turns before it as a plain prompt."""
    tokenizer = tiny.headings_tokenizer() if name == "headings" else family(name)
    conversation = ("one", "obs", "two", "more", "three")
    rows, plain = [], []
    for n in (0, 2, 4):
        rows.append(pair(n, conversation[: n + 1], (*conversation[:n], f"not {n}")))
        whole = rows[-1]
        plain.append(Preference(whole.prompt + whole.chosen[:-1], whole.chosen[-1:], whole.rejected[-1:], "x"))
    examples, _ = encode_all(rows, tokenizer, DataConfig(thinking=thinking))
    wanted, _ = encode_all(plain, tokenizer, DataConfig(thinking=thinking))
    assert len({example.prompt.tobytes() for example in examples}) == 1
    for got, want in zip(examples, wanted, strict=True):
        for side in ("chosen", "rejected"):
            ids, mask = getattr(got, side), getattr(got, f"{side}_mask")
            mask = np.ones(len(ids), bool) if mask is None else mask
            assert np.array_equal(np.concatenate([got.prompt, ids]), np.concatenate([want.prompt, getattr(want, side)]))
            assert np.array_equal(ids[mask], getattr(want, side))


WORDS = st.text(st.sampled_from("ab é\n<|"), min_size=1, max_size=8).filter(str.strip).map(str.strip)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(ENDS)),
    st.lists(WORDS, min_size=1, max_size=5),
    st.lists(WORDS, min_size=1, max_size=5),
    st.integers(0, 1),
)
def test_every_judged_turn_and_nothing_else_is_scored(name, chosen, rejected, shared):
    chosen, rejected = (side if len(side) % 2 else side[:-1] for side in (chosen, rejected))
    before = ("same", "obs") * shared
    chosen, rejected = (*before, "+" + chosen[0], *chosen[1:]), (*before, "-" + rejected[0], *rejected[1:])
    sides, _, _ = scored_texts(pair(len(before), chosen, rejected), name)
    for side, texts in zip((chosen, rejected), sides, strict=True):
        assert [text.removesuffix(ENDS[name][1]).strip() for text in texts] == [
            t.strip() for t in side[len(before) :: 2]
        ]


def test_a_template_that_rewrites_turns_is_refused_by_name_and_turn_by_turn_it_works():
    """Reasoning that the template drops once others follow."""
    tokenizer = tiny.chatml_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    whole = pair(0, ("<think>x</think>a", "o", "b"), ("c",))
    with pytest.raises(
        UserError, match=r"the chat template writes turn 2 .* differently once others follow .* set data.credit to turn"
    ):
        encode_all([whole], tokenizer, DataConfig())
    turn = pair(2, ("<think>x</think>a", "o", "<think>y</think>b"), ("<think>x</think>a", "o", "c"))
    examples, _ = encode_all([turn], tokenizer, DataConfig())
    shown = shown_example(examples[0], tokenizer).chosen
    assert [text for text, scored in shown if scored] == ["<think>y</think>b<|im_end|>"] and "x" not in shown[0][0][
        -40:
    ]


def test_a_template_without_ends_is_refused_by_name():
    with pytest.raises(UserError, match="the chat template ends no assistant turn with a token"):
        encode_all([pair(0, ("a", "o", "b"), ("c",))], tiny.headings_tokenizer(), DataConfig())


def test_what_follows_the_last_assistant_turn_is_left_out_and_counted():
    (chosen, _), example, report = scored_texts(pair(0, ("a", "o", "b", "end"), ("c",)), "chatml")
    assert chosen == ["a<|im_end|>", "b<|im_end|>"] and example.chosen_mask[-1]
    assert list(report.changed) == ["turns after the last assistant turn skipped: nothing there is scored"]


def test_a_long_history_is_trimmed_as_a_prompt_is():
    """What comes before the judged turn may lose its beginning; whole trajectories that are too long are dropped."""
    history = ("word " * 30, "obs") * 2
    (chosen, _), example, report = scored_texts(pair(4, (*history, "good"), (*history, "bad")), "chatml", max_length=64)
    assert (
        chosen == ["good<|im_end|>"]
        and len(example.prompt) + len(example.chosen) <= 64
        and "prompt trimmed" in report.changed
    )
    found, report = encode_all(
        [pair(0, (*history, "good"), (*history[1:2], "bad"))], family("chatml"), DataConfig(max_length=64)
    )
    assert not found and list(report.refused) == ["completion too long"]


def test_they_survive_being_stored_and_meet_in_one_batch(tmp_path):
    """Through the files of encoded data; pairs of one conversation have one prompt, so they are planned together."""
    rows = [STEPS | {"prompt": turns(f"Do {n}.")} for n in range(6)]
    data = DataConfig(path=written(tmp_path, rows), eval_fraction=0.3)
    found = encode_split(read_split(data, 0), data, family("chatml"), frozenset())
    items, _ = read_preferences(data)
    wanted, _ = encode_all(items, family("chatml"), data)
    got = {
        tuple(example.chosen) + tuple(example.rejected): example
        for part in (found.train, found.heldout)
        for example in part
    }
    assert len(found.train) + len(found.heldout) == 18 and len(found.heldout) % 3 == 0
    for want in wanted:
        same = got[(*want.chosen, *want.rejected)]
        assert np.array_equal(same.chosen_mask, want.chosen_mask) and np.array_equal(
            same.rejected_mask, want.rejected_mask
        )
    assert Examples.of(wanted).rows.tobytes() == Examples.of(list(Examples.of(wanted))).rows.tobytes()
    for batch in itertools.chain(*plan_epoch(outline(found.train, "prompt"), 4, 1, 0, 0).windows):
        assert len({found.train[i].prompt.tobytes() for i in batch}) * 3 == len(batch)


@pytest.mark.parametrize(
    "take", [PAIRS, REWARDED, DEMONSTRATIONS, THUMBS, thumbs_with_kl(0)], ids=lambda take: take.name
)
def test_every_stage_takes_them(tmp_path, take):
    rows = [STEPS | {"prompt": turns(f"Do {n}.")} for n in range(3)]
    data = DataConfig(path=written(tmp_path, rows), eval_fraction=0)
    examples = encode_split(read_split(data, 0, take), data, family("chatml"), frozenset()).train
    for example in examples:
        for ids, mask in ((example.chosen, example.chosen_mask), (example.rejected, example.rejected_mask)):
            assert mask is None or (len(mask) == len(ids) and mask.any() and mask[-1])
    words = "".join(
        text for example in examples for text, scored in shown_example(example, family("chatml")).chosen if scored
    )
    assert not any(tool in words for tool in ("t1", "t2", "t3")) and "a4" in words


REAL_ENDS = {
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "smollm2": "<|im_end|>",
    "mistral": "</s>",
}


@pytest.mark.tokenizers
@pytest.mark.parametrize("name", REAL_ENDS)
def test_real_templates_score_the_judged_turns_alone(name):
    """What tools return comes as the template's own tool turn where it has one, else as the user's."""
    tokenizer, end = load(name), REAL_ENDS[name]
    role = "user" if name in ("gemma3", "mistral") else "tool"
    said = lambda *texts: tuple(Message(("assistant", role)[n % 2], text) for n, text in enumerate(texts))  # noqa: E731
    prompt = (Message("user", "What is 3 * 4 + 2?"),)
    chosen = said("calc(3 * 4)", "12", "calc(12 + 2)", "14", "It is 14.")
    rejected = said("calc(3 * 4)", "12", "calc(12 - 2)", "10", "It is 10.")
    whole = Preference(prompt, chosen, rejected, "x", context=2)
    turn = [Preference(prompt, chosen[: n + 1], (*chosen[:n], *said("No.")), "x", context=n) for n in (0, 2, 4)]
    examples, report = encode_all([whole, *turn], tokenizer, DataConfig())
    assert len({example.prompt.tobytes() for example in examples}) == 1 and not report.refused
    found = [[text.strip() for text, scored in shown_example(e, tokenizer).chosen if scored] for e in examples]
    one, two, three = (f"{turn.content}{end}" for turn in chosen[::2])
    assert found == [[two, three], [one], [two], [three]]


def pair_with_calls():
    calls = [{"type": "function", "function": {"name": "calc", "arguments": {"a": n}}} for n in (3, 4)]
    act = lambda call: Message("assistant", "", {"tool_calls": [call]})  # noqa: E731
    chosen = (act(calls[0]), Message("tool", "12"), Message("assistant", "It is 12."))
    rejected = (act(calls[1]), Message("tool", "13"), Message("assistant", "It is 13."))
    tools = ({"type": "function", "function": {"name": "calc", "description": "", "parameters": {}}},)
    return Preference((Message("user", "What?"),), chosen, rejected, "x", tools, context=0)


def test_calls_that_the_template_does_not_print_are_refused_by_name():
    """ChatML alone has no tools: the turn would be an empty answer, and the model would learn to say nothing."""
    with pytest.raises(UserError, match="does not print the call of calc"):
        encode_all([pair_with_calls()], tiny.chatml_tokenizer(), DataConfig())


@pytest.mark.tokenizers
def test_tool_calls_are_scored():
    examples, _ = encode_all([pair_with_calls()], load("qwen3"), DataConfig())
    call, answer = (text for text, scored in shown_example(examples[0], load("qwen3")).chosen if scored)
    assert '"calc"' in call and "3" in call and call.endswith("<|im_end|>") and answer.endswith("It is 12.<|im_end|>")
