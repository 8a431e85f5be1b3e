"""Does each objective move what it minimises, on pairs it did not see? Every one, three seeds, the real command line.

    python -m benchmarks.objectives --out runs/objectives [--only sigmoid,kto] [--seeds 3] [--steps 30]
    python -m benchmarks.objectives --out runs/objectives --table docs/evidence/objectives.md

Each case is `mlxdpo train` on the demo's 345 pairs with the demo's recipe, 30 steps, and the objective's own defaults;
its held-out loss on the demo's 118 other pairs is read before and after from the run's `metrics.jsonl`. Intervals are
Student's t over the seeds. A line per run goes to OUT/results.jsonl; stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from mlxdpo.demo.material import HERE, bundled
from mlxdpo.io.atomic import append_line, write_text
from mlxdpo.io.json_file import read_lines
from mlxdpo.losses import LOSSES

SETTINGS: dict[str, list[str]] = {name: ["--loss.name", name] for name in LOSSES} | {
    "kto from thumbs": ["--loss.name", "kto", "THUMBS"],
    "sigmoid+sft (RPO)": ["--loss.name", "sigmoid+sft", "--loss.weights", "1", "--loss.weights", "0.1"],
    "sigmoid+bco_pair+sft (MPO)": [
        *("--loss.name", "sigmoid+bco_pair+sft"),
        *("--loss.weights", "0.8", "--loss.weights", "0.2", "--loss.weights", "1"),
    ],
    "sigmoid, ld_alpha 0.5": ["--loss.ld-alpha", "0.5"],
    "sigmoid, wpo": ["--loss.wpo"],
    "sigmoid, js_divergence": ["--loss.f-divergence", "js_divergence"],
    "sigmoid, sync_every 10": ["--reference.sync-every", "10"],
    "stage: sft": ["--stage", "sft"],
    "sigmoid after stage: sft": ["AFTER SFT"],
}
MARK = ("<!-- measured -->\n", "<!-- /measured -->")


def material(out: Path) -> dict[str, Path]:
    """The demo's pairs, and the same as single completions with thumbs, as files."""
    files = {}
    for part, source in (("train", "pairs"), ("eval", "heldout")):
        rows = bundled(source)
        thumbs = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        for name, lines in (("", rows), ("thumbs-", thumbs)):
            files[f"{name}{part}"] = out / "data" / f"{name}{part}.jsonl"
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            write_text(files[f"{name}{part}"], text)
    return files


def folder(out: Path, case: str, seed: int) -> Path:
    """The run directory of a case."""
    return out / "runs" / f"{''.join(c if c.isalnum() else '-' for c in case)}-{seed}"


def train(case: str, seed: int, steps: int, out: Path, files: dict[str, Path]) -> dict[str, Any]:
    """One run through the command line, and what it says of the held-out rows at its start and its end."""
    run = folder(out, case, seed)
    settings = [word for word in SETTINGS[case] if word not in ("THUMBS", "AFTER SFT")]
    kind = "thumbs-" if "THUMBS" in SETTINGS[case] else ""
    if held := heldout(run, steps):
        return {"case": case, "seed": seed, "steps": steps, **held}
    if "AFTER SFT" in SETTINGS[case]:
        train("stage: sft", seed, steps, out, files)
        settings += ["--model.adapter", str(folder(out, "stage: sft", seed) / "adapter")]
    shutil.rmtree(run, ignore_errors=True)  # an unfinished one
    with resources.as_file(HERE / "recipe.yaml") as recipe:
        command = [
            *(sys.executable, "-m", "mlxdpo.cli", "train", str(recipe)),
            *("--data.path", str(files[f"{kind}train"]), "--data.eval", str(files[f"{kind}eval"])),
            *("--train.steps", str(steps), "--train.epochs", "9", "--train.eval-every", "0"),
            *("--train.seed", str(seed), "--out", str(run), *settings),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"case": case, "seed": seed, "steps": steps, **(heldout(run, steps) or {})}


def heldout(run: Path, steps: int) -> dict[str, Any] | None:
    """(before, after) of each held-out number of a finished run, or None."""
    file = run / "metrics.jsonl"
    evals = [line for line in read_lines(file) if "eval_loss" in line] if file.exists() else []
    if not evals or evals[-1]["step"] != steps:
        return None
    names = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    return {name: (evals[0].get(f"eval_{name}"), evals[-1].get(f"eval_{name}")) for name in names}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and the half width of its 95 % interval (Student's t); None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, float(student.ppf(0.975, len(values) - 1)) * (variance / len(values)) ** 0.5


def apart(before: float | None, after: float | None) -> float | None:
    """The change of a number, where there is one."""
    return None if before is None or after is None else after - before


def shown(values: Sequence[float | None], form: str = "{:+.3f}") -> str:
    """A mean with its interval; a dash for a number that the stage does not report."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    mean, half = interval(known)
    return form.format(mean) + ("" if half is None else f" ± {half:.3f}")


def table(results: Sequence[dict[str, Any]]) -> str:
    """The cases that were measured, in Markdown."""
    head = (
        *("objective", "seeds", "held-out loss before", "after"),
        *("change", "down?", "accuracy after", "log p(chosen), change"),
    )
    rows = [head, ("---",) * len(head)]
    for case in SETTINGS:
        runs = [r for r in results if r["case"] == case]
        if not runs:
            continue
        change = [r["loss"][1] - r["loss"][0] for r in runs]
        mean, half = interval(change)
        verdict = "cannot tell" if half is None or abs(mean) <= half else "yes" if mean < 0 else "no"
        rows.append(
            (
                f"`{case}`",
                str(len(runs)),
                f"{sum(r['loss'][0] for r in runs) / len(runs):.4g}",
                f"{sum(r['loss'][1] for r in runs) / len(runs):.4g}",
                shown(change, "{:+.4g}"),
                verdict,
                shown([r["rewards/accuracies"][1] for r in runs], "{:.3f}"),
                shown([apart(*r["logps/chosen"]) for r in runs], "{:+.2f}"),
            )
        )
    steps = ", ".join(map(str, sorted({r["steps"] for r in results})))
    note = f"{steps} steps; ± is half of a 95 % interval over seeds (Student's t), so one seed has none.\n"
    return note + "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def into_page(page: Path, text: str) -> None:
    """Put the table between the page's marks."""
    before, rest = page.read_text("utf-8").split(MARK[0])
    write_text(page, before + MARK[0] + text + MARK[1] + rest.split(MARK[1])[1])


def main() -> None:
    """Measure what is missing, print the table, and with --table put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases, separated by semicolons; unset means all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--table", type=Path, help="page with the marks, to be filled with what is measured so far")
    given = parser.parse_args()
    file = given.out / "results.jsonl"
    if given.table is None:
        files, cases = material(given.out), given.only.split(";") if given.only else list(SETTINGS)
        for seed in range(given.seeds):
            for case in cases:
                done = {(r["case"], r["seed"], r["steps"]) for r in (read_lines(file) if file.exists() else ())}
                if (case, seed, given.steps) not in done:
                    found = train(case, seed, given.steps, given.out, files)
                    append_line(file, found)
                    print(json.dumps(found), flush=True)
    text = table(list(read_lines(file)))
    print(text)
    if given.table is not None:
        into_page(given.table, text)


if __name__ == "__main__":
    main()
