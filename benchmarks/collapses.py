"""How soon is a run that gets worse named, and how often is one that does not? Planted collapses and healthy runs.

    python -m benchmarks.collapses --out runs/collapses
    python -m benchmarks.collapses --out runs/collapses --model smollm2 --tasks tone --seeds 1
    python -m benchmarks.collapses --out runs/collapses --page docs/evidence/collapses.md

A cell is a run of `mlxdpo train`'s own code on 140 short pairs of a planted task, a tenth of the labels wrong, at the
rate that `auto` finds. Planted are a rate a hundred times higher, chosen answers that repeat their first words, and
labels drawn by coin. What each step and look saw goes to OUT/cells.jsonl, a line for each cell; stopped at any time,
the same command goes on. A cell takes six seconds of one core. `LOST` was chosen by
the even seeds; the page reports even and odd seeds apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.objectives import into_page
from benchmarks.planted_tasks import TASKS, Row, planted
from benchmarks.rates import LAYERS, teach_small_llama
from mlxdpo import load_config  # before mlx: on Linux it sees to a fast BLAS
from mlxdpo.inference.generate import generate
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo.training import loop
from mlxdpo.training.collapse import LOST, SOON, CollapseWatch
from mlxdpo.training.metrics import Scored
from mlxdpo.training.run import train
from mlxdpo.training.step import NonFiniteError
from mlxdpo.training.watched_answers import AnswerStats
from mlxdpo_eval.results import write_lines

PAIRS, HELDOUT, BATCH, EPOCHS = 140, 40, 4, 2.0
SEEDS, HEALTHY = 4, 40  # seeds of each planted collapse and task; healthy runs in all
VOCABULARY = 600  # tokens of the small llama
TIMES = 100  # by what a rate is multiplied


class PlantedRun(NamedTuple):
    """One run."""

    model: str
    kind: str
    task: str
    seed: int


def repeated(rows: list[Row], seed: int) -> list[Row]:
    """The first two words of each chosen answer four times over are preferred to the answer."""
    return [row | {"chosen": " " + " ".join(row["chosen"].split()[:2] * 4), "rejected": row["chosen"]} for row in rows]


def by_coin(rows: list[Row], seed: int) -> list[Row]:
    """Chosen and rejected exchanged in a random half of the pairs."""
    half = random.Random(seed).sample(range(len(rows)), len(rows) // 2)
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    return [swapped[i] if i in set(half) else row for i, row in enumerate(rows)]


KINDS: dict[str, Callable[[list[Row], int], list[Row]]] = {
    "healthy": lambda rows, seed: rows,
    "rate": lambda rows, seed: rows,
    "repetition": repeated,
    "coin": by_coin,
}


class RecordedWatch(CollapseWatch):
    """Keeps what each look was told."""

    seen: list[dict[str, Any]]
    falls: list[float]

    def step(self, scored: Scored, unseen: bool = False) -> str | None:
        """As its parent; by how many nats a token the chosen answers are below the reference."""
        self.falls.append(float(((scored.ref_chosen - scored.chosen) / scored.chosen_len).mean()))
        return super().step(scored, unseen)

    def labels(self) -> str | None:
        """As its parent, and a new look is begun."""
        self.seen.append({"count": self.count, "total": self.total, "squares": self.squares, "beta": self.beta})
        return super().labels()

    def answers(self, now: AnswerStats, start: AnswerStats, chosen: float) -> tuple[bool, str | None]:
        """As its parent, and the look is filled."""
        self.seen[-1] |= {"now": now._asdict(), "start": start._asdict(), "chosen": chosen}
        return super().answers(now, start, chosen)


def cells(model: str, tasks: Sequence[str], seeds: int, healthy: int) -> Iterator[PlantedRun]:
    """Healthy runs of a seed before its planted ones, which take their rates."""
    left = healthy
    for seed in range(max(seeds, -(-healthy // len(tasks)))):
        kinds = list(KINDS) if seed < seeds else ["healthy"]
        for task in tasks:
            for kind in kinds:
                left -= kind == "healthy"
                if left >= 0 or kind != "healthy":
                    yield PlantedRun(model, kind, task, seed)


def run_cell(cell: PlantedRun, weights: str, out: Path, rate: float | None) -> dict[str, Any]:
    """Train at `rate`, or what `auto` finds: the line of a cell. The run directory is deleted."""
    training, heldout = planted(cell.task, PAIRS, HELDOUT)
    files = {name: out / "data" / f"{cell.kind}-{cell.task}-{name}.jsonl" for name in ("training", "heldout")}
    write_lines(files["training"], KINDS[cell.kind](training, cell.seed))
    write_lines(files["heldout"], heldout)
    folder = out / "runs" / "-".join(map(str, cell))
    shutil.rmtree(folder, ignore_errors=True)  # an unfinished one
    config = load_config(None, {
        "model": weights, "data": {"path": str(files["training"]), "eval": str(files["heldout"]), "template": "plain"},
        "lora": {"layers": LAYERS[cell.model]}, "optim": {} if rate is None else {"lr": rate},
        "train": {
            "epochs": EPOCHS, "batch_size": BATCH, "gradient_accumulation": 1, "eval_every": 0, "seed": cell.seed,
        },
        "out": str(folder),
    })  # fmt: skip
    found: dict[str, Any] = {**cell._asdict(), "looks": [], "notes": [], "stopped": None}
    started = time.process_time()
    seen, falls = list[dict[str, Any]](), list[float]()
    with mock.patch.object(loop, "CollapseWatch", type("Watch", (RecordedWatch,), {"seen": seen, "falls": falls})):
        try:
            for event in train(config, generate=generate):
                if event.kind == "start":
                    found["steps"] = event.values["plan"].steps
                elif event.kind == "eval":
                    found["accuracy"] = event.values["eval_rewards/accuracies"]
                elif event.kind == "note":
                    found["notes"].append([event.step, event.values["text"]])
                elif event.kind == "answers" and event.step:
                    found["looks"].append({"step": event.step, **seen[-1]})
                elif event.kind == "done":
                    found["lr"] = event.values["run"].config().optim.lr
        except NonFiniteError as error:
            found["stopped"] = str(error)
    shutil.rmtree(folder)
    return found | {"falls": falls, "signs": seen, "cpu_seconds": time.process_time() - started}


NAMED = {
    "taught": "the chosen answers repeat themselves",
    "answers": "greedy answers",
    "labels": "rewards have moved",
}  # what notes hold


def named(line: dict[str, Any], until: float) -> set[str]:
    """The signs that a run's notes named within this share of its steps."""
    end = until * line["steps"]
    early = [text for step, text in line["notes"] if step <= end]
    falls = [sum(line["falls"][i - SOON : i]) / SOON for i in range(SOON, int(end) + 1)]  # by the limit of today
    lost = {"lost"} if any(fall >= LOST for fall in falls) else set[str]()
    return lost | {sign for sign, words in NAMED.items() if any(words in text for text in early)}


