"""What probing finds out about a tokenizer, and the digest that a run keeps of it."""

from __future__ import annotations

import hashlib
import types

import numpy as np
import pytest
import tiny_tokenizers as tiny
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode, encode_prompt, shown_example
from mlxdpo.data.report import Report
from mlxdpo.data.template import _first, _start, probe, template_digest
from mlxdpo.types import Example, Message, Preference, UserError

DATA = DataConfig()


def text(tokenizer, ids) -> str:
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False)


def chat(chosen: str = "So.", rejected: str = "No.") -> Preference:
    answer = lambda content: (Message("assistant", content),)  # noqa: E731
    return Preference((Message("user", "Why?"),), answer(chosen), answer(rejected), "p.jsonl:1")


def written(template: str, special: tuple[str, ...] = ("</s>",)):
    return tiny.byte_level(special, template=template, eos="</s>")


def test_the_longest_of_two_special_tokens_that_begin_together():
    assert _first(["<a", "<a>", "<b>"], "x<a>y") == ("x", "<a>")
    assert _first(["<a>", "<b>"], "x<b><a>") == ("x", "<b>")
    assert _first(["<a>"], "x") is None


def test_a_template_without_the_bos_that_the_tokenizer_adds_gets_none():
    tokenizer = tiny.byte_level(
        ("<s>", "<|im_end|>"), template=tiny.CHATML, eos="<|im_end|>", bos="<s>", emits_bos=True
    )
    example = encode(chat(), tokenizer, DATA, Report())
    assert text(tokenizer, example.prompt).startswith("<|im_start|>user")
    assert encode_prompt("Why?", tokenizer, DATA).tolist() == example.prompt.tolist()


def test_a_declared_bos_counts_though_it_is_never_emitted():
    declared = tiny.byte_level(("<s>", "</s>"), eos="</s>", bos="<s>")
    emitting = tiny.byte_level(("<s>", "</s>"), eos="</s>", bos="<s>", emits_bos=True)
    bos = declared.convert_tokens_to_ids("<s>")
    assert (probe(declared, DATA).start, probe(declared, DATA).bos) == ((), {bos})
    assert (probe(emitting, DATA).start, probe(emitting, DATA).bos) == ((bos,), {bos})
    assert probe(tiny.chatml_tokenizer(), DATA).bos == frozenset()


def test_a_tokenizer_whose_special_tokens_change_the_text_begins_with_none():
    assert _start(lambda words, add_special_tokens=True: {"input_ids": [5, 6] if add_special_tokens else [7]}) == ()
    assert _start(lambda words, add_special_tokens=True: {"input_ids": [5, 7, 6] if add_special_tokens else [7]}) == (
        5,
    )


def test_two_bos_alone_are_one():
    tokenizer, report = tiny.base_tokenizer(), Report()
    assert text(tokenizer, encode_prompt("<s><s>", tokenizer, DATA)) == "<s>"
    example = encode(Preference("<s><s>", " 2", " 3", "p.jsonl:1"), tokenizer, DATA, report)
    assert text(tokenizer, example.prompt) == "<s>" and report.changed == {}


def test_the_wrappers_ends_and_the_smallest_of_strange_ones():
    bare = tiny.headings_tokenizer()
    low, high = sorted(bare.convert_tokens_to_ids(["!", "?"]))
    wrapped = TokenizerWrapper(bare, eos_token_ids=[bare.eos_token_id, high])
    assert probe(wrapped, DATA).ends == {bare.eos_token_id, high} and probe(wrapped, DATA).eos == bare.eos_token_id
    assert probe(bare, DATA, frozenset({low, high})).eos == low
    assert probe(bare, DATA).ends == {bare.eos_token_id}


def test_an_end_that_is_no_special_token_ends_the_turn():
    tokenizer = written("{% for m in messages %}{{ m.content + '!\n' }}{% endfor %}")
    writer = probe(tokenizer, DATA, frozenset({tokenizer.convert_tokens_to_ids("!")}))
    assert (writer.end, writer.rest) == ("!", "\n")


@pytest.mark.parametrize("answer", ["{{ m.content + m.content }}", "{{ m.content[:3] }}"])
def test_a_template_that_prints_the_answer_twice_or_in_part_is_refused(answer):
    with pytest.raises(UserError, match=r"does not print the assistant's content; set data\.template to plain"):
        encode(chat(), written(f"{{% for m in messages %}}{answer}{{% endfor %}}"), DATA, Report())


