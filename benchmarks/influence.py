"""How often `mlxdpo influence` finds the pair that taught a fact: a hundred facts, each planted in one pair.

    python -m benchmarks.influence --model smollm2
    python -m benchmarks.influence --model tiny --layers -1 --lr 3e-3 --epochs 4

A model is tuned on 100 pairs of invented facts, ten kinds of question with ten facts each, among 60 pairs about
Python's standard library. For each fact it is asked in other words, and about the name in an answer of other words: the
other nine pairs of its kind differ from the planted one in names alone. Reported: in how many of the hundred the
planted pair is first, and among the three of largest influence. `tiny` is a llama of four layers and random weights
that has read nothing but these pairs. Run again it resumes. Writes .bench/influence.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.audit import relevance
from benchmarks.rates import write_small_llama
from mlxdpo.config import load_config
from mlxdpo.inference.influence import answer_gradient, answer_part, influences, pair_gradients, training_pairs
from mlxdpo.inference.trained_run import TrainedRun, encode_pairs, open_trained_run
from mlxdpo.io.atomic import append_line, write_text
from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run
from mlxdpo.training.run import train

OUT = Path(".bench/influence.jsonl")
VOCABULARY = 600  # of `tiny`: pieces of words, so that an invented name is several tokens
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


def tuned(folder: Path, planted: Sequence[Fact], options: argparse.Namespace) -> TrainedRun:
    """A run on the planted pairs and others, in one file in a random order; one that is there is kept or resumed."""
    rows = [{"prompt": f.prompt, "chosen": f.chosen, "rejected": f.rejected} for f in planted]
    rows += [
        {"prompt": r.prompt, "chosen": f" {r.chosen}", "rejected": f" {r.rejected}"} for r in relevance(options.among)
    ]
    random.Random(options.seed).shuffle(rows)
    if (model := options.model) == "tiny":
        model = str(folder / "tiny")
        if not (folder / "tiny" / "model.safetensors").exists():
            texts = [f"{row['prompt']}{row[side]}" for row in rows for side in ("chosen", "rejected")]
            write_small_llama(folder / "tiny", [*texts, *(f.question + f.answer for f in planted)], VOCABULARY)
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    parts = {
        "model": {"path": model},
        "data": {"path": str(folder / "pairs.jsonl"), "eval_fraction": 0.0, "template": "plain"},
        "lora": {"rank": 8, "layers": options.layers},
        "optim": {"lr": options.lr},
        "train": {
            "epochs": options.epochs, "batch_size": 8, "gradient_accumulation": 1, "eval_every": 0, "sample_every": 0,
            "seed": options.seed,
        },
        "out": str(folder / "run"),
    }  # fmt: skip
    begun = (folder / "run" / "manifest.json").exists()
    if not (folder / "run" / "adapter").exists():
        resume = Run.open(folder / "run") if begun else None
        for event in train(load_config(None, parts), resume=resume):
            if event.kind == "step":
                print("step", event.step, round(event.values["loss"], 4), flush=True)
    return open_trained_run(Run.open(folder / "run"))


def ranks(trained: TrainedRun, planted: Sequence[Fact], file: Path) -> list[int]:
    """For each fact how many pairs have a larger influence on its name than the planted one; a line of `file` each."""
    rows, examples, _ = encode_pairs(trained, training_pairs(trained))
    steps, start = pair_gradients(trained, examples), time.monotonic()
    while True:
        try:
            print("pairs", next(steps), "of", len(rows), round(time.monotonic() - start), "s", flush=True)
        except StopIteration as end:
            gradients: np.ndarray = end.value
            break
    place = {row.prompt: i for i, row in enumerate(rows)}
    known = {line["prompt"]: line["above"] for line in read_lines(file)} if file.exists() else {}
    for number, fact in enumerate(planted):
        if fact.prompt in known:
            continue
        asked = answer_part(trained, fact.question, fact.answer, fact.name)
        values = influences(gradients, answer_gradient(trained, asked))
        known[fact.prompt] = int((values > values[place[fact.prompt]]).sum())
        append_line(file, {"prompt": fact.prompt, "above": known[fact.prompt]})
        if number % 10 == 9:
            print("answers", number + 1, "of", len(planted), round(time.monotonic() - start), "s", flush=True)
    return [known[fact.prompt] for fact in planted]


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune, ask about every fact, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--among", type=int, default=60)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".bench/influence"))
    options = parser.parse_args(arguments)
    planted = facts(options.facts, options.seed)
    settings = [Path(options.model).name, options.facts, options.among, options.epochs, options.layers, options.lr]
    folder = options.folder / "-".join(map(str, [*settings, options.seed]))
    trained = tuned(folder, planted, options)
    found = np.array(ranks(trained, planted, folder / "ranks.jsonl"))
    row = {
        "model": options.model, "facts": len(planted), "pairs": len(planted) + options.among, "seed": options.seed,
        "epochs": options.epochs, "layers": options.layers, "lr": options.lr, "first": int((found < 1).sum()),
        "top_3": int((found < 3).sum()), "worst": int(found.max()) + 1,
    }  # fmt: skip
    append_line(OUT, row)
    print(row, flush=True)


if __name__ == "__main__":
    main()