def table(found: Sequence[dict[str, Any]]) -> str:
    """For each kind: in how many runs something was named within the first quarter, and what, by parity of seeds."""
    text, columns = [], ["lost", *NAMED]
    for model in dict.fromkeys(line["model"] for line in found):
        text += [
            "",
            f"**{model}**",
            "",
            f"| runs | seeds | named in the first quarter | at all | {' | '.join(columns)} |",
        ]
        text.append("|---" * (4 + len(columns)) + "|")
        for kind in KINDS:
            for parity in (0, 1):
                own = [line for line in found if (line["model"], line["kind"]) == (model, kind)]
                own = [line for line in own if line["seed"] % 2 == parity]
                if own:
                    early, ever = ([named(line, share) for line in own] for share in (0.25, 1.0))
                    counts = [sum(sign in signs for signs in ever) for sign in columns]
                    text.append(
                        f"| {kind} | {'even' if parity == 0 else 'odd'} | {sum(map(bool, early))} of {len(own)} "
                        f"| {sum(map(bool, ever))} of {len(own)} | {' | '.join(map(str, counts))} |"
                    )
    return "\n".join(text) + "\n"


def main() -> None:
    """Run the cells that are missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/collapses"))
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="tiny")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--healthy", type=int, default=HEALTHY)
    parser.add_argument("--page", type=Path, help="put what is measured so far into this page instead")
    options = parser.parse_args()
    if options.page is not None:
        into_page(options.page, table(list(read_lines(options.out / "cells.jsonl"))))
        return
    file, tasks = options.out / "cells.jsonl", options.tasks.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"unknown: {', '.join(unknown)}; tasks: {', '.join(TASKS)}")
    weights = "smollm2" if options.model == "smollm2" else teach_small_llama(options.out / "small-llama", VOCABULARY)
    done = (
        {PlantedRun(*(line[name] for name in PlantedRun._fields)): line for line in read_lines(file)}
        if file.exists()
        else {}
    )
    for cell in cells(options.model, tasks, options.seeds, options.healthy):
        if cell not in done:
            rate = TIMES * done[cell._replace(kind="healthy")]["lr"] if cell.kind == "rate" else None
            done[cell] = run_cell(cell, weights, options.out, rate)
            append_line(file, done[cell])
            print(
                json.dumps(
                    {
                        **cell._asdict(),
                        **{k: done[cell].get(k) for k in ("steps", "lr", "accuracy", "notes", "cpu_seconds")},
                    }
                ),
                flush=True,
            )
            gc.collect()


if __name__ == "__main__":
    main()
