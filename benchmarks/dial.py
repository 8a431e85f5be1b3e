"""The dial against a sweep over beta: what a judge gives at equal KL, with and without retraining.

    python -m benchmarks.dial --out runs/dial
    python -m benchmarks.dial --out runs/dial --page docs/evidence/dial.md

SmolLM2 is tuned on the demo's sentiment pairs once for each beta; one of these runs is then sampled at several
strengths. Both kinds of points are measured alike: the same held-out openings, the same noise, KL to the reference
along the policy's own answers, and VADER's score of opening and continuation. A line for each point goes to
OUT/results.jsonl; stopped at any time, the same command goes on. Small on purpose: minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxdpo.demo.material import HERE, bundled, judge_change
from mlxdpo.inference.trained_run import open_trained_run
from mlxdpo.io.atomic import append_line, write_text
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.strength import scaled
from mlxdpo.runs import Run
from mlxdpo.types import Preference
from mlxdpo_eval.metrics.intervals import clustered_mean
from mlxdpo_eval.results import to_json, write_lines
from mlxdpo_eval.sampling import Sampling, on_policy_kl, sample_answers

BETAS, DIALLED = (0.03, 0.1, 0.5), 0.1
STRENGTHS = (0.25, 0.5, 0.75, 1.25, 1.5)
JUDGE = "vader"
MARK = ("<!-- measured -->\n", "<!-- /measured -->")


def train(out: Path, beta: float, options: argparse.Namespace) -> Run:
    """The run of one beta; one that was stopped goes on."""
    folder = out / f"beta-{beta:g}"
    for name, part in (("pairs", "pairs"), ("heldout", "heldout")):
        if not (out / f"{name}.jsonl").exists():
            write_lines(out / f"{name}.jsonl", bundled(part))
    size = ["--train.batch-size", str(options.pairs), "--train.steps", str(options.steps), "--train.epochs", "9"]
    fresh = [str(HERE / "recipe.yaml"), "--data", str(out / "pairs.jsonl"), "--data.eval-fraction", "0", *size]
    begun = (folder / "manifest.json").exists()
    words = ["--resume", str(folder)] if begun else [*fresh, "--loss.beta", f"{beta:g}", "--out", str(folder)]
    if not (folder / "adapter" / "adapters.safetensors").exists():
        subprocess.run([sys.executable, "-m", "mlxdpo.cli", "train", *words], check=True)
    return Run.open(folder)


def measure(out: Path, run: Run, strengths: Sequence[float], options: argparse.Namespace, done: set[str]) -> None:
    """The points of one run at some strengths, appended to OUT/results.jsonl; those in `done` are left out."""
    name = lambda strength: f"{run.path.name} strength {strength:g}"  # noqa: E731
    if not (left := [strength for strength in strengths if name(strength) not in done]):
        return
    opened = open_trained_run(run)
    prompts = [Preference(row["prompt"], "", "", "prompts") for row in bundled("prompts")[: options.prompts]]
    sampling = Sampling(len(prompts), 2, options.tokens, batch_size=64)
    with opened.start() as model:
        before = sample_answers(opened, model, prompts, 2, sampling)
    for strength in left:
        started = time.perf_counter()
        with scaled(opened.policy.model, strength) as model:
            after = sample_answers(opened, model, prompts, 2, sampling)
            kl = on_policy_kl(opened, after, 1.0)
        change = judge_change(JUDGE, before, after)
        point = {"name": name(strength), "beta": opened.config.loss.beta, "strength": strength, "change": change}
        seconds = time.perf_counter() - started
        point |= {"kl": clustered_mean(kl, after.prompts), "mean_kl": float(np.mean(kl)), "seconds": seconds}
        append_line(out / "results.jsonl", to_json(point))


def table(points: Sequence[Mapping[str, Any]]) -> str:
    """All points by KL, and what the dial has at the KL of each retrained run."""
    rows = ["| point | KL to the reference, nats a sequence | change of VADER's score |", "|---|---|---|"]
    for point in sorted(points, key=lambda p: p["mean_kl"]):
        kind = f"beta {point['beta']:g}, strength {point['strength']:g}"
        rows.append(f"| {kind} | {_shown(point['kl'])} | {_shown(point['change']['change'])} |")
    dial = sorted((p for p in points if p["beta"] == DIALLED), key=lambda p: p["mean_kl"])
    own = [0.0, *(p["mean_kl"] for p in dial)], [0.0, *(p["change"]["change"]["estimate"] for p in dial)]
    rows += ["", "| retrained with | its change | the dial's at equal KL | difference |", "|---|---|---|---|"]
    for point in (p for p in points if p["beta"] != DIALLED):
        there = point["change"]["change"]["estimate"]
        if point["mean_kl"] > own[0][-1]:
            rows.append(f"| beta {point['beta']:g} | {there:+.3f} | beyond the largest strength | - |")
            continue
        here = float(np.interp(point["mean_kl"], *own))
        rows.append(f"| beta {point['beta']:g} | {there:+.3f} | {here:+.3f} | {here - there:+.3f} |")
    return "\n".join(rows) + "\n"


def _shown(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "none"
    return f"{interval['estimate']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def draw(points: Sequence[Mapping[str, Any]], file: Path) -> None:
    """KL against the change of the score, the dial as a line and the retrained runs as points, as an SVG file."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure((7, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    dial = sorted((p for p in points if p["beta"] == DIALLED), key=lambda p: p["mean_kl"])
    rest = [p for p in points if p["beta"] != DIALLED]
    middle = next(p["mean_kl"] for p in dial if p["strength"] == 1)
    own = f"one run (beta {DIALLED:g}), strength 0 to {max(p['strength'] for p in dial):g}"
    for kind, style, label in ((dial, "o-", own), (rest, "s", "retrained with another beta")):
        x, y = [p["mean_kl"] for p in kind], [p["change"]["change"]["estimate"] for p in kind]
        bounds = [(p["change"]["change"]["low"], p["change"]["change"]["high"]) for p in kind]
        reach = [[v - low for v, (low, _) in zip(y, bounds, strict=True)],
                 [high - v for v, (_, high) in zip(y, bounds, strict=True)]]  # fmt: skip
        axes.errorbar(x, y, yerr=reach, fmt=style, capsize=3, label=label)
        for point, a, b in zip(kind, x, y, strict=True):
            text = f"{point['strength']:g}" if kind is dial else f"beta {point['beta']:g}"
            before = kind is rest and a < middle  # the two sides of the run at strength 1, so that labels stay apart
            side = ((-6, 6), "right") if before else ((6, -12), "left")
            axes.annotate(text, (a, b), textcoords="offset points", xytext=side[0], ha=side[1], fontsize=8)
    axes.axhline(0, color="grey", linewidth=0.7)
    axes.set_xlabel("KL to the reference, nats a sequence")
    axes.set_ylabel("change of VADER's score")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, format="svg", metadata={"Date": None})


def main() -> None:
    """Train and measure what is missing, or write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dial"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--page", type=Path, help="put table and figure into this page instead")
    options = parser.parse_args()
    file = options.out / "results.jsonl"
    if options.page is not None:
        points = list(read_lines(file))
        before, rest = options.page.read_text("utf-8").split(MARK[0])
        page = before + MARK[0] + table(points) + MARK[1] + rest.split(MARK[1])[1]
        write_text(options.page, page)
        draw(points, options.page.with_suffix(".svg"))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for beta in (DIALLED, *(beta for beta in BETAS if beta != DIALLED)):
        run = train(options.out, beta, options)
        done = {line["name"] for line in read_lines(file)} if file.exists() else set()
        measure(options.out, run, (1.0, *STRENGTHS) if beta == DIALLED else (1.0,), options, done)


if __name__ == "__main__":
    main()