def test_a_template_that_refuses_one_question_and_one_answer():
    template = (
        "{% for m in messages %}{{ raise_exception('no ' + m.role) if m.role != 'user' }}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"'no assistant' \(turns: user, assistant\), for one question and one answer"):
        encode(chat(), written(template), DATA, Report())


def test_a_conversation_without_a_turn_is_one_sentence():
    with pytest.raises(UserError, match=r"^prompt: the chat template says .*empty conversation.* \(turns: none\)"):
        encode_prompt((), tiny.chatml_tokenizer(), DATA)


def test_the_date_of_a_template_stands_still():
    template = "{{ date_string if date_string is defined else 'today' }}" + tiny.CHATML
    ids = encode_prompt("Why?", tokenizer := written(template, ("</s>", "<|im_end|>")), DATA)
    assert text(tokenizer, ids).startswith("26 Jul 2024<|im_start|>")


def test_messages_to_generate_from_need_a_template():
    with pytest.raises(UserError, match=r"^prompt: the row is a list of messages"):
        encode_prompt((Message("user", "Why?"),), tiny.base_tokenizer(), DATA)


def test_two_ends_are_one_too_many():
    with pytest.raises(UserError, match="end-of-sequence token before its end"):
        encode(Preference("1", " 2</s></s>", " 3", "p.jsonl:1"), tiny.base_tokenizer(), DATA, Report())


def test_only_texts_with_unknown_characters_are_reported():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer, report = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>"), Report()
    assert encode(Preference("a", " b", " a", "p.jsonl:1"), tokenizer, DATA, report) and report.changed == {}


def test_what_to_set_when_a_long_row_stops_the_run():
    for knob, row, words in (
        ("on_long_prompt", Preference("1" * 20, " 2", " 3", "p.jsonl:1"), "on_long_prompt to trim or drop"),
        ("on_long_completion", Preference("1", " 2" * 20, " 3", "p.jsonl:1"), "on_long_completion to truncate or drop"),
    ):
        with pytest.raises(UserError, match=rf"raise data\.max_length, or set data\.{words}$"):
            encode(row, tiny.base_tokenizer(), DataConfig(max_length=16, **{knob: "stop"}), Report())


def test_a_shown_pair_is_not_tidied_nor_torn():
    tokenizer = tiny.base_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = np.array(tokenizer("ab🌍 . c", add_special_tokens=False)["input_ids"], np.int32)
    example = Example(ids[:4], ids[4:], ids[4:], "p.jsonl:1")
    assert shown_example(example, tokenizer).chosen == [("ab", False), ("🌍 . c", True)]


class Plain:
    """A tokenizer in Python, without rules of the Rust library."""

    chat_template, special_tokens_map = "T", types.MappingProxyType({"pad_token": "_", "eos_token": "</s>"})

    def __call__(self, words, add_special_tokens=True):
        return {"input_ids": [1, 0] if add_special_tokens else [0]}

    def get_vocab(self):
        return {"b": 1, "a": 0}


def test_the_digest_is_of_these_words_in_this_order():
    """Another digest of the same tokenizer would refuse every run that is there."""
    vocabulary = hashlib.sha256(b'{"a": 0, "b": 1}').hexdigest()
    words = (
        '{"chat_template": "T", "eos": "score", "special": {"eos_token": "</s>", "pad_token": "_"}, "start": [1], '
        f'"template": "auto", "thinking": false, "tokenizer": "{vocabulary}"}}'
    )
    assert template_digest(Plain(), DATA) == hashlib.sha256(words.encode()).hexdigest()


def test_the_digest_sees_rules_beside_the_vocabulary_but_no_padding():
    from tokenizers import normalizers

    tokenizer = tiny.byte_level(("</s>", "<pad>"), eos="</s>")
    tokenizer.pad_token = "<pad>"
    digest = template_digest(tokenizer, DATA)
    tokenizer(["a", "bb"], padding=True)  # leaves settings behind
    assert template_digest(tokenizer, DATA) == digest
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert template_digest(tokenizer, DATA) != digest


def test_a_template_that_asks_for_the_date_is_always_told_the_same():
    """Llama-3.2's and others: token ids would change at midnight, and with them a resumed run."""
    template = "{{ strftime_now('%d %b %Y') }} " + tiny.CHATML
    writer = probe(written(template, ("</s>", "<|im_start|>", "<|im_end|>")), DATA)
    assert writer.render((Message("user", "Why?"),), (), generate=False).startswith("26 Jul 2024 <|im_start|>")
