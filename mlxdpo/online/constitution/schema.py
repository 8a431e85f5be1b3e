"""What a constitution is: principles, each with what to look for in an answer, how to rewrite it, how to compare two.

And how a model is asked to apply it (`SamplingSettings`), in which words: arXiv 2212.08073, section 3.1 (critique and
revision) and 4.1 (comparison). There they are one text with `Critique Request:` marks, for a model without a chat
template; here each request is a user's turn, as a model that was tuned to follow instructions expects it.

A constitution is a YAML file; `default.yaml` beside this
file is the one that is used when none is named.
"""

from __future__ import annotations

import difflib
import hashlib
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, model_validator

from mlxdpo.config import Section
from mlxdpo.data.fields import as_turns
from mlxdpo.io.yaml_file import read_recipe, yaml_text
from mlxdpo.types import Message, Text, UserError

CRITIQUE = 160  # tokens
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, strict=True)]


class Principle(Section):
    """One rule of conduct, in the three forms in which a model meets it."""

    name: Words
    """A short name: it stands in the rows."""
    critique: Words
    """Asks what is wrong with the last answer."""
    revision: Words
    """Asks for the answer again, without what was wrong."""
    comparison: Words
    """Asks which of two answers, A or B, is better."""


class Worked(Section):
    """A worked example that every conversation begins with (few-shot): what critique and revision should look like."""

    prompt: Words
    """What a user says."""
    answer: Words
    """An answer with a fault."""
    critique_request: Words
    """As a principle asks it."""
    critique: Words
    """What is wrong with the answer."""
    revision_request: Words
    """As a principle asks it."""
    revision: Words
    """The answer as it should be."""


class Constitution(Section):
    """Principles, and worked examples of their use."""

    principles: list[Principle] = Field(min_length=1)
    """At least one; each prompt draws one for its critique, and every one compares."""
    examples: list[Worked] = Field(default_factory=list)
    """Shown before every critique and revision; none is allowed."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Constitution:
        names = [principle.name for principle in self.principles]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two principles are called {twice[0]!r}; rename one")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of everything in it, hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class SamplingSettings(Section):
    """How a model is asked to answer, criticise, revise and compare."""

    pairs: Literal["revisions", "samples"] = "revisions"
    """revisions: the model criticises and rewrites its answer, chosen is the revision; samples: two answers are drawn,
    and the principles say how probably each is the better one."""
    labels: Literal["soft", "none"] = "soft"
    """soft: each principle compares the two answers of a pair; none: revisions are taken as better, unseen."""
    max_tokens: int = Field(default=256, ge=1)
    """Longest answer and longest revision, in tokens."""
    critique_tokens: int = Field(default=CRITIQUE, ge=1)
    """Longest critique, in tokens; a longer one is cut, which is counted."""
    temperature: float = Field(default=1.0, ge=0)
    """Of sampling; 1 is the model itself, 0 takes the likeliest token (not with samples)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that sum to this probability."""
    seed: int = Field(default=0, ge=0)
    """Of the principle drawn for each prompt and the noise of sampling: the same seed gives the same rows."""
    batch_size: int = Field(default=32, ge=1)
    """Answers sampled at once."""
    unfinished: Literal["drop", "keep"] = "drop"
    """Answers and revisions cut off at max_tokens: drop or keep their pairs."""

    @model_validator(mode="after")
    def _samples_differ_and_are_judged(self) -> SamplingSettings:
        if self.pairs == "samples" and self.labels == "none":
            raise ValueError("labels none leaves two samples unjudged; use labels soft")
        if self.pairs == "samples" and self.temperature == 0:
            raise ValueError("temperature 0 gives the same sample twice; raise it, or use pairs revisions")
        if self.pairs == "samples" and self.critique_tokens != CRITIQUE:
            raise ValueError(f"critique_tokens {self.critique_tokens} has no effect with pairs samples; drop it")
        return self


def load_constitution(file: Path | None = None) -> Constitution:
    """Read a constitution, default: the bundled one.

    Raises `UserError` naming the file and the key for anything that does not fit.
    """
    if file is not None:
        return _read_constitution(file)
    with as_file(files("mlxdpo.online.constitution").joinpath("default.yaml")) as own:
        return _read_constitution(own)


def _read_constitution(file: Path) -> Constitution:
    if not file.is_file():
        raise UserError(f"{file}: no such constitution; give a YAML file with `principles`, or drop --constitution")
    try:
        return Constitution.model_validate(dict(read_recipe(file)))
    except ValidationError as error:
        raise UserError(_explained(error, str(file))) from None


def dump_constitution(constitution: Constitution) -> str:
    """As YAML; `load_constitution` reads it back to an equal one."""
    return yaml_text(constitution.model_dump(mode="json"), width=100)


def _explained(error: ValidationError, source: str) -> str:
    """The first thing wrong in one sentence; places in lists are counted from 1."""
    # A key that is spelled wrong is missing too, and its spelling is the better news.
    first = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    loc = first["loc"]
    where = ".".join(f"{part + 1}" if isinstance(part, int) else str(part) for part in loc)
    if first["type"] == "extra_forbidden":
        known = _known_keys(loc)
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown key `{where}`; {hint}"
    if first["type"] == "missing":
        return f"{source}: `{where}` is missing; a constitution needs it"
    said = str(first["msg"]).removeprefix("Value error, ")
    return f"{source}: `{where}` is {repr(first['input'])[:60]}: {said}" if where else f"{source}: {said}"


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    section = {"principles": Principle, "examples": Worked}.get(str(loc[0]), Constitution)
    return list((Constitution if len(loc) == 1 else section).model_fields)


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
