"""Single answers with a thumb, streams, answers without their end, and what is said when a row cannot be encoded."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny_tokenizers as tiny

from mlxdpo.config import DataConfig
from mlxdpo.data import encode as encoding
from mlxdpo.data.encode import encode, encode_all, encode_prompt, encode_stream
from mlxdpo.data.report import Report
from mlxdpo.data.template import probe
from mlxdpo.types import Extras, Message, Preference, UnpairedExample, UserError

base, chatml = functools.cache(tiny.base_tokenizer), functools.cache(tiny.chatml_tokenizer)


def text(tokenizer, ids) -> str:
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def chat(prompt: str, chosen: str, rejected: str) -> Preference:
    answer = lambda content: (Message("assistant", content),)  # noqa: E731
    return Preference((Message("user", prompt),), answer(chosen), answer(rejected), "p.jsonl:1")


def test_a_single_answer_stands_on_both_sides_with_its_thumb():
    """Also one that another row's answer equals: nothing is compared."""
    rows = [
        UnpairedExample("1", " 2", good, f"p.jsonl:{i}", extras=Extras(weight=3.0))
        for i, good in enumerate((True, False))
    ]
    examples, report = encode_all(rows, base(), DataConfig())
    assert [text(base(), e.chosen) for e in examples] == [" 2</s>"] * 2
    assert all(e.chosen.tolist() == e.rejected.tolist() for e in examples)
    assert [e.extras for e in examples] == [Extras(weight=3.0, desirable=1.0), Extras(weight=3.0, desirable=0.0)]
    assert (report.read, report.kept, report.changed) == (2, 2, {})


def test_what_a_pair_says_of_itself_is_kept():
    row = Preference("1", " 2", " 3", "p.jsonl:7", extras=Extras(label=0.7, margin=0.2))
    example = encode(row, base(), DataConfig(), Report())
    assert example.extras == Extras(label=0.7, margin=0.2) and example.where == "p.jsonl:7"


