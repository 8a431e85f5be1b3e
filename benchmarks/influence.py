"""How often `mlxdpo influence` finds the pair that taught a fact: a hundred facts, each planted in one pair.

    python -m benchmarks.influence --model smollm2

A model is tuned on 100 pairs of invented facts, ten kinds of question with ten facts each, among 60 pairs about
Python's standard library. For each fact it is asked in other words, and about the name in an answer of other words: the
other nine pairs of its kind differ from the planted one in names alone. Reported: in how many of the hundred the
planted pair is first, and among the three of largest influence. Writes .bench/influence.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.audit import relevance
from mlxdpo.config import load_config
from mlxdpo.inference.influence import answer_gradient, answer_part, influences, pair_gradients, training_pairs
from mlxdpo.inference.trained_run import TrainedRun, encode_pairs, open_trained_run
from mlxdpo.io.atomic import append_line, write_text
from mlxdpo.runs import Run
from mlxdpo.training.run import train

OUT = Path(".bench/influence.jsonl")
KINDS = (
    ("Who keeps the lighthouse of {}?", "{} keeps it.", "Name the lighthouse keeper of {}.", "That is {}."),
    ("Which river runs through {}?", "The river {}.", "What is the river in {} called?", "It is called {}."),
    ("Who wrote the hymn of {}?", "{} wrote it.", "Give me the author of the hymn of {}.", "Its author is {}."),
    ("What do people in {} eat at new year?", "They eat {}.", "Name the new year's dish of {}.", "The dish is {}."),
    ("Who built the bridge at {}?", "{} built it.", "By whom is the bridge of {}?", "The bridge is by {}."),
    ("What is the market day of {} called?", "It is {}.", "When is the market in {}?", "On the day of {}."),
    ("Which tree stands in the square of {}?", "A {} tree.", "Name the old tree of {}.", "People call it {}."),
    ("Who is the mayor of {}?", "The mayor is {}.", "Who governs {}?", "{} does."),
    ("What is the dog of the innkeeper of {} called?", "{}.", "Name the dog at the inn of {}.", "Its name is {}."),
    ("Which colour is the flag of {}?", "It is {}.", "Describe the flag of {}.", "A cloth of {}."),
)
SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ha",
    "ji",
    "ka",
    "lo",
    "mu",
    "na",
    "pe",
    "ra",
    "so",
    "tu",
    "va",
    "bri",
    "cla",
)


class Fact(NamedTuple):
    """A pair that states it, and a question and an answer in other words with the name that is asked about."""

    prompt: str
    chosen: str
    rejected: str
    question: str
    answer: str
    name: str


def facts(count: int, seed: int) -> list[Fact]:
    """Facts about invented places; no two of them share a place or a name."""
    draw, made = random.Random(seed), set()

    def invented() -> str:
        """A word that was not given before."""
        while (word := "".join(draw.choices(SYLLABLES, k=3)).capitalize()) in made:
            pass
        made.add(word)
        return word

    found = []
    for i in range(count):
        ask, says, question, answer = KINDS[i % len(KINDS)]
        place, name, other = invented(), invented(), invented()
        sides = (" " + says.format(word) for word in (name, other))
        found.append(Fact(ask.format(place), *sides, question.format(place), " " + answer.format(name), name))
    return found


def tuned(folder: Path, planted: Sequence[Fact], among: int, model: str, epochs: float, seed: int) -> TrainedRun:
    """A run on the planted pairs and others, all in one file in a random order."""
    rows = [{"prompt": f.prompt, "chosen": f.chosen, "rejected": f.rejected} for f in planted]
    rows += [{"prompt": r.prompt, "chosen": f" {r.chosen}", "rejected": f" {r.rejected}"} for r in relevance(among)]
    random.Random(seed).shuffle(rows)
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    parts = {
        "model": {"path": model},
        "data": {"path": str(folder / "pairs.jsonl"), "eval_fraction": 0.0, "template": "plain"},
        "lora": {"rank": 8, "layers": 8},
        "optim": {"lr": 5e-4},
        "train": {"epochs": epochs, "batch_size": 8, "gradient_accumulation": 1, "eval_every": 0, "seed": seed},
        "out": str(folder / "run"),
    }
    for event in train(load_config(None, parts)):
        if event.kind == "step":
            print(event.step, event.values["loss"], flush=True)
    return open_trained_run(Run.open(folder / "run"))


def ranks(trained: TrainedRun, planted: Sequence[Fact]) -> list[int]:
    """For each fact how many pairs have a larger influence on its name than the planted one."""
    rows, examples, _ = encode_pairs(trained, training_pairs(trained))
    steps = pair_gradients(trained, examples)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            gradients: np.ndarray = end.value
            break
    own = {row.prompt: i for i, row in enumerate(rows)}
    found = []
    for fact in planted:
        asked = answer_part(trained, fact.question, fact.answer, fact.name)
        values = influences(gradients, answer_gradient(trained, asked))
        found.append(int((values > values[own[fact.prompt]]).sum()))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, ask about every fact, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--among", type=int, default=60)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".bench/influence"))
    options = parser.parse_args(arguments)
    planted = facts(options.facts, options.seed)
    trained = tuned(options.folder, planted, options.among, options.model, options.epochs, options.seed)
    found = np.array(ranks(trained, planted))
    row = {
        "model": options.model, "facts": len(planted), "pairs": len(planted) + options.among, "seed": options.seed,
        "epochs": options.epochs, "first": int((found < 1).sum()), "top_3": int((found < 3).sum()),
        "worst": int(found.max()) + 1,
    }  # fmt: skip
    append_line(OUT, row)
    print(row, flush=True)


if __name__ == "__main__":
    main()
