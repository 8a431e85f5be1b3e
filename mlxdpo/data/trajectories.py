"""Rows that judge several turns of a conversation: pairs of trajectories, alternatives at each step, labelled steps.

What is compared is log-probs of assistant turns alone, summed; what tools and users say is given (`Row.credit`):

    trajectory  all turns from the one on where two conversations part: ETO (arXiv 2403.02502), where the
                log-prob of a trajectory is the sum over its actions; the turns that both have would cancel
    turn        the turn where they part and no other, given all turns before it: Step-DPO (arXiv 2406.18629 eq. 2)

Unset, what a row gives is judged: whole conversations as such, an alternative to one turn against that turn, a label
of a turn for that turn. DMPO (arXiv 2406.14868), which discounts turns by their place, is something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxdpo.data import fields, reasons
from mlxdpo.data.fields import Row, as_turns, prompt_of_row, prompt_turns
from mlxdpo.data.report import BadRow
from mlxdpo.types import Message, Preference, UnpairedExample

Turns = tuple[Message, ...]
Judged = Sequence[Preference | UnpairedExample | BadRow]
"""What a row gives; `BadRow` for a part of it that states nothing."""


def pair_of_conversations(row: Row, chosen: Turns, rejected: Turns) -> Preference:
    """Two whole conversations that part at some turn, as a pair in which the turns behind that are judged."""
    if chosen == rejected:
        raise BadRow(reasons.IDENTICAL, '"chosen" and "rejected" are the same')
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    both = {"chosen": chosen, "rejected": rejected}
    if row.credit == "turn":
        both = {name: turns[: shared + 1] for name, turns in both.items()}
    for name, turns in both.items():
        _check_judged(turns, shared, name, row.credit)
    first = min(_first_assistant(chosen), shared)
    prompt = prompt_turns(chosen[:first])
    chosen, rejected = (turns[first:] for turns in both.values())
    return Preference(prompt, chosen, rejected, row.where, context=shared - first)


def _first_assistant(turns: Turns) -> int:
    return next((i for i, turn in enumerate(turns) if turn.role == "assistant"), len(turns))


def _check_judged(turns: Turns, shared: int, name: str, credit: str | None) -> None:
    """Raise `BadRow` where the turns from `shared` on, at which two conversations part, say nothing about a model."""
    here = f'"chosen" and "rejected" part at turn {shared + 1}'
    if len(turns) <= shared:
        raise BadRow(reasons.DIVERGED, f'{here}, where "{name}" is over; expected an assistant turn in both')
    role = turns[shared].role
    if role in ("user", "system", "developer") or (credit == "turn" and role != "assistant"):
        raise BadRow(reasons.DIVERGED, f"{here}, which is a {role} turn; expected them to part at an assistant turn")
    _check_said(turns[shared:], name)


def _check_said(turns: Turns, name: str) -> None:
    judged = [turn for turn in turns if turn.role == "assistant"]
    if not judged:
        raise BadRow(reasons.NOT_ONE_ANSWER, f'"{name}" has no assistant turn that could be judged; expected one')
    if not all(turn.content.strip() or turn.extra.get("tool_calls") for turn in judged):
        raise BadRow(reasons.EMPTY_COMPLETION, f'an assistant turn of "{name}" is empty; expected what is to be judged')


def pair_of_answers(row: Row, prompt: Turns, better: str, worse: str) -> Preference | None:
    """The columns of two answers where either has several turns behind the prompt; else None."""
    if not all(fields.is_messages(row.values[name]) for name in (better, worse)):
        return None
    chosen, rejected = (_after_prompt(fields.messages(row.values, name), prompt) for name in (better, worse))
    if len(chosen) == len(rejected) == 1:
        return None
    return pair_of_conversations(row, prompt + chosen, prompt + rejected)


def judged_answer(row: Row, prompt: Turns, desirable: bool, name: str) -> UnpairedExample | None:
    """The column of an answer where it has several turns behind the prompt; else None."""
    if not fields.is_messages(row.values[name]):
        return None
    turns = _after_prompt(fields.messages(row.values, name), prompt)
    if len(turns) == 1:
        return None
    if row.credit == "turn":
        raise BadRow(
            reasons.NOT_ONE_ANSWER,
            "one label judges several turns, so data.credit turn has nothing to go by; leave it unset, or give a "
            'label for each turn: columns "messages" and "labels"',
        )
    _check_said(turns, name)
    whole = prompt + turns
    first = min(_first_assistant(whole), len(prompt))
    return UnpairedExample(
        prompt_turns(whole[:first]), whole[first:], desirable, row.where, context=len(prompt) - first
    )


def _after_prompt(turns: Turns, prompt: Turns) -> Turns:
    return turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns


def tree_node(row: Row) -> Judged:
    """UltraInteract: the turns so far, and two texts that could come next. Rows of one conversation share its turns."""
    before = fields.messages(row.values, "trajectory")
    both = []
    for name in ("chosen", "rejected"):
        text = fields.checked_text(row.values, name)
        if not text.strip():
            raise BadRow(reasons.EMPTY_COMPLETION, f'"{name}" is empty; expected a completion')
        both.append((*before, Message("assistant", text)))
    return [pair_of_conversations(row, *both)]


def judged_steps(row: Row) -> Judged:
    """A prompt, and step by step the turn that was taken and what else might have been.

    A step is a message, or an object with `chosen` and perhaps `rejected`. `rejected` is one alternative or a list of
    them: text, a message, or a list of turns that plays the conversation on. `chosen` may bring the turns that
    answer it, a tool's for example.
    """
    taken: list[Message] = list(as_turns(prompt_of_row(row.values, "prompt")))
    branches: list[tuple[int, Turns]] = []
    for number, step in enumerate(row.values["steps"], 1):
        place = f"step {number}"
        if "chosen" in step:
            branches += [(len(taken), branch) for branch in _alternatives(step.get("rejected"), place)]
            taken += _branch(step["chosen"], f"{place} chosen")
        else:
            taken += fields.messages({place: [step]}, place)
    if not branches:
        raise BadRow(reasons.NOT_ONE_ANSWER, 'no step has "rejected"; expected at least one alternative')
    used = len(taken) if any(len(branch) > 1 for _, branch in branches) else max(at for at, _ in branches) + 1
    unused = [BadRow(reasons.UNJUDGED, "no alternative is compared with what follows")] if used < len(taken) else []
    return [*_compared(row, tuple(taken), branches), *unused]


def _compared(row: Row, taken: Turns, branches: Sequence[tuple[int, Turns]]) -> Iterator[Preference | BadRow]:
    """A pair for each branch. One of a single turn is compared with the turn that was taken, a longer one with all of
    the conversation that follows."""
    for at, branch in branches:
        whole = taken if len(branch) > 1 else taken[: at + 1]
        try:
            yield pair_of_conversations(row, whole, taken[:at] + branch)
        except BadRow as bad:
            if bad.reason not in reasons.NO_PREFERENCE:
                raise
            yield bad


def _alternatives(value: Any, place: str) -> list[Turns]:
    if value is None:
        return []
    several = value if isinstance(value, list) else [value]
    if any(isinstance(one, Mapping) and _role(one) != "assistant" for one in several):
        raise BadRow(
            reasons.WRONG_TYPE,
            f'"rejected" of {place} lists turns that are not the assistant\'s; expected alternatives, one of several '
            "turns as a nested list",
        )
    return [_branch(one, f"{place} rejected") for one in several]


def _role(turn: Mapping[str, Any]) -> Any:
    role = turn.get("role", turn.get("from"))
    return fields.ROLES.get(role.lower()) if isinstance(role, str) else None


def _branch(value: Any, place: str) -> Turns:
    """Text, a message or a list of turns, the first of which is the assistant's."""
    if isinstance(value, str):
        return (Message("assistant", fields.checked_text({place: value}, place)),)
    turns = fields.messages({place: [value] if isinstance(value, Mapping) else value}, place)
    if turns[0].role != "assistant":
        raise BadRow(reasons.WRONG_TYPE, f'"{place}" begins with a {turns[0].role} turn; expected an assistant turn')
    return turns


