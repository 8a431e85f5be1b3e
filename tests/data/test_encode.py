"""Preferences as token ids, on tokenizers that carry the known traps: scored tokens are decoded back."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode, encode_all, encode_prompt, shown_example
from mlxdpo.data.report import Report
from mlxdpo.data.template import probe, template_digest
from mlxdpo.types import Example, Message, Preference, UserError

FAMILIES = {
    "chatml": (tiny.chatml_tokenizer, "<|im_end|>"),
    "llama3": (tiny.llama3_tokenizer, "<|eot_id|>"),
    "gemma": (tiny.gemma_tokenizer, "<end_of_turn>"),
    "thinking": (tiny.thinking_tokenizer, "<|im_end|>"),
    "llama2": (tiny.llama2_tokenizer, " </s>"),
    "headings": (tiny.headings_tokenizer, "<|endoftext|>"),
    "base": (tiny.base_tokenizer, "</s>"),
}
CHAT = [name for name in FAMILIES if name != "base"]


@functools.cache
def family(name: str):
    return FAMILIES[name][0]()


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(contents)
    head = (Message("system", system),) if system is not None else ()
    return head + tuple(Message(r, c) for r, c in zip(roles, contents, strict=False))


def chat_row(prompt: tuple[Message, ...], chosen: str, rejected: str) -> Preference:
    return Preference(prompt, (Message("assistant", chosen),), (Message("assistant", rejected),), "p.jsonl:1")


def text(tokenizer, ids) -> str:
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def one(row: Preference, tokenizer, **settings) -> tuple[Example, Report]:
    report = Report()
    example = encode(row, tokenizer, DataConfig(**settings), report)
    assert example is not None
    return example, report


@pytest.mark.parametrize("name", CHAT)
@pytest.mark.parametrize("prompt", [turns("Why?"), turns("Hi", "Hello!", "And you?")], ids=["one", "three"])
def test_scored_is_the_content_through_its_end_of_turn(name, prompt):
    tokenizer, end = family(name), FAMILIES[name][1]
    example, report = one(chat_row(prompt, "Because.", "Ça dépend 🌍."), tokenizer)
    lead = " " if name == "llama2" else ""
    assert text(tokenizer, example.chosen) == lead + "Because." + end
    assert text(tokenizer, example.rejected) == lead + "Ça dépend 🌍." + end
    assert report.changed == {} and report.kept == report.read == 1
    expected = tokenizer.apply_chat_template(
        [m.as_dict() for m in prompt], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text(tokenizer, example.prompt) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sequence_has_one_bos_where_there_is_one_and_ends_once(name):
    tokenizer = family(name)
    example, _ = one(Preference("Why?", "Because.", "No.", "p.jsonl:1"), tokenizer)
    ends = probe(tokenizer, DataConfig()).ends
    for completion in (example.chosen, example.rejected):
        assert [int(i) in ends for i in completion] == [False] * (len(completion) - 1) + [True]
    ids = np.concatenate([example.prompt, example.chosen]).tolist()
    bos = tokenizer.bos_token_id
    assert ids.count(bos) == (bos is not None)
    assert bos is None or ids[0] == bos


def test_a_system_turn_is_part_of_the_prompt_or_the_template_says_why_not():
    row = chat_row(turns("Why?", system="Be brief."), "Because.", "No.")
    example, _ = one(row, family("chatml"))
    assert text(family("chatml"), example.prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    with pytest.raises(UserError, match=r"p\.jsonl:1: .*'System role not supported' \(turns: system, user\)"):
        one(row, family("gemma"))
    examples, report = encode_all([row, row], family("gemma"), DataConfig(on_bad_row="skip"))
    assert examples == [] and report.refused == {"refused by the chat template": 2} and report.read == 2


def test_tools_reach_the_template():
    tokenizer = tiny.chatml_tokenizer()
    tokenizer.chat_template = "{{ tools[0].name if tools else 'none' }}\n" + tokenizer.chat_template
    row = Preference("Why?", "Because.", "No.", "p.jsonl:1", tools=({"name": "clock"},))
    example, _ = one(row, tokenizer)
    assert text(tokenizer, example.prompt).startswith("clock\n")
    data = DataConfig()
    assert encode_prompt("Why?", tokenizer, data, row.tools).tolist() == example.prompt.tolist()


# Boundary


def test_a_prompt_that_merges_with_the_completion_moves_the_boundary_on_both_sides():
    # " blue" is one token, so the prompt's last space is not a token of the whole; " r"+"ed" likewise.
    tokenizer = family("base")
    example, report = one(Preference("The sky is ", "blue.", "red.", "p.jsonl:1"), tokenizer)
    assert text(tokenizer, example.prompt) == "<s>The sky is"
    assert text(tokenizer, example.chosen) == " blue.</s>"
    assert text(tokenizer, example.rejected) == " red.</s>"
    assert list(report.changed.values()) == [1] and "boundary moved back" in next(iter(report.changed))


def test_the_boundary_is_the_shorter_of_both():
    tokenizer = family("base")
    example, _ = one(Preference("The sky is ", "9.", "blue.", "p.jsonl:1"), tokenizer)
    assert text(tokenizer, example.prompt) == "<s>The sky is"
    assert text(tokenizer, example.chosen) == " 9.</s>"
    plain, report = one(Preference("The sky is", " blue.", " red.", "p.jsonl:1"), tokenizer)
    assert report.changed == {} and text(tokenizer, plain.chosen) == " blue.</s>"


# Thinking


@pytest.mark.parametrize("thinking", [True, False])
def test_an_empty_thinking_block_is_never_scored(thinking):
    tokenizer = family("thinking")
    example, report = one(chat_row(turns("Why?"), "Because.", "No."), tokenizer, thinking=thinking)
    assert text(tokenizer, example.prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text(tokenizer, example.chosen) == "Because.<|im_end|>"
    assert text(tokenizer, example.rejected) == "No.<|im_end|>"
    assert sum(report.changed.values()) == thinking


def test_reasoning_is_scored_when_thinking():
    tokenizer = family("thinking")
    row = chat_row(turns("Why?"), "<think>\nhm\n</think>\n\nSo.", "<think>\nha\n</think>\n\nNo.")
    example, report = one(row, tokenizer, thinking=True)
    assert text(tokenizer, example.prompt).endswith("<|im_start|>assistant\n")
    assert text(tokenizer, example.chosen) == "<think>\nhm\n</think>\n\nSo.<|im_end|>"
    assert report.changed == {}
    assert encode_prompt(turns("Why?"), tokenizer, DataConfig(thinking=True)).tolist() == example.prompt.tolist()


def test_reasoning_on_one_side_is_reported():
    tokenizer = family("thinking")
    row = chat_row(turns("Why?"), "<think>\nhm\n</think>\n\nSo.", "No.")
    example, report = one(row, tokenizer, thinking=True)
    assert text(tokenizer, example.rejected) == "<think>\n\n</think>\n\nNo.<|im_end|>"
    assert report.changed == {"empty thinking block scored: the other completion has reasoning": 1}
    example, report = one(row, tokenizer, thinking=False)
    assert text(tokenizer, example.prompt).endswith("assistant\n<think>")
    assert [reason.split(":")[0] for reason in report.changed] == ["boundary moved back"]


def test_the_wrapper_of_mlx_lm_does_not_decide_about_thinking():
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    bare = family("thinking")
    row = chat_row(turns("Why?"), "Because.", "No.")
    wrapped = TokenizerWrapper(bare, eos_token_ids=[bare.eos_token_id])
    ours, theirs = (one(row, tokenizer)[0] for tokenizer in (bare, wrapped))
    for part in ("prompt", "chosen", "rejected"):
        assert getattr(ours, part).tolist() == getattr(theirs, part).tolist()
    assert template_digest(bare, DataConfig()) == template_digest(wrapped, DataConfig())


def test_a_generation_prompt_that_opens_a_thought_moves_the_boundary_before_it():
    # DeepSeek-R1: the prompt for an answer ends in <think>, the written turn has none.
    tokenizer = tiny.thinking_tokenizer()
    tokenizer.chat_template = tiny.CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    example, report = one(chat_row(turns("Why?"), "So.", "No."), tokenizer)
    assert text(tokenizer, example.prompt).endswith("<|im_start|>assistant\n")
    assert text(tokenizer, example.chosen) == "So.<|im_end|>"
    assert [(k.split(":")[0], v) for k, v in report.changed.items()] == [("boundary moved back", 1)]


# Ends


@pytest.mark.parametrize(
    ("after", "asked", "end"),
    [
        ("<|end|>\n<|endoftext|>", "<|assistant|>\n", "<|end|>"),  # Phi-3: two tokens, the first ends the turn
        ("<|assistant|>\n", "<|assistant|>\n", "<|endoftext|>"),  # a header is no end: EOS is added
        ("\n", "<|assistant|>\n", "<|endoftext|>"),
        ("", "<|assistant|>\n", "<|endoftext|>"),
    ],
)
def test_what_follows_the_content_is_told_apart(after, asked, end):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        f"{{% if m.role == 'assistant' and loop.last %}}{{{{ {after!r} }}}}{{% else %}}{{{{ '<|end|>\n' }}}}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {asked!r} }}}}{{% endif %}}"
    )
    special = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>")
    tokenizer = tiny.byte_level(special, template=template, eos="<|endoftext|>")
    example, report = one(chat_row(turns("Hi", "Hello", "Why?"), "So.", "No."), tokenizer)
    assert text(tokenizer, example.chosen) == "So." + end
    assert text(tokenizer, example.prompt).endswith("Why?<|end|>\n<|assistant|>\n")
    assert report.changed == {}


def test_an_end_of_turn_copied_into_the_text_is_written_once():
    tokenizer = family("chatml")
    example, report = one(chat_row(turns("Why?"), "Because.<|im_end|>\n", "No."), tokenizer)
    assert text(tokenizer, example.chosen) == "Because.<|im_end|>"
    assert report.changed == {"end-of-turn token in the text left out": 1}
    plain, report = one(Preference("Why?", " So.</s>", " No.", "p.jsonl:1"), family("base"))
    assert text(family("base"), plain.chosen) == " So.</s>" and report.changed == {}


def test_an_end_of_sequence_in_mid_completion_is_refused():
    with pytest.raises(UserError, match=r"p\.jsonl:1: .*end-of-sequence token before its end"):
        one(chat_row(turns("Why?"), "So.<|im_end|>More.", "No."), family("chatml"))


def test_the_model_says_which_ids_end_a_sequence():
    tokenizer = family("headings")
    stop = tokenizer.convert_tokens_to_ids("!")
    row = chat_row(turns("Why?"), "So", "No")
    example = encode(row, tokenizer, DataConfig(), Report(), eos_ids=frozenset({stop}))
    assert text(tokenizer, example.chosen) == "So!"
    done = encode(chat_row(turns("Why?"), "So!", "No"), tokenizer, DataConfig(), Report(), eos_ids=frozenset({stop}))
    assert text(tokenizer, done.chosen) == "So!"


def test_without_any_end_of_sequence_token_there_is_an_error():
    with pytest.raises(UserError, match="end-of-sequence token; set eos_token_id"):
        one(Preference("a", " b", " c", "p.jsonl:1"), tiny.byte_level((), eos=None))


def test_characters_without_a_token_are_reported():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    example, report = one(Preference("a", " b", " z", "p.jsonl:1"), tokenizer)
    assert (example.chosen.tolist(), example.rejected.tolist()) == ([3, 1], [0, 1])
    assert report.changed == {"text with characters that the tokenizer does not know": 1}


# Plain text and templates


def test_plain_text_is_taken_as_it_stands_or_as_a_turn():
    row = Preference("Why?", " So.", " No.", "p.jsonl:1")
    plain, _ = one(row, family("chatml"), template="plain")
    assert text(family("chatml"), plain.prompt) == "Why?"
    assert text(family("chatml"), plain.chosen) == " So.<|im_end|>"
    turn, _ = one(row, family("chatml"))
    asked, _ = one(chat_row(turns("Why?"), " So.", " No."), family("chatml"))
    assert turn.prompt.tolist() == asked.prompt.tolist() and turn.chosen.tolist() == asked.chosen.tolist()


def test_no_template_is_an_error_for_messages_and_when_asked_for():
    with pytest.raises(UserError, match="the row is a list of messages, but the tokenizer has no chat template"):
        one(chat_row(turns("Why?"), "So.", "No."), family("base"))
    with pytest.raises(UserError, match=r"data\.template is chat, but the tokenizer has no chat template"):
        one(Preference("Why?", "So.", "No.", "p.jsonl:1"), family("base"), template="chat")


def test_text_that_is_already_templated_is_not_templated_again():
    row = Preference("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.", "No.", "p.jsonl:1")
    with pytest.raises(UserError, match=r"set data\.template to plain"):
        one(row, family("chatml"))
    example, _ = one(row, family("chatml"), template="plain")
    assert example.prompt.tolist() == encode_prompt(turns("Why?"), family("chatml"), DataConfig()).tolist()
    assert text(family("chatml"), example.chosen) == "So.<|im_end|>"


def test_templated_text_with_its_own_bos_has_one_bos():
    row = Preference("<s>[INST] Why? [/INST]", " So.", " No.", "p.jsonl:1")
    example, _ = one(row, family("base"))
    assert text(family("base"), example.prompt) == "<s>[INST] Why? [/INST]"


def test_a_template_that_hides_the_answer_is_an_error():
    tokenizer = tiny.chatml_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="does not print the assistant's content"):
        one(chat_row(turns("Why?"), "So.", "No."), tokenizer)


def test_a_completion_that_the_template_rewrites_is_reported():
    tokenizer = tiny.chatml_tokenizer()
    tokenizer.chat_template = tiny.CHATML.replace("m.content", "m.content | replace('colour', 'color')")
    _, report = one(chat_row(turns("Which colour?"), "A colour.", "No."), tokenizer)
    assert report.changed == {
        "turn of the prompt rewritten by the chat template": 1,
        "completion rewritten by the chat template": 1,
    }


@pytest.mark.parametrize("rows", [("Why?", "So.", "So."), ("", "So.", "No."), ("\ud83d", "So.", "No.")])
def test_rows_without_a_difference_a_prompt_or_proper_text_are_refused(rows):
    tokenizer = tiny.byte_level(("</s>",), eos="</s>")
    row = Preference(*rows, "p.jsonl:1")
    with pytest.raises(UserError, match=r"p\.jsonl:1: .*data\.on_bad_row to skip"):
        one(row, tokenizer)
    good = Preference("Why?", "So.", "No.", "p.jsonl:2")
    examples, report = encode_all([row, good], tokenizer, DataConfig(on_bad_row="skip"))
    assert [e.where for e in examples] == ["p.jsonl:2"]
    assert (report.read, report.kept, sum(report.refused.values())) == (2, 1, 1)


# Length


def long_row(prompt: int, chosen: int, rejected: int) -> Preference:
    """Digits are single tokens; completions have one token more, their end."""
    cycle = "0123456789" * 20
    return Preference(cycle[:prompt], "x" + cycle[: chosen - 2], "y" + cycle[: rejected - 2], "p.jsonl:1")


def test_a_long_prompt_loses_its_beginning_but_not_its_bos():
    example, report = one(long_row(20, 6, 4), family("base"), max_length=16)
    assert text(family("base"), example.prompt) == "<s>123456789"
    assert (len(example.prompt), len(example.chosen), len(example.rejected)) == (10, 6, 4)
    assert report.changed == {"prompt trimmed": 1}
    one_token, _ = one(long_row(20, 15, 4), family("base"), max_length=16)
    assert text(family("base"), one_token.prompt) == "<s>"


def test_a_declared_bos_that_heads_every_turn_is_not_kept_as_one():
    row = chat_row(turns("0123456789" * 5), "So.", "No.")
    example, _ = one(row, tiny.smollm_tokenizer(), max_length=20)
    assert text(tiny.smollm_tokenizer(), example.prompt) == "90123456789<|im_end|>\n<|im_start|>assistant\n"


def test_a_row_that_fits_exactly_is_left_alone():
    example, report = one(long_row(9, 6, 4), family("base"), max_length=16)
    assert len(example.prompt) == 10 and report.changed == {}


@pytest.mark.parametrize(
    ("knob", "row", "reason"),
    [
        ("on_long_prompt", long_row(20, 6, 4), "prompt too long"),
        ("on_long_completion", long_row(20, 4, 16), "completion too long"),
    ],
)
def test_long_rows_are_dropped_or_stop_the_run(knob, row, reason):
    examples, report = encode_all([row], family("base"), DataConfig(max_length=16, **{knob: "drop"}))
    assert examples == [] and report.refused == {reason: 1}
    with pytest.raises(UserError, match=rf"p\.jsonl:1: .*data\.max_length 16; raise .* set data\.{knob} to"):
        encode_all([row], family("base"), DataConfig(max_length=16, **{knob: "stop"}))


def test_a_truncated_completion_leaves_half_of_the_limit_to_the_prompt():
    example, report = one(long_row(20, 40, 6), family("base"), max_length=16, on_long_completion="truncate")
    assert text(family("base"), example.chosen) == "x0123456"
    assert text(family("base"), example.rejected) == "y0123</s>"
    assert text(family("base"), example.prompt) == "<s>3456789"
    assert report.changed == {"completion truncated": 1, "prompt trimmed": 1}


def test_completions_that_are_the_same_after_truncation_are_refused():
    row = Preference("1", "2" * 30 + "a", "2" * 30 + "b", "p.jsonl:1")
    with pytest.raises(UserError, match="the same tokens"):
        one(row, family("base"), max_length=16, on_long_completion="truncate")


# Properties

CONTENT = st.text(max_size=30)


@settings(max_examples=60)
@given(name=st.sampled_from(CHAT), question=CONTENT, chosen=CONTENT, rejected=CONTENT)
def test_any_text_comes_back(name, question, chosen, rejected):
    tokenizer, end = family(name), FAMILIES[name][1]
    report = Report()
    row = chat_row(turns(question), chosen, rejected)
    example = encode(row, tokenizer, DataConfig(on_bad_row="skip"), report)
    kept = str.strip if name in ("llama3", "gemma") else str
    if kept(chosen) == kept(rejected):
        assert example is None
        return
    before = encode_prompt(turns(question), tokenizer, DataConfig())
    if not report.changed:
        assert example.prompt.tolist() == before.tolist()
    lead = " " if name == "llama2" else ""
    for completion, content in ((example.chosen, chosen), (example.rejected, rejected)):
        whole = text(tokenizer, np.concatenate([example.prompt, completion]))
        assert whole == text(tokenizer, before) + lead + kept(content) + end
        if not report.changed:
            assert text(tokenizer, completion) == lead + kept(content) + end


@settings(max_examples=60)
@given(
    name=st.sampled_from([*CHAT, "base"]),
    limit=st.integers(8, 60),
    rows=st.lists(st.tuples(CONTENT, CONTENT, CONTENT), min_size=1, max_size=4),
)
def test_any_row_fits_with_its_completions_whole(name, limit, rows):
    tokenizer = family(name)
    pairs = [Preference(*row, f"p.jsonl:{i}") for i, row in enumerate(rows)]
    free, _ = encode_all(pairs, tokenizer, DataConfig(on_bad_row="skip", max_length=10_000))
    cut, report = encode_all(pairs, tokenizer, DataConfig(on_bad_row="skip", max_length=limit))
    assert report.read == len(rows) == report.kept + sum(report.refused.values())
    whole = {example.where: example for example in free}
    trimmed = 0
    for example in cut:
        full = whole[example.where]
        assert example.chosen.tolist() == full.chosen.tolist()
        assert example.rejected.tolist() == full.rejected.tolist()
        longest = max(len(example.chosen), len(example.rejected))
        assert len(example.prompt) == min(len(full.prompt), limit - longest) >= 1
        assert example.prompt.dtype == example.chosen.dtype == np.int32
        bos = int(full.prompt[0] == tokenizer.bos_token_id)
        assert example.prompt[:bos].tolist() == full.prompt[:bos].tolist()
        assert full.prompt.tolist()[-len(example.prompt) + bos or len(full.prompt) :] == example.prompt.tolist()[bos:]
        trimmed += len(example.prompt) < len(full.prompt)
    assert report.changed.get("prompt trimmed", 0) == trimmed
    dropped = [e for e in free if max(len(e.chosen), len(e.rejected)) >= limit]
    assert report.refused.get("completion too long", 0) == len(dropped)


@settings(max_examples=60)
@given(name=st.sampled_from(list(FAMILIES)), prompt=CONTENT, chosen=CONTENT, rejected=CONTENT)
def test_many_rows_and_one_row_give_the_same(name, prompt, chosen, rejected):
    rows = [Preference(prompt, chosen, rejected, "p.jsonl:1"), Preference("Q", " A", " B", "p.jsonl:2")]
    data = DataConfig(on_bad_row="skip")
    many, report = encode_all(rows, family(name), data)
    single = Report()
    ones = [e for row in rows if (e := encode(row, family(name), data, single))]
    assert [(e.prompt.tolist(), e.chosen.tolist(), e.rejected.tolist(), e.where) for e in many] == [
        (e.prompt.tolist(), e.chosen.tolist(), e.rejected.tolist(), e.where) for e in ones
    ]
    assert report == single


# Showing a pair, digest


def test_a_pair_is_shown_with_its_mask():
    example, _ = one(chat_row(turns("Why?"), "So 🌍.", "No."), family("chatml"))
    before = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    shown = shown_example(example, family("chatml"))
    assert shown.chosen == [(before, False), ("So 🌍.<|im_end|>", True)]
    assert shown.rejected == [(before, False), ("No.<|im_end|>", True)]


def test_a_character_with_bytes_on_both_sides_is_not_torn():
    tokenizer = family("base")
    ids = np.array(tokenizer("a🌍b", add_special_tokens=False)["input_ids"], np.int32)
    assert len(ids) == 6  # four of them are bytes of the globe
    example = Example(ids[:3], ids[3:], ids[3:5], "p.jsonl:1")
    assert shown_example(example, tokenizer).chosen == [("a", False), ("🌍b", True)]


def test_the_digest_names_what_turns_text_into_ids():
    data, tokenizer = DataConfig(), tiny.chatml_tokenizer()
    digest = template_digest(tokenizer, data)
    tokenizer(["a", "bb"], padding=False, truncation=True, max_length=1)  # leaves settings behind
    assert template_digest(tokenizer, data) == digest == template_digest(tiny.chatml_tokenizer(), data)
    others = [template_digest(tokenizer, DataConfig(thinking=True))]
    others.append(template_digest(tokenizer, DataConfig(template="plain")))
    tokenizer.add_tokens(["new"])
    others.append(template_digest(tokenizer, data))
    tokenizer = tiny.chatml_tokenizer()
    tokenizer.chat_template += " "
    others.append(template_digest(tokenizer, data))
    tokenizer = tiny.chatml_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    others.append(template_digest(tokenizer, data))
    assert len({digest, *others}) == 6
