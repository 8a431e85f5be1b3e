"""What a judge is: questions in, verdicts out. A verdict is a probability, or invalid with a reason, or absent.

A language model is asked in one wording, `judge_prompt`, and answers with one of two labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from scipy import special

CERTAIN = 10.0  # logits of a judge that only says which: a probability of 0.99995

LABELS = ("A", "B")
COMPARISON = """Two assistants answered the same prompt. Decide which answer is better: more helpful, correct, clear \
and honest. Length by itself is no merit, and neither is the order of the answers.

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? """
ONE_LETTER = "Reply with one letter, A or B."
WORDING = COMPARISON + ONE_LETTER


class Question(NamedTuple):
    """Which answer to the prompt is better? The order of the answers is part of the question."""

    prompt: str
    first: str
    second: str


TEST_QUESTION = Question(
    "How many legs does a cat have?", "A cat has four legs.", "A cat has nine legs, as every animal does."
)  # asked once before anything is sampled: does the judge answer at all?


def judge_prompt(question: Question, ending: str = ONE_LETTER) -> str:
    """The question as text, with how to reply at its end. Braces in the answers stay as they are."""
    return COMPARISON.format(prompt=question.prompt, first=question.first, second=question.second) + ending


class Verdict(NamedTuple):
    """`logit` of the probability that the first answer is better; None when there is none, for the reason given.

    `absent` says that nobody was asked (a pair without a human vote): that is no failure of the judge. `note` is what
    the judge gave as its reasons.
    """

    logit: float | None
    reason: str = ""
    absent: bool = False
    note: str = ""

    @property
    def probability(self) -> float | None:
        """That the first answer is better."""
        return None if self.logit is None else float(special.expit(self.logit))


def certain(sign: float) -> Verdict:
    """The verdict of a judge that knows no degrees: the first is better (above 0), worse (below 0), or neither."""
    return Verdict(CERTAIN * ((sign > 0) - (sign < 0)))


def invalid(reason: str) -> Verdict:
    """No verdict: neither a tie nor a loss."""
    return Verdict(None, reason)


class Judge(Protocol):
    """`identity` holds everything that can change a verdict (model digest, wording, ...): the cache is keyed by it.

    `cached` says whether verdicts are worth keeping on disk.
    """

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that can change a verdict."""
        ...

    @property
    def cached(self) -> bool:
        """Whether verdicts are kept."""
        ...

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, in order."""
        ...


@runtime_checkable
class Scalar(Protocol):
    """A judge that scores each answer by itself: a programmed reward, a reward model. Only differences matter."""

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """One number per answer, higher is better."""
        ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A judge that keeps what it asked on disk itself: scores of single answers, verdicts of the members of a panel."""

    def fresh(self) -> Judge:
        """The same judge, asking everything again and keeping nothing."""
        ...


@runtime_checkable
class Metered(Protocol):
    """A judge that is paid for or waited for: it counts what it used."""

    def spent(self) -> Mapping[str, Any]:
        """How it is asked, requests and tokens so far."""
        ...
