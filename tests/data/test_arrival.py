"""Nothing of a row is lost between its turns and its tokens without a word: parts, forms, and what is counted."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tokenizers as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode, encode_all, encode_prompt
from mlxdpo.data.report import Report
from mlxdpo.data.template import probe
from mlxdpo.types import Message, Preference, UserError

USER = (Message("user", "Why?"),)
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string", "description": "A city."}}},
    },
}
CALL = {"type": "function", "id": "call_1", "function": {"name": "clock", "arguments": {"zone": "Oslo"}}}
HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
WITH_CALLS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    + HEAD
    + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' }}ARGUMENTS{% endfor %}"
    + TAIL
)
STRIPPING = HEAD + "{{ m.content.split('</think>')[-1].lstrip('\n') }}" + TAIL


def written(template):
    return tiny.byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), template=template, eos="<|im_end|>")


def calling(arguments="{{ c.function.arguments | tojson }}"):
    return written(WITH_CALLS.replace("ARGUMENTS", arguments))


def said(content, **extra):
    return (Message("assistant", content, extra),)


def row(chosen, prompt=USER, tools=(), rejected=None):
    return Preference(prompt, chosen, rejected or said("No."), "p.jsonl:1", tools)


def texts(example, tokenizer):
    return [tokenizer.decode(ids.tolist()) for ids in (example.prompt, example.chosen, example.rejected)]


def one(tokenizer, row, **data):
    report = Report()
    example = encode(row, tokenizer, DataConfig(**data), report)
    return texts(example, tokenizer), report


def refusal(tokenizer, row, **data):
    with pytest.raises(UserError) as caught:
        encode(row, tokenizer, DataConfig(**data), Report())
    with pytest.raises(UserError) as alone:  # skipped, it is counted by name
        examples, report = encode_all([row], tokenizer, DataConfig(on_bad_row="skip", **data))
        assert examples == [] and len(report.refused) == 1
        raise UserError(next(iter(report.refused)))
    return str(caught.value), str(alone.value)


def test_a_call_is_no_empty_answer_where_the_template_prints_no_calls():
    sentence, reason = refusal(tiny.chatml_tokenizer(), row(said("", tool_calls=[CALL])))
    assert "p.jsonl:1: the chat template does not print the call of clock; use a model whose" in sentence
    assert reason == "tool call that the chat template omits"


def test_tools_that_the_template_does_not_print():
    sentence, reason = refusal(tiny.chatml_tokenizer(), row(said("So."), tools=(TOOL,)))
    assert "does not print the name clock of the 1 tools" in sentence and "take `tools` out of the rows" in sentence
    assert reason == "tools that the chat template omits"
    with pytest.raises(UserError, match=r"^prompt: the chat template does not print the name clock"):
        encode_prompt(USER, tiny.chatml_tokenizer(), DataConfig(), (TOOL,))
    sentence, _ = refusal(tiny.base_tokenizer(), Preference("Why?", " So.", " No.", "p.jsonl:1", (TOOL,)))
    assert "the row has tools, and plain text has no place for them" in sentence


def test_a_schema_without_its_parameters_is_refused_and_one_without_descriptions_counted():
    names = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    sentence, _ = refusal(written(names + tiny.CHATML), row(said("So."), tools=(TOOL,)))
    assert "does not print the parameter zone" in sentence
    more = names.replace("t.function.name", "t.function.name + (t.function.parameters.properties | list | join(' '))")
    _, report = one(written(more + tiny.CHATML), row(said("So."), tools=(TOOL,)))
    assert report.changed == {
        "description of a tool: not printed by the chat template": 1,
        "description of a parameter: not printed by the chat template": 1,
    }


@pytest.mark.parametrize("prints", [
    "{{ c.function.arguments | tojson }}",
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    "{{ '```' + c.function.arguments }}",  # DeepSeek-V3 joins text
    "{{ '' ~ c.function.arguments }}",  # an object would come out as Python prints it
])  # fmt: skip
def test_arguments_as_text_as_an_object_and_without_a_wrapper_are_the_same_tokens(prints):
    tokenizer = calling(prints)
    as_text = {"function": {"name": "clock", "arguments": '{"zone":"Oslo"}'}}
    bare = {"name": "clock", "arguments": {"zone": "Oslo"}}
    rows = [row(said("", tool_calls=[call]), tools=(TOOL,)) for call in (CALL, as_text, bare)]
    rows += [row(said("", tool_calls='[{"name": "clock", "arguments": {"zone": "Oslo"}}]'), tools=(TOOL,))]
    rows += [row(said("", function_call=bare), tools=(TOOL,))]
    found = [one(tokenizer, each)[0] for each in rows]
    assert found == [found[0]] * 5
    assert found[0][1].replace("```", "") == '<call>clock {"zone": "Oslo"}<|im_end|>'


def test_ids_of_calls_that_are_not_printed_are_counted():
    history = (
        *USER,
        *said("", tool_calls=[CALL]),
        Message("tool", "noon", {"tool_call_id": "call_1", "name": "clock"}),
    )
    found, report = one(calling(), row(said("Noon."), history, (TOOL,)))
    assert "<call>clock" in found[0] and "tool\nnoon<|im_end|>" in found[0]
    assert report.changed == {
        "id of a tool call: not printed by the chat template": 1,
        "name: not printed by the chat template": 1,
    }


def test_calls_that_are_none():
    assert "a tool call names no function" in refusal(calling(), row(said("", tool_calls=[{"id": "1"}])))[0]
    assert "expected a list of calls" in refusal(calling(), row(said("", tool_calls="look it up")))[0]


@pytest.mark.parametrize(("role", "remedy"), [("system", "set data.system to fold"), ("tool", "use a model whose")])
def test_a_turn_that_is_left_out_or_written_as_an_answer(role, remedy):
    turns = (Message(role, "Be brief."), *USER)
    drops = written(HEAD.replace("%}{{", "%}{% if m.role in ['user', 'assistant'] %}{{", 1) + "{{ m.content }}"
                    + TAIL.replace("{% endfor %}", "{% endif %}{% endfor %}"))  # fmt: skip
    sentence, _ = refusal(drops, row(said("So."), turns))
    assert f"does not print turn 1 ({role}); {remedy}" in sentence
    same = written(tiny.CHATML.replace("m.role +", "('user' if m.role == 'user' else 'assistant') +"))
    sentence, _ = refusal(same, row(said("So."), turns))
    assert f"writes the {role} turn as an assistant's; {remedy}" in sentence


def test_a_system_turn_is_folded_when_told():
    gemma, prompt = tiny.gemma_tokenizer(), (Message("system", "Be brief."), *USER)
    sentence, _ = refusal(gemma, row(said("So."), prompt))
    assert "'System role not supported' (turns: system, user); set data.system to fold to put it in front" in sentence
    found, report = one(gemma, row(said("So."), prompt), system="fold")
    assert found[0] == "<bos><start_of_turn>user\nBe brief.\n\nWhy?<end_of_turn>\n<start_of_turn>model\n"
    assert report.changed == {}
    assert one(gemma, row(said("So."), (Message("user", "Be brief.\n\nWhy?"),)))[0] == found
    folded = encode_prompt(prompt, gemma, DataConfig(system="fold"))
    assert gemma.decode(folded.tolist()) == found[0]
    lonely = (*USER, *said("So."), Message("system", "Be brief."))
    assert "no user turn follows the system turn" in refusal(gemma, row(said("So."), lonely), system="fold")[0]


THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize("template", [STRIPPING, tiny.CHATML], ids=["strips tags", "reads content alone"])
def test_reasoning_that_the_template_strips_stops_is_kept_or_dropped(template):
    tokenizer = written(template)
    inline = template == STRIPPING
    think = row(said(THOUGHT + "So.") if inline else said("So.", reasoning_content="hm"))
    sentence, reason = refusal(tokenizer, think)
    assert "does not print the answer's reasoning" in sentence and "set data.reasoning to keep" in sentence
    assert reason == "reasoning that the chat template strips"
    kept, report = one(tokenizer, think, reasoning="keep")
    assert kept[1:] == [THOUGHT + "So.<|im_end|>", "No.<|im_end|>"] and report.changed == {}
    dropped, report = one(tokenizer, think, reasoning="drop")
    assert dropped[1:] == ["So.<|im_end|>", "No.<|im_end|>"]
    assert report.changed == {"reasoning that the chat template strips": 1}


def test_reasoning_is_kept_behind_a_generation_prompt_that_opens_it():
    """DeepSeek-R1: the prompt ends in <think>, a written turn loses its reasoning, samples begin without the tag."""
    tokenizer = written(STRIPPING.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"))
    rows = [
        row(said(start + "hm\n</think>\n\nSo."), rejected=said("ha\n</think>\n\nNo.")) for start in ("", "<think>\n")
    ]
    for each in rows:
        found, report = one(tokenizer, each, reasoning="keep")
        assert found[0].endswith("<|im_start|>assistant\n<think>\n") and report.changed == {}
        assert found[1:] == ["hm\n</think>\n\nSo.<|im_end|>", "ha\n</think>\n\nNo.<|im_end|>"]


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking", "tags"])
def test_reasoning_is_handed_over_under_the_name_that_the_template_reads(given):
    tokenizer = written(
        HEAD + "{% if m.reasoning %}{{ '<think>\n' + m.reasoning + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}" + TAIL
    )
    think = said(THOUGHT + "So.") if given == "tags" else said("So.", **{given: "hm"})
    found, report = one(tokenizer, row(think))
    assert found[1] == THOUGHT + "So.<|im_end|>" and report.changed == {}


def test_reasoning_of_an_earlier_turn_is_left_to_the_template_and_counted():
    prompt = (*USER, *said(THOUGHT + "Because."), Message("user", "And?"))
    found, report = one(written(STRIPPING), row(said("So."), prompt))
    assert "assistant\nBecause.<|im_end|>" in found[0]
    assert report.changed == {"reasoning of an earlier turn: not printed by the chat template": 1}


def test_content_in_parts_is_their_text_and_an_image_is_refused():
    parts = lambda *words: [{"type": "text", "text": word} for word in words]  # noqa: E731
    chatml = tiny.chatml_tokenizer()
    split = row(said(parts("So", " it is.")), (Message("user", parts("Wh", "y?")),))
    assert one(chatml, split)[0] == one(chatml, row(said("So it is.")))[0]
    image = (Message("user", [{"type": "image", "image": "cat.png"}, *parts("Why?")]),)
    assert refusal(chatml, row(said("So."), image))[1] == "content that is not text"


def test_a_key_that_nobody_prints_and_a_turn_that_is_printed_twice_are_counted():
    _, report = one(tiny.chatml_tokenizer(), row(said("So."), (Message("user", "Why?", {"mood": "glum"}),)))
    assert report.changed == {"mood: not printed by the chat template": 1}
    twice = written(HEAD + "{{ m.content + (m.content if m.role == 'user' else '') }}" + TAIL)
    _, report = one(twice, row(said("So.")))
    assert report.changed == {"turn that the chat template prints more than once": 1}


def test_rows_of_one_shape_are_looked_at_once():
    tokenizer = tiny.chatml_tokenizer()
    rows = [row(said(f"So {n}."), (Message("user", f"Why {n}?"),)) for n in range(50)]
    examples, _ = encode_all(rows, tokenizer, DataConfig())
    writer = probe(tokenizer, DataConfig())
    assert len(examples) == 50 and len(writer.seen) == 1 and probe(tokenizer, DataConfig()) is writer
    tokenizer.chat_template += " "
    assert probe(tokenizer, DataConfig()) is not writer


FAMILIES = {
    "chatml": tiny.chatml_tokenizer(), "llama3": tiny.llama3_tokenizer(), "thinking": tiny.thinking_tokenizer(),
    "gemma": tiny.gemma_tokenizer(), "calling": calling(), "stripping": written(STRIPPING),
}  # fmt: skip


@st.composite
def conversations(draw):
    """A row whose parts are all different words, and those words."""
    words = iter([f"word{n}" for n in range(100, 200)])
    used = []

    def word():
        used.append(next(words))
        return used[-1]

    def turn(role):
        extra = {}
        if role == "assistant" and draw(st.booleans()):
            extra["reasoning_content"] = word()
        if role == "assistant" and draw(st.booleans()):
            extra["tool_calls"] = [{"function": {"name": word(), "arguments": {word(): [word(), {word(): word()}]}}}]
        return Message(role, word(), extra)

    roles = draw(st.sampled_from([(), ("system",), ("developer",)]))
    prompt = [turn(role) for role in roles] + [turn("user")]
    for _ in range(draw(st.integers(0, 2))):
        prompt += [turn("assistant"), turn(draw(st.sampled_from(["tool", "user"])))]
    tools = ()
    if draw(st.booleans()):
        tools = ({"function": {"name": word(), "parameters": {"type": "object", "properties": {word(): {}}}}},)
    return Preference(tuple(prompt), (turn("assistant"),), said("No."), "r", tools), used


@settings(max_examples=150, deadline=None)
@given(
    made=conversations(),
    name=st.sampled_from(sorted(FAMILIES)),
    system=st.sampled_from(["template", "fold"]),
    reasoning=st.sampled_from(["stop", "keep", "drop"]),
)
def test_every_word_arrives_or_the_row_is_refused_or_its_loss_counted(made, name, system, reasoning):
    (row, used), tokenizer, report = made, FAMILIES[name], Report()
    data = DataConfig(on_bad_row="skip", max_length=4096, system=system, reasoning=reasoning)
    example = encode(row, tokenizer, data, report)
    if example is None:
        assert sum(report.refused.values()) == 1
        return
    text = tokenizer.decode(np.concatenate([example.prompt, example.chosen]).tolist())
    lost = {word for word in used if text.count(word) != 1}
    for turns, counted in (
        (row.prompt, "reasoning of an earlier turn: not printed by the chat template"),
        (row.chosen, "reasoning that the chat template strips"),
    ):
        if gone := lost & {turn.extra.get("reasoning_content") for turn in turns}:
            assert counted in report.changed
            lost -= gone
    assert lost == set()