def labelled_steps(row: Row) -> Judged:
    """A conversation and, for each of its assistant turns, whether it is good. As a whole it is good where all of its
    turns are (arXiv 2305.20050 section 2.6: a solution is correct where every step is)."""
    labels = [fields.flag({"labels": value}, "labels") for value in row.values["labels"]]
    return _judged_turns(row, [1.0 if label else -1.0 for label in labels], "labels", 1.0 if all(labels) else -1.0)


def rewarded_steps(row: Row) -> Judged:
    """A conversation and a reward for each of its assistant turns, good above 0 and bad below; as a whole, their sum.
    A reward of 0 says nothing."""
    rewards = [fields.checked_number({"rewards": value}, "rewards") for value in row.values["rewards"]]
    return _judged_turns(row, rewards, "rewards", sum(rewards))


def _judged_turns(row: Row, rewards: Sequence[float], name: str, whole: float) -> Judged:
    turns = fields.messages(row.values, "messages")
    first = _first_assistant(turns)
    prompt, places = prompt_turns(turns[:first]), [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if len(places) != len(rewards):
        raise BadRow(
            reasons.WRONG_TYPE,
            f'"messages" has {len(places)} assistant turns and "{name}" {len(rewards)} values; expected one for each',
        )
    _check_said(turns[first:], "messages")
    if row.credit == "trajectory":
        judged = [(places[-1], whole, 0)]
    else:
        judged = [(place, reward, place - first) for place, reward in zip(places, rewards, strict=True)]
    return [
        UnpairedExample(prompt, turns[first : place + 1], reward > 0, row.where, context=context)
        if reward
        else BadRow(
            reasons.TIED, f'turn {place + 1} has the reward 0, neither good nor bad; 0 and 1 belong in "labels"'
        )
        for place, reward, context in judged
    ]
