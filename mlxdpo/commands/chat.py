"""`mlxdpo chat RUN`: talk to a run's model in the terminal, before tuning, after it, or both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from mlxdpo.commands.generate import Count, Strength, Temperature, TopP
from mlxdpo.runs import Run

SIDES = {"/before": ("before",), "/after": ("after",), "/both": ("before", "after")}
HELP = "/before, /after, /both: who answers; /new: forget the conversation; /quit: end"


def run(
    path: Path,
    /,
    *,
    strength: Strength = 1.0,
    max_tokens: Count = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 1.0,
    seed: int = 0,
) -> int:
    """Chat with a run's model. Type /before, /after or /both to choose who answers, /new to start again, /quit to end.

    Ctrl-C stops an answer. When both answer, the conversation continues from the tuned model's answer.

    Args:
        path: Run directory.
        strength: How much of the tuning: 1 as trained, 2 twice as far.
        max_tokens: Maximum answer length, tokens.
        temperature: 0 is greedy; 1 samples from the model's distribution.
        top_p: Sample from the most likely tokens that sum to this probability.
        seed: Sampling seed; both models use the same noise.
    """
    from mlxdpo.inference.conversation import asked_after, growing_text, talks_in_turns
    from mlxdpo.inference.mixtures import run_at
    from mlxdpo.inference.trained_run import open_trained_run

    trained = open_trained_run(run_at(Run.open(path), strength))
    policy, chat = trained.policy, talks_in_turns(trained)
    policy.model.eval()  # dropout on the adapters would make another model of it
    sampling = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}

    def answer(side: str, before: list[tuple[str, str]], text: str) -> Any:
        """The pieces of an answer."""
        from mlxdpo.data.encode import encode_prompt

        enter = trained.start if side == "before" else partial(nullcontext, policy.model)
        ids = encode_prompt(asked_after(before, text, chat), policy.tokenizer, trained.config.data).tolist()
        return growing_text(enter, ids, policy.tokenizer.decode, policy.eos_ids, **sampling)

    print(f"{path}: the tuned model answers. {HELP}")
    talk(answer, prompt="> " if sys.stdin.isatty() else "")
    return 0


def talk(answer: Callable[[str, list[tuple[str, str]], str], Any], prompt: str) -> None:
    """Read lines and print answers until /quit or the end of the input.

    `answer(side, exchanges so far, text)` gives the pieces of an answer of "before" or "after".
    """
    sides, exchanges = SIDES["/after"], list[tuple[str, str]]()
    while True:
        try:
            text = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text in SIDES:
            sides = SIDES[text]
            print(f"{' and '.join(sides)} tuning")
        elif text == "/new":
            exchanges.clear()
            print("a new conversation")
        elif text.startswith("/"):
            print(HELP)
        elif text:
            said = [_print_answer(side, answer(side, exchanges, text), len(sides) > 1) for side in sides]
            exchanges.append((text, said[-1]))


def _print_answer(side: str, pieces: Any, named: bool) -> str:
    """Print the pieces as they come; what was said up to Ctrl-C, or in full."""
    said: list[str] = []
    print(f"{side}: " if named else "", end="", flush=True)
    try:
        for piece in pieces:
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" (stopped)", end="")
    print()
    return "".join(said)
