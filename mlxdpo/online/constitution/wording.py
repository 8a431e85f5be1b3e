"""The conversations: a model's own answer, the request to criticise it, the request to revise it; and the comparison.

Source: arXiv 2212.08073, section 3.1 (critique and revision) and 4.1 (comparison). There they are one text with
`Critique Request:` marks, for a model without a chat template; here each request is a user's turn, as a model that was
tuned to follow instructions expects it.
"""

from __future__ import annotations

from mlxdpo.data.messages import as_turns
from mlxdpo.online.constitution.schema import Constitution, Principle
from mlxdpo.types import Message, Text

LETTERS = ("A", "B")
COMPARED = """Here is a conversation, and two answers to its last message.

{talk}

[Answer A]
{first}

[Answer B]
{second}

{question} The order of the answers means nothing. Reply with one letter, A or B."""


def answer_turns(prompt: Text) -> tuple[Message, ...]:
    """The prompt alone: the first answer is the model's own, no example stands before it."""
    return as_turns(prompt)


def critique_turns(rules: Constitution, principle: Principle, prompt: Text, answer: str) -> tuple[Message, ...]:
    """Worked examples, the prompt, the answer, the request for a critique. A system turn stays in front."""
    turns = as_turns(prompt)
    head = tuple(turn for turn in turns[:1] if turn.role == "system")
    asked = (Message("assistant", answer), Message("user", principle.critique))
    return (*head, *_worked(rules), *turns[len(head) :], *asked)


def revision_turns(
    rules: Constitution, principle: Principle, prompt: Text, answer: str, critique: str
) -> tuple[Message, ...]:
    """The same with the critique and the request for a revision."""
    asked = (Message("assistant", critique), Message("user", principle.revision))
    return (*critique_turns(rules, principle, prompt, answer), *asked)


def comparison_turns(principle: Principle, prompt: Text, first: str, second: str) -> tuple[Message, ...]:
    """One user's turn that shows both answers. The question stands last: what comes before it is the same for every
    principle, and is computed once."""
    talk = "\n\n".join(f"[{turn.role.capitalize()}]\n{turn.content}" for turn in as_turns(prompt))
    text = COMPARED.format(talk=talk, first=first, second=second, question=principle.comparison)
    return (Message("user", text),)


def _worked(rules: Constitution) -> tuple[Message, ...]:
    turns: list[Message] = []
    for one in rules.examples:
        for asked, said in (
            (one.prompt, one.answer),
            (one.critique_request, one.critique),
            (one.revision_request, one.revision),
        ):
            turns += [Message("user", asked), Message("assistant", said)]
    return tuple(turns)
