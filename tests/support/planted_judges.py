"""Judges whose truth is known, and answers for them: what an honest harness must say about each."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from mlxdpo_eval.judges import Question, Verdict
from mlxdpo_eval.judges.protocol import certain, invalid
from mlxdpo_eval.sampling import Answers


@dataclass
class Planted:
    """A judge made of a function of the question; counts what it was asked."""

    verdict: Callable[[Question], Verdict]
    name: str = "planted"
    cached: bool = False
    asked: list[Question] = field(default_factory=list)

    @property
    def identity(self):
        return {"kind": "planted", "name": self.name}

    def ask(self, questions):
        self.asked += questions
        return [self.verdict(question) for question in questions]


def answers(texts: list[str], samples: int = 1) -> Answers:
    """Answers to prompts p0, p1, ...: `samples` to each."""
    names = [f"p{i // samples}" for i in range(len(texts))]
    tokens = [[ord(c) for c in text] for text in texts]
    return Answers(names, names, [[1]] * len(texts), list(texts), tokens, [True] * len(texts))


def good_and_bad(count: int) -> tuple[Answers, Answers]:
    """(before, after): after's answers are the good ones; lengths say nothing."""
    draw = random.Random(0)
    lengths = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(count)]
    bad = [f"bad {i}" + "." * a for i, (a, _) in enumerate(lengths)]
    good = [f"good {i}" + "." * b for i, (_, b) in enumerate(lengths)]
    return answers(bad), answers(good)


def always_first(question):
    """Knows the place only."""
    return Verdict(2.0)


def oracle(question):
    """Knows the truth."""
    return certain(question.first.startswith("good") - question.second.startswith("good"))


def coin(question):
    """Knows nothing; each order is a new throw."""
    return certain(random.Random(repr(question)).choice([-1, 1]))


def longest_wins(question):
    """Knows the length only."""
    return certain(len(question.first) - len(question.second))


def mumbles(question):
    """The oracle, but one prompt in five gets no usable answer."""
    return invalid("the answer is not a label") if int(question.prompt[1:]) % 5 == 0 else oracle(question)
