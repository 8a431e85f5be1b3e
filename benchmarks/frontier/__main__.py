"""The command: `python -m benchmarks.frontier --help`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)
from benchmarks.frontier import page, points, runs
from benchmarks.frontier.plan import BUDGETS, Budget
from mlxdpo.commands.interrupt import stop_flag
from mlxdpo.io.atomic import write_json
from mlxdpo.types import UserError

DESCRIPTION = "Reward against drift for DPO, IPO, KTO, imitation, PPO, RLOO and best-of-n. See docs/frontier.md."


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.frontier", description=DESCRIPTION)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/frontier"), help="runs and points (default runs/frontier)")
    add("--budget", choices=BUDGETS, default="full", help="full: an hour or two on two cores; small: one minute")
    add("--small", action="store_const", const="small", dest="budget", help="short for --budget small")
    add("--only", nargs="+", default=[], metavar="ARM", help="only runs whose name begins so, e.g. dpo-0.1 ppo")
    add("--model", default="smollm2", help="a Hugging Face folder, or smollm2 (default)")
    add("--minutes", type=float, help="stop after the unit of work that is under way then")
    add("--show", action="store_true", help="measure nothing, show what is there")
    add("--docs", action="store_true", help="write docs/evidence/frontier.md and its figure")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Go on where the last call stopped, print; 0 when everything is measured, 130 when stopped before."""
    asked = parse(words)
    budget = BUDGETS[asked.budget]
    began = time.monotonic()
    with stop_flag() as stopped:
        late = lambda: asked.minutes is not None and time.monotonic() - began > 60 * asked.minutes  # noqa: E731
        done = asked.show or work(asked.out, budget, asked.model, asked.only, lambda: stopped() or late())
    lines = points.measured(asked.out)
    if any(line["method"] != points.UNTUNED for line in lines):
        print(page.markdown(lines, budget))
        if asked.docs:
            page.write_page(lines, budget)
            page.write_figure(lines)
    if not done:
        print(f"stopped; resume with {asked.out}")
    return 0 if done else 130


def work(out: Path, budget: Budget, model: str, only: Sequence[str], should_stop: runs.Stop) -> bool:
    """Everything the budget asks (of arms whose names begin with one of `only`, if any) that is not done yet; whether
    all of it is. Raises `UserError` when no arm has such a name."""
    check_same(out, budget, model)
    arms = [arm for arm in budget.arms() if arm.name.startswith(tuple(only) or "")]
    if not arms:
        raise UserError(f"no run is called {', '.join(only)}; there are {', '.join(arm.name for arm in budget.arms())}")
    bench = points.load_bench(runs.configured(arms[0], budget, out, model), budget)
    if not points.measure_untuned(bench, budget, out, should_stop):
        return False
    for arm in arms:
        if should_stop() or not runs.finish(arm, budget, out, model, should_stop, lambda text: print(text, flush=True)):
            return False
        for line in points.measure(bench, arm, budget, out, should_stop):
            print(f"{arm.name} step {line['step']}: {summary(line)}", flush=True)
        if should_stop():
            return False
    return True


def summary(line: points.Line) -> str:
    """A point in one line."""
    means = {key: sum(map(sum, line[key])) / sum(map(len, line[key])) for key in (runs.JUDGE, runs.SECOND, "kl")}
    return ", ".join(f"{key} {value:.3f}" for key, value in means.items())


def check_same(out: Path, budget: Budget, model: str) -> None:
    """Note what the points of `out` are made with. Raises `UserError` when that was something else."""
    now = {"model": model, **{k: v for k, v in budget._asdict().items() if k != "methods"}}
    now = {k: list(v) if isinstance(v, tuple) else v for k, v in now.items()}
    file = out / "budget.json"
    then = json.loads(file.read_text("utf-8")) if file.exists() else None
    if then is not None and then != now:
        changed = [k for k in now if then.get(k) != now[k]]
        raise UserError(f"{out} was started with a different {', '.join(changed)}; choose another --out")
    if then is None:
        write_json(file, now)


if __name__ == "__main__":
    raise SystemExit(main())
