"""The tokens that end an answer: one set for training, sampling, judging and export.

A base model's config.json ends texts with one token while its chat template ends turns with another, which training
then teaches. Whoever samples has to stop at either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ANSWER = "Forty-two."


def end_tokens(tokenizer: Any, said: Mapping[str, Any]) -> frozenset[int]:
    """The ends that a config.json names, generation_config.json's laid over it, and the template's end of a turn.

    Where the files name none, the tokenizer's own.
    """
    named = {**said.get("text_config", {}), **said}.get("eos_token_id")
    found = [named] if isinstance(named, int) else list(named or [tokenizer.eos_token_id])
    return frozenset(token for token in (*found, turn_end(tokenizer)) if token is not None)


def turn_end(tokenizer: Any) -> int | None:
    """The special token behind an answer in the chat template; None where there is none, or only a next header."""
    import jinja2

    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": ANSWER}]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        bare = tokenizer.apply_chat_template(turns[:1], tokenize=False)
    except (jinja2.TemplateError, TypeError, IndexError, KeyError, AttributeError, ValueError):
        return None  # a template may refuse any turns; encoding says so, with the row at hand
    header = asked[len(bare) :] if asked.startswith(bare) else ""
    end, opening = _first_special(tokenizer, whole.rpartition(ANSWER)[2]), _first_special(tokenizer, header)
    return None if end == opening else end


def _first_special(tokenizer: Any, text: str) -> int | None:
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((i for i in ids if i in special | set(tokenizer.all_special_ids)), None)
