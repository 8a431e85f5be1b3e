"""A conversation with a model: what it is asked after earlier exchanges, and its answer as it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode_prompt
from mlxdpo.data.template import probe
from mlxdpo.inference.generate import Completion, generate, stepwise
from mlxdpo.inference.mixtures import run_at
from mlxdpo.inference.trained_run import ModelContext, TrainedRun
from mlxdpo.model.adapters import load_run, load_start
from mlxdpo.model.policy import Policy
from mlxdpo.runs import Run
from mlxdpo.types import Message, Text


def answer_prompts(
    run: Run, prompts: Sequence[Text], *, before: bool, strength: float, **sampling: Any
) -> list[tuple[str, Completion]]:
    """A run's answers, each as text and tokens; `sampling` is what `generate` takes beside its model and ends.

    Raises `UserError` for a run without adapter and for an empty prompt.
    """
    source = run_at(run, strength)
    policy = load_start(source) if before else load_run(source)
    return answers_of(policy, source.config().data, prompts, **sampling)


def answers_of(
    policy: Policy, data: DataConfig, prompts: Sequence[Text], **sampling: Any
) -> list[tuple[str, Completion]]:
    """A loaded model's answers to prompts that are written as the settings `data` say, each as text and tokens.

    Raises `UserError` for an empty prompt.
    """
    ids = [encode_prompt(prompt, policy.tokenizer, data).tolist() for prompt in prompts]
    answers = generate(policy.model, ids, eos_ids=policy.eos_ids, **sampling)
    return [(policy.tokenizer.decode(answer.tokens), answer) for answer in answers]


def talks_in_turns(trained: TrainedRun) -> bool:
    """Whether a run's rows were written as chat turns; else a conversation is one running text."""
    data = trained.config.data
    return data.template != "plain" and probe(trained.policy.tokenizer, data).chat


def asked_after(before: Sequence[tuple[str, str]], text: str, chat: bool, system: str = "") -> Text:
    """What the model is asked after the exchanges `before`: turns for a chat model, one running text otherwise."""
    if not chat:
        return "".join(asked + answer for asked, answer in before) + text
    turns = [turn for asked, answer in before for turn in (Message("user", asked), Message("assistant", answer))]
    opening = [Message("system", system)] if system.strip() else []
    if not before and not opening:
        return text
    return (*opening, *turns, Message("user", text))


def growing_text(
    enter: ModelContext,
    ids: Sequence[int],
    decode: Callable[[list[int]], str],
    eos_ids: frozenset[int] | set[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The pieces of an answer to the token ids, as they come; joined they are the answer.

    A piece ends at a whole character: of one whose bytes are several tokens nothing is given before the last.
    """
    tokens: list[int] = []
    said = ""
    steps = stepwise(
        enter, ids, max_tokens=max_tokens, eos_ids=eos_ids, temperature=temperature, top_p=top_p, seed=seed
    )
    for token in steps:
        if token is None:
            continue
        tokens.append(token)
        text = decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")
        if len(text) > len(said):
            yield text[len(said) :]
            said = text
    if tokens and (rest := decode(tokens)[len(said) :]):
        yield rest
