"""A chat template in the language of Ollama's Modelfile (Go's text/template), found by asking the Jinja template.

Jinja cannot be translated line by line: Ollama's language can neither trim nor refuse. So the template is
asked to write small conversations; what it prints around the contents makes a `TurnTemplate`; and that is held against
the template on random conversations. Where they differ in one, there is no Go template, and a sentence says where.

Turns alternate, as Ollama joins neighbours of one role before it fills a template in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlxdpo.data.report import BadRow
from mlxdpo.types import Message, UserError

Render = Callable[[Sequence[Message]], str]
"""Turns -> the prompt that the Jinja template writes for the next answer."""

MARKS = [f"Mark{i}kraM" for i in range(6)]
CONVERSATIONS = 200
WORDS = (
    "red",
    "Überraschung",
    "4:",
    "{{ .Content }}",
    '"quoted"',
    '"""',
    "a\nb",
    "\n\nlist:\n- 1",
    "`x`",
    "\\n",
    "%s",
    "文",
)


class TurnTemplate(NamedTuple):
    """What stands around the contents of a conversation.

    `start` begins one without a system turn, `system` (before, after) surrounds a system turn and begins one with it;
    `user` and `assistant` surround turns, `header` asks for an answer. `system` is None where the template refuses such
    turns. `trims` when contents lose their outer blanks.
    """

    start: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    header: str
    trims: bool = False

    def render(self, turns: Sequence[Message]) -> str:
        """What `go_template` writes for turns that alternate and end with the user's."""
        text = "" if turns[0].role == "system" else self.start
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        for turn in turns:
            before, after = around[turn.role]
            text += before + (turn.content.strip() if self.trims else turn.content) + after
        return text + self.header


def learn_template(render: Render, seed: int = 0) -> TurnTemplate:
    """What `render` writes around contents. Raises `UserError` where that is not all that it does."""
    try:
        found = _learn_turns(render)
    except BadRow as bad:
        raise UserError(f"ollama: {bad.sentence}; it has no equivalent Go template; export --to gguf") from None
    for turns in random_conversations(CONVERSATIONS, found, seed):
        try:
            wanted = render(turns)
        except BadRow as bad:
            raise UserError(f"ollama: {bad.sentence}; it has no equivalent Go template; export --to gguf") from None
        if (got := found.render(turns)) != wanted:
            at = len(_shared_start([got, wanted]))
            raise UserError(
                f"ollama: the chat template does more than put text around turns (it writes "
                f"{wanted[at : at + 40]!r} where {got[at : at + 40]!r} was expected), which has no form in a "
                f"Modelfile; export --to gguf, which carries the template as it is"
            )
    return found


def _learn_turns(render: Render) -> TurnTemplate:
    roles = ["user", "assistant", "user", "assistant", "user"]
    first, answer, second, _, _, end = _around_contents(render, roles)
    try:
        outside, inside = _around_contents(render, ["system", "user"])[:2]
    except BadRow:
        outside = inside = None
    same = [first, second] + ([inside] if inside is not None else [])
    shared = _shared_end(same)
    after_answer = second.removesuffix(shared)
    # Where to cut between a question's end and the answer's header is free: at the end of a turn, where it is the same.
    after_question = after_answer if answer.startswith(after_answer) and end.startswith(after_answer) else ""
    system = None if outside is None or inside is None else (outside, inside.removesuffix(shared))
    spaced = render([Message("user", f" {MARKS[0]} ")])
    return TurnTemplate(
        start=first.removesuffix(shared),
        system=system,
        user=(shared, after_question),
        assistant=(answer.removeprefix(after_question), after_answer),
        header=end.removeprefix(after_question),
        trims=f" {MARKS[0]} " not in spaced,
    )


def _around_contents(render: Render, roles: Sequence[str]) -> list[str]:
    """What is printed before, between and after the contents of turns of these roles."""
    text = render([Message(role, MARKS[i]) for i, role in enumerate(roles)])
    parts = []
    for mark in MARKS[: len(roles)]:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise BadRow("refused by the chat template", "the chat template does not print each content once")
        parts.append(before)
    return [*parts, text]


def _shared_start(texts: Sequence[str]) -> str:
    count = next((i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), None)
    return texts[0][: min(map(len, texts)) if count is None else count]


def _shared_end(texts: Sequence[str]) -> str:
    return _shared_start([text[::-1] for text in texts])[::-1]


def random_conversations(count: int, template: TurnTemplate, seed: int) -> list[list[Message]]:
    """Conversations that end with a question: of 1 to 4 questions, half with a system turn where there may be one."""
    rng = random.Random(seed)
    return [_random_turns(rng, template) for _ in range(count)]


def _random_turns(rng: random.Random, template: TurnTemplate) -> list[Message]:
    turns = [Message("system", _random_text(rng))] if template.system and rng.random() < 0.5 else []
    for _ in range(rng.randrange(4)):
        turns += [Message("user", _random_text(rng)), Message("assistant", _random_text(rng))]
    return [*turns, Message("user", _random_text(rng))]


def _random_text(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6))).strip()


def go_template(template: TurnTemplate) -> str:
    """The text of a Modelfile's TEMPLATE: one line of actions, with literal text between them, nothing trimmed.

    A system message goes before the first question where the model's own template has no place for one: Go's language
    has no way to refuse it.
    """
    start, header = _go_literal(template.start), _go_literal(template.header)
    user, answer = (tuple(map(_go_literal, around)) for around in (template.user, template.assistant))
    if template.system is None:
        system, lead = (
            "",
            "{{ if and $.System (eq $i 1) (eq (index $.Messages 0).Role `system`) }}{{ $.System }}\n\n{{ end }}",
        )
        begin = start
        question = f"{user[0]}{lead}{{{{ .Content }}}}{user[1]}"
    else:
        before, after = map(_go_literal, template.system)
        system = f"{{{{ if eq .Role `system` }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}"
        begin = f"{{{{ if ne (index .Messages 0).Role `system` }}}}{start}{{{{ end }}}}" if start else ""
        question = f"{user[0]}{{{{ .Content }}}}{user[1]}"
    last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
    return (
        f"{begin}{{{{ range $i, $_ := .Messages }}}}{system}"
        f"{{{{ if eq .Role `user` }}}}{question}{last}{header}{{{{ end }}}}{{{{ end }}}}"
        f"{{{{ if eq .Role `assistant` }}}}{answer[0]}{{{{ .Content }}}}"
        f"{{{{ if ne (len (slice $.Messages $i)) 1 }}}}{answer[1]}{{{{ end }}}}{{{{ end }}}}"
        f"{{{{ end }}}}"
    )


def _go_literal(text: str) -> str:
    """Text as a template prints it; what the language or the Modelfile would read otherwise, as a quoted string."""
    plain = all(letter.isprintable() or letter == "\n" for letter in text) and "{{" not in text and '"""' not in text
    if plain or not text:
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '{{ "' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted) + '" }}'
