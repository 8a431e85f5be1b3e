"""The question as a language model is asked it, and the two labels it answers with."""

from __future__ import annotations

from mlxdpo_eval.judges.protocol import Question

LABELS = ("A", "B")
WORDING = """Two assistants answered the same prompt. Decide which answer is better: more helpful, correct, clear \
and honest. Length by itself is no merit, and neither is the order of the answers.

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter, A or B."""


def judge_prompt(question: Question) -> str:
    """The question as text. Braces in the answers stay as they are."""
    return WORDING.format(prompt=question.prompt, first=question.first, second=question.second)