def test_a_stream_is_encoded_in_chunks_with_bad_rows_counted(monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK", 2)
    good = [Preference(str(i), " a", " b", f"p.jsonl:{i}") for i in range(5)]
    rows = [*good[:3], Preference("1", " a", " a", "p.jsonl:bad"), *good[3:]]
    data, report = DataConfig(on_bad_row="skip"), Report()
    taken: list[int] = []
    source = (taken.append(i) or row for i, row in enumerate(rows))
    stream = encode_stream(source, probe(base(), data), data, report)
    first = next(stream)
    assert taken == [0, 1] and first.where == "p.jsonl:0"  # no more is read than a chunk
    found = [first, *stream]
    assert [e.where for e in found] == [row.where for row in good]
    assert [e.prompt.tolist() for e in found] == [e.prompt.tolist() for e in encode_all(good, base(), data)[0]]
    assert (report.read, report.kept, report.refused) == (6, 5, {"identical after tokenisation": 1})


def test_an_end_that_is_not_scored_is_left_out_on_both_kinds_of_text():
    data = DataConfig(eos="leave")
    plain = encode(Preference("1", " 2", " 3</s>", "p.jsonl:1"), base(), data, Report())
    assert (text(base(), plain.chosen), text(base(), plain.rejected)) == (" 2", " 3")
    templated = encode(chat("Why?", "So.", "No."), chatml(), data, Report())
    assert (text(chatml(), templated.chosen), text(chatml(), templated.rejected)) == ("So.", "No.")


def test_an_empty_answer_without_its_end_would_train_nothing():
    report = Report()
    row = chat("Why?", "So.", "")
    assert encode(row, chatml(), DataConfig(eos="leave", on_bad_row="skip"), report) is None
    assert report.refused == {"no scored token": 1} and report.kept == 0
    assert text(chatml(), encode(row, chatml(), DataConfig(), Report()).rejected) == "<|im_end|>"


def test_a_bad_row_is_told_with_its_reason():
    for row, reason in (
        (Preference("1", " 2", " 2", "p.jsonl:1"), "chosen and rejected are the same tokens"),
        (Preference("\ud83d", " 2", " 3", "p.jsonl:1"), r"half a character \('\\ud83d'\)"),
    ):
        with pytest.raises(UserError, match=f"p.jsonl:1: .*{reason}"):
            encode(row, base(), DataConfig(), Report())
    bare = tiny.byte_level(("</s>",), eos="</s>")
    with pytest.raises(UserError, match="the prompt has no tokens"):
        encode(Preference("", "2", "3", "p.jsonl:1"), bare, DataConfig(), Report())


def test_changes_of_a_row_that_is_left_out_are_not_counted():
    row = Preference("0123456789" * 3, " 2" * 30, " 3", "p.jsonl:1")
    data = DataConfig(max_length=16, on_long_completion="truncate", on_long_prompt="drop")
    examples, report = encode_all([row], base(), data)
    assert examples == [] and report.changed == {} and report.refused == {"prompt too long": 1}


def test_dropped_rows_never_stop_a_run_that_stops_at_bad_ones():
    data = DataConfig(max_length=16, on_bad_row="stop")
    examples, report = encode_all([Preference("1", " 2" * 30, " 3", "p.jsonl:1")], base(), data)
    assert examples == [] and report.refused == {"completion too long": 1}
    assert report.first == {
        "completion too long": "p.jsonl:1: a completion of 61 tokens does not fit data.max_length 16"
    }


def test_a_prompt_to_generate_from():
    assert text(base(), encode_prompt("Why?", base(), DataConfig())) == "<s>Why?"
    assert text(base(), encode_prompt("<s>Why?", base(), DataConfig())) == "<s>Why?"
    ids = encode_prompt("Why?", chatml(), DataConfig())
    assert ids.dtype == np.int32
    assert text(chatml(), ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UserError, match=r"^prompt: the chat template says 'System role not supported'"):
        encode_prompt((Message("system", "Hm."), Message("user", "Why?")), tiny.gemma_tokenizer(), DataConfig())
    with pytest.raises(UserError, match=r"^prompt: .*half a character"):
        encode_prompt("\ud83d", base(), DataConfig())


def test_a_template_that_writes_a_bos_before_one_that_is_there_leaves_one():
    """Llama-2's template writes <s>; a user who pasted one too does not get two."""
    tokenizer = tiny.llama2_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    example = encode(chat("Why?", "So.", "No."), tokenizer, DataConfig(), Report())
    assert text(tokenizer, example.prompt) == "<s>[INST] Why? [/INST]"
    assert encode_prompt("Why?", tokenizer, DataConfig()).tolist() == example.prompt.tolist()


def test_only_a_repeated_bos_is_dropped_from_the_beginning():
    example = encode(Preference("<s><s><s>11", " 2", " 3", "p.jsonl:1"), base(), DataConfig(), Report())
    assert text(base(), example.prompt) == "<s>11"
    example = encode(Preference("11", " 2", " 3", "p.jsonl:1"), chatml(), DataConfig(template="plain"), Report())
    assert text(chatml(), example.prompt) == "11"


def test_text_that_begins_like_a_template_is_refused_after_blanks_too():
    row = Preference(" \n<|im_start|>user\nWhy?", "So.", "No.", "p.jsonl:1")
    with pytest.raises(UserError, match=r"p\.jsonl:1: the prompt begins with '<\|im_start\|>user"):
        encode(row, chatml(), DataConfig(), Report())
    asked = encode(row, chatml(), DataConfig(template="chat"), Report())
    assert text(chatml(), asked.prompt).startswith("<|im_start|>user\n \n<|im_start|>user\nWhy?<|im_end|>")


def test_messages_and_text_may_stand_in_one_row():
    """A chat prompt with plain answers is a chat; the answers are the assistant's."""
    row = Preference((Message("user", "Why?"),), "So.", "No.", "p.jsonl:1")
    mixed, whole = (encode(r, chatml(), DataConfig(), Report()) for r in (row, chat("Why?", "So.", "No.")))
    assert mixed.prompt.tolist() == whole.prompt.tolist() and mixed.chosen.tolist() == whole.chosen.tolist()
    with pytest.raises(UserError, match="the row is a list of messages"):
        encode(row, base(), DataConfig(template="plain"), Report())
