"""A tokenizer and its chat template that were not seen before, tried out of harm's way before they are used.

Both are programs: a template may count to infinity or build a text of ten gigabytes, a tokenizer's pattern may take
longer than anybody lives, and neither can be interrupted from within. So the first time they run in a process with
limits (`machine.limited`), over texts that bring out what is slow; that they passed is noted by their digest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxdpo.io.atomic import write_json
from mlxdpo.io.digest import file_digest, json_digest
from mlxdpo.machine.device import cache_folder, version_of
from mlxdpo.machine.limited import LimitReached, call_limited, start_limits
from mlxdpo.model.chat_template import template_settings
from mlxdpo.types import UserError

FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja", "additional_chat_templates/*")
SECONDS, MEGABYTES = 6, 3000
LOADING = 120  # seconds, where the tokenizer is made of an older kind of file first
RUN = 2000  # characters of a run of one kind: what is quadratic passes, what is cubic does not
RUNS = ("a", "A", "1", " ", "\n", "\t ", "!", "'", "-", "_", "é", "한", "\0", "aA", "a1", "a ", "ab", "<|", "= ")


def try_tokenizer(folder: Path, name: str) -> None:
    """Raise `UserError` where the tokenizer or chat template in `folder` takes more time or memory than any should.

    What else is wrong with them is left to whoever loads them next, in the usual words.
    """
    digest = _tokenizer_digest(folder)
    note = cache_folder() / "tried" / f"{digest}.json"
    if note.exists():
        return
    quick = (folder / "tokenizer.json").exists()
    seconds = SECONDS if quick else LOADING
    try:
        call_limited("mlxdpo.model.trial:use_tokenizer", [str(folder.resolve()), seconds], seconds, MEGABYTES)
    except LimitReached as limit:
        raise UserError(
            f"{name}: its tokenizer or chat template took {limit} on a few short texts and was stopped; "
            "it may be malicious; use another model"
        ) from None
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, and nothing else
        write_json(note, {"model": name, "digest": digest})


def _tokenizer_digest(folder: Path) -> str:
    """All that shapes what the tokenizer does: its files, and the libraries that run them."""
    files = sorted({file for pattern in FILES for file in folder.glob(pattern) if file.is_file()})
    libraries = [version_of(name) for name in ("transformers", "tokenizers", "jinja2")]
    return json_digest([[(file.name, file_digest(file)) for file in files], libraries])[:32]


def use_tokenizer(asked: tuple[str, int]) -> bool:
    """In the limited process: load the tokenizer of a folder, tokenise odd texts, and render conversations of them."""
    from transformers import AutoTokenizer

    folder, seconds = asked
    start_limits(seconds, MEGABYTES)
    found: list[Any] = []
    files = {"trust_remote_code": False, "local_files_only": True}
    _let_it(lambda: found.append(AutoTokenizer.from_pretrained(folder, **files, **template_settings(Path(folder)))))
    for tokenizer in found:
        _use_all_of(tokenizer)
    return True


def _use_all_of(tokenizer: Any) -> None:
    for text in (one * (RUN // len(one)) for one in RUNS):
        _let_it(lambda text=text: tokenizer([f"x {text}!", text]))
    for turns in _conversations():
        for extra in ({"add_generation_prompt": True}, {"tools": [TOOL], "enable_thinking": True}):
            for template in _templates(tokenizer):
                asked = extra | {"chat_template": template}
                _let_it(lambda turns=turns, asked=asked: tokenizer(_written(tokenizer, turns, asked)))


def _templates(tokenizer: Any) -> list[str | None]:
    """Every template of a tokenizer; one that has none may write turns by itself."""
    found = tokenizer.chat_template
    return list(found.values()) if isinstance(found, dict) else [found]


def _let_it(use: Callable[[], Any]) -> str:
    """Use it; what it refuses is no harm, and is said where it is used next."""
    try:
        use()
    except MemoryError:
        raise
    except Exception as error:  # `tokenizers` raises Exception itself, a template whatever breaks first
        return str(error)
    return ""


def _written(tokenizer: Any, turns: Any, extra: dict[str, Any]) -> str:
    return tokenizer.apply_chat_template(turns, tokenize=False, **extra)


TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


def _conversations() -> list[list[dict[str, str]]]:
    """Short, long, of many turns, with a system message, with odd texts."""
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>a</think>\n\nBecause."}
    long = {"role": "user", "content": "a <b>1</b>\n" * RUN}
    system = {"role": "system", "content": "Be brief."}
    return [[user], [user, answer], [system, user, answer, user], [user, answer] * 50, [long], [long, answer, user]]
