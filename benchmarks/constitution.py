"""Constitutional AI in small: are revisions better than answers, and is a model better that was tuned on them?

    python -m benchmarks.constitution --out runs/constitution [--prompts FILE] [--judge longest --judge local:smollm2]

A model answers, criticises and revises (`mlxdpo constitution`); each judge is asked about revision against initial
answer in both orders: the share it prefers, with its interval. DPO then trains on those pairs, and the same judges
compare the tuned model's answers to held-out prompts with the untuned one's, beside a control: untuned against untuned.
Written are OUT/figures.json and, with --page, the part between the marks of a Markdown page. Every part is kept:
stopped at any time, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)

from mlxdpo.cli import run as command  # isort: skip
from mlxdpo.commands.eval import named_rewards
from mlxdpo.config import DataConfig
from mlxdpo.data.read import prompt_key
from mlxdpo.inference.trained_run import distinct_prompts, open_trained_run, prompt_text
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import read_lines
from mlxdpo.online.collect import read_prompts
from mlxdpo.runs import Run
from mlxdpo.types import Message, Preference
from mlxdpo_eval.judged_answers import WinRate, judge_answers, win_rate
from mlxdpo_eval.judges import AnswerPair, Judge, ask_both, open_judge
from mlxdpo_eval.sampling import Answers, Sampling, first_answers, sample_before_after

MARK = ("<!-- generated: constitution begin -->\n", "<!-- generated: constitution end -->\n")
JUDGES = ("longest", "shortest", "vader", "local:smollm2")
SUBJECTS = (
    *(
        "sleeping better",
        "a first day at school",
        "cooking for two",
        "saving money",
        "a rainy Sunday",
        "learning to swim",
    ),
    *("a noisy neighbour", "writing a letter", "growing tomatoes", "a long train ride", "a lost key", "a shy child"),
    *(
        "an old bicycle",
        "a job interview",
        "a quarrel with a friend",
        "walking a dog",
        "a small kitchen",
        "bad weather",
    ),
    *("a new language", "keeping a diary", "a broken window", "a birthday party", "reading at night", "a tired nurse"),
    "a crowded bus",
)
FORMS = (
    "Give one piece of advice about {}, in one sentence.",
    "Someone complains about {}. What would you say to them? One sentence.",
    "Name one thing that people get wrong about {}. One sentence.",
    "In one sentence: what could go badly with {}, and how to avoid it?",
    "Write one friendly sentence about {}.",
)
HELDOUT = 25  # the last form, which no pair is made from


def prompts(out: Path, own: Path | None) -> tuple[Path, Path]:
    """Files of prompts to make pairs from and to measure on: 100 and 25 of this script, or four in five of `own`."""
    files = out / "prompts.jsonl", out / "heldout.jsonl"
    if own is None:
        texts: list[Any] = [form.format(subject) for form in FORMS for subject in SUBJECTS]
        parts = texts[:-HELDOUT], texts[-HELDOUT:]
    else:
        found = [one.prompt for one in read_prompts(DataConfig(), str(own)).asked]
        rows = [p if isinstance(p, str) else [turn.as_dict() for turn in p] for p in found]
        parts = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :]
    for file, part in zip(files, parts, strict=True):
        if not file.exists():
            write_text(file, "".join(json.dumps({"prompt": one}, ensure_ascii=False) + "\n" for one in part))
    return files


def pairs_made(folder: Path) -> list[dict[str, Any]]:
    """The rows of a finished constitutional run."""
    return list(read_lines(folder / "pairs.jsonl"))


def turns(row: dict[str, Any]) -> tuple[Message, ...]:
    """The prompt of a row."""
    return tuple(Message(**turn) for turn in row["prompt"])


def of_revisions(judge: Judge, rows: Sequence[dict[str, Any]]) -> WinRate:
    """How often the revision is preferred to the initial answer."""
    asked = [turns(row) for row in rows]
    names, texts = [prompt_key(one).hex() for one in asked], [prompt_text(one) for one in asked]
    old, new = ([row[side] for row in rows] for side in ("rejected", "chosen"))
    before, after = (_answers(names, texts, side) for side in (old, new))
    return win_rate(
        judge, ask_both(judge, [AnswerPair(*trio) for trio in zip(texts, old, new, strict=True)]), before, after
    )


def _answers(names: list[str], prompts: list[str], texts: list[str]) -> Answers:
    return Answers(names, prompts, [[] for _ in texts], texts, [[] for _ in texts], [True] * len(texts))


def answered(run: Run, heldout: Path, out: Path, tokens: int, samples: int) -> list[Answers]:
    """Before, after and control on the held-out prompts, kept on disk."""
    file = out / "answers.json"
    if not file.exists():
        asked = read_prompts(DataConfig(), str(heldout)).asked
        rows = distinct_prompts([Preference(one.prompt, "", "", one.where) for one in asked], len(asked))
        sampling = Sampling(samples=samples, max_tokens=tokens, temperature=0.7, batch_size=16)
        write_json(file, [part._asdict() for part in sample_before_after(open_trained_run(run), rows, sampling)])
    return [Answers(**part) for part in json.loads(file.read_text("utf-8"))]


def figure(rate: WinRate) -> dict[str, Any]:
    """What is reported of a win rate."""
    interval = None if rate.interval is None else (rate.interval.low, rate.interval.high)
    counts = {name: getattr(rate, name) for name in ("n", "wins", "ties", "losses", "invalid", "rate", "soft")}
    return counts | {"interval": interval, "position": rate.position and rate.position._asdict()}


def verdict(found: dict[str, Any]) -> str:
    """In words; one half inside the interval is no difference that could be told."""
    if found["interval"] is None:
        return "cannot tell: too few data for an interval"
    low, high = found["interval"]
    return "better" if low > 0.5 else "worse" if high < 0.5 else "no difference that could be told"


def page(figures: dict[str, Any]) -> str:
    """The table, in Markdown."""
    rows = [("judge", "comparison", "n", "preferred", "95 % interval", "verdict"), ("---",) * 6]
    for name, parts in figures["judges"].items():
        for part, found in parts.items():
            low, high = found["interval"] or (None, None)
            interval = "none" if low is None else f"{low:.1%} to {high:.1%}"
            rate = "none" if found["rate"] is None else f"{found['rate']:.1%}"
            rows.append((f"`{name}`", part, str(found["n"]), rate, interval, verdict(found)))
    made = figures["report"]
    head = f"{made['rows']} pairs from {made['prompts']} prompts; left out: {json.dumps(made['left_out'])}.\n\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def judged(out: Path, names: Sequence[str], heldout: Path, tokens: int, samples: int) -> dict[str, Any]:
    """Every judge on the three comparisons; verdicts are kept, so a judge is asked once."""
    rows, run = pairs_made(out / "talks"), Run.open(out / "run")
    before, after, control = answered(run, heldout, out, tokens, samples)
    first = first_answers(before)
    result: dict[str, Any] = {}
    for name in names:
        judge = open_judge(name, named_rewards(DataConfig()))
        parts = {"revision against initial answer": of_revisions(judge, rows)}
        parts["tuned against untuned"] = win_rate(judge, judge_answers(judge, before, after), before, after)
        parts["untuned against untuned (control)"] = win_rate(
            judge, judge_answers(judge, first, control), first, control
        )
        result[judge.name] = {part: figure(rate) for part, rate in parts.items()}
    return result


def steps(given: argparse.Namespace, train: Path) -> int:
    """Conversations, then training: through the command line, as a user would."""
    out = given.out
    talk = ["constitution", given.model, "--prompts", str(train), "--out", str(out / "talks")]
    talk += ["--max-tokens", str(given.tokens), "--critique-tokens", str(given.tokens), "--temperature", "0.7"]
    if given.constitution is not None:
        talk += ["--constitution", str(given.constitution)]
    if not (out / "talks/pairs.jsonl").exists() and (status := command(talk)):
        return status
    if (out / "run/adapter").exists():
        return 0
    tune = ["train", str(out / "talks/recipe.yaml"), "--model", given.model, "--out", str(out / "run")]
    tune += ["--data.eval-fraction", "0", "--train.epochs", "3", "--train.batch-size", "2", "--train.save-every", "3"]
    tune += ["--optim.lr", "5e-5", "--data.max-length", "512"]
    return command(["train", "--resume", str(out / "run")] if (out / "run/manifest.json").exists() else tune)


def main(arguments: Sequence[str] | None = None) -> int:
    """Talk, train, judge, write; the exit status of whatever was stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("runs/constitution"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=Path, help="prompts of your own; four in five make pairs, the rest measure")
    parser.add_argument("--constitution", type=Path)
    parser.add_argument("--judge", action="append", help=f"may be given several times; by default {', '.join(JUDGES)}")
    parser.add_argument("--tokens", type=int, default=80, help="longest answer, critique and revision")
    parser.add_argument("--samples", type=int, default=1, help="answers to each held-out prompt")
    parser.add_argument("--page", type=Path, help="Markdown page with the marks, to be filled")
    given = parser.parse_args(arguments)
    train, heldout = prompts(given.out, given.prompts)
    if status := steps(given, train):
        return status
    figures = {
        "judges": judged(given.out, given.judge or JUDGES, heldout, given.tokens, given.samples),
        "report": json.loads((given.out / "talks/report.json").read_text("utf-8")),
    }
    write_json(given.out / "figures.json", figures)
    print(text := page(figures))
    if given.page is not None:
        before, rest = given.page.read_text("utf-8").split(MARK[0])
        write_text(given.page, before + MARK[0] + "\n" + text + "\n" + MARK[1] + rest.split(MARK[1])[1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
