"""What the evaluation of a run found, as rows of a table: read from RUN/eval/*.json as `mlxdpo eval` wrote it.

The evaluation package is not imported: its files are the interface. What a file does not hold is no row, never a zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.runs import Run
from mlxdpo.types import UserError

FORMATS = (1, 2)  # of results_*.json; in both the numbers of the card have the same places
Json = Mapping[str, Any]


class CardNumber(NamedTuple):
    """One number with its 95 % interval (None: the data could not carry one) and what it was counted on.

    `metric` and `subject` are what the Hub's model-index calls it and whose data it is; `beside` is a control or unit.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    n: str
    beside: str
    metric: str


class JudgeCard(NamedTuple):
    """How far a judge may be believed, as rows of text: name and value."""

    judge: str
    rows: tuple[tuple[str, str], ...]


class CardNumbers(NamedTuple):
    """Everything the card says of an evaluation. `data` names the held-out pairs."""

    file: str
    headline: str
    data: str
    findings: tuple[CardNumber, ...]
    cards: tuple[JudgeCard, ...]


def read_card_numbers(run: Run) -> CardNumbers | None:
    """The newest evaluation, else the demo's own measurement, else None. Raises `UserError` for an unreadable file."""
    folder = run.path / "eval"
    newest = sorted(folder.glob("results_*.json"))[-1:]
    for file, of in [*((file, _of_results) for file in newest), (folder / "demo.json", _of_demo)]:
        if file.exists():
            with as_written(file, "run the evaluation again, or remove it"):
                return of(file, read_json(file))
    return None


def at(values: Any, path: str) -> Any:
    """The value at "a.b.c", or None where there is no such value."""
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _card_number(name: str, metric: str, value: Any, interval: Any, n: Any, beside: str = "") -> Iterator[CardNumber]:
    if isinstance(value, int | float):
        low, high = (at(interval, "low"), at(interval, "high")) if interval else (None, None)
        yield CardNumber(name, float(value), low, high, "" if n is None else str(n), beside, metric)


def _of_results(file: Path, results: Json) -> CardNumbers:
    if (form := results.get("format")) not in FORMATS:
        raise UserError(f"{file}: its format is {form!r}, expected {FORMATS[-1]}; run `mlxdpo eval` again for the card")
    found = [*_win_rates(results), *_pairs_and_drift(results)]
    cards = tuple(_read_judge_card(w, at(results, "settings.judges") or {}) for w in results.get("winrates") or [])
    data = str(at(results, "data.source") or "held-out pairs")
    return CardNumbers(file.name, str(at(results, "headline.sentence") or ""), data, tuple(found), cards)


def _win_rates(results: Json) -> Iterator[CardNumber]:
    for w in results.get("winrates") or []:
        judge, n = w.get("judge"), f"{_judged_answers(w)} of {w.get('prompts')} prompts"
        tally = f"{w.get('wins')} wins, {w.get('ties')} ties, {w.get('losses')} losses"
        yield from _card_number(f"win rate, {judge}", "win_rate", w.get("rate"), w.get("interval"), n, tally)
        rows = (
            ("win rate at equal length", "length_controlled_win_rate", "controlled.rate", "controlled.interval"),
            ("change in score", "reward", "rewards.change.estimate", "rewards.change"),
        )
        for name, metric, value, interval in rows:
            yield from _card_number(f"{name}, {judge}", metric, at(w, value), at(w, interval), n)
    longest = at(results, "controls.longest")
    n = None if longest is None else _judged_answers(longest)
    yield from _card_number("control: always the longest", "", at(longest, "rate"), at(longest, "interval"), n)


def _judged_answers(w: Json) -> int:
    return sum(w.get(name) or 0 for name in ("wins", "ties", "losses"))


# Name, the Hub's metric, where value and interval stand in the results, what stands beside it.
PAIR_ROWS = (
    ("reward accuracy", "accuracy", "pairs.rewards.accuracy", "pairs.rewards.accuracy_interval",
     "the reference itself: 0.500"),
    ("reward accuracy at equal length", "length_controlled_accuracy", "pairs.length.controlled.rate",
     "pairs.length.controlled.interval", ""),
    ("control: always the longer", "", "pairs.length.longer_baseline", "pairs.length.longer_interval", ""),
    ("reward margin", "reward_margin", "pairs.rewards.margin.mean", "pairs.rewards.margin.interval", "beta times nats"),
    ("log-prob of the chosen, change", "chosen_log_ratio", "pairs.rewards.displacement.mean",
     "pairs.rewards.displacement.interval", "nats"),
    ("calibration error (ECE)", "ece", "pairs.calibration.ece", "pairs.calibration.ece_interval", ""),
)  # fmt: skip
DRIFT_ROWS = (
    ("KL to the reference", "kl", "drift.kl", "drift.kl_interval", "nats per answer"),
    ("KL per token", "kl_per_token", "drift.kl_per_token", "", "nats"),
    ("length, after / before", "length_ratio", "drift.length_ratio.value", "drift.length_ratio.interval", ""),
)


def _pairs_and_drift(results: Json) -> Iterator[CardNumber]:
    rewards, drift = at(results, "pairs.rewards"), results.get("drift")
    pairs = None if rewards is None else f"{rewards.get('n')} of {at(results, 'pairs.prompts')} prompts"
    answers = None if drift is None else f"{drift.get('answers')} answers"
    for rows, n in ((PAIR_ROWS, pairs), (DRIFT_ROWS, answers)):
        for name, metric, value, interval, beside in rows:
            yield from _card_number(name, metric, at(results, value), at(results, interval), n, beside)


def _read_judge_card(w: Json, identities: Json) -> JudgeCard:
    judge = str(w.get("judge"))
    rows = [(name, str(value)) for name, value in (identities.get(judge) or {}).items()]
    invalid = w.get("invalid") or {}
    rows += [
        ("same winner in both orders", _percent(at(w, "position.consistent"))),
        ("answer shown first wins (no bias: 50 %)", _percent(at(w, "position.first"))),
        ("prefers the longer answer", _percent(at(w, "longer.prefers_longer"))),
        ("invalid verdicts", ", ".join(f"{count} {reason}" for reason, count in invalid.items()) or "0"),
        ("same verdict when asked again", _retest(w.get("retest"))),
        ("agreement with human votes", _agreement(at(w, "humans.agreement"))),
    ]
    return JudgeCard(judge, tuple(rows))


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{100 * value:.1f} %"


def _retest(found: Any) -> str:
    return f"{_percent(found.get('same'))} of {found.get('n')}" if found else "not asked again"


def _agreement(found: Any) -> str:
    if not found:
        return "no votes"
    kappa = found.get("kappa")
    kappa = "no kappa" if kappa is None else f"Cohen's kappa {kappa:.2f}"
    return f"{_percent(found.get('raw'))}, {kappa}, n = {found.get('n')}"


def _of_demo(file: Path, demo: Json) -> CardNumbers:
    """`mlxdpo demo` measures with intervals under its own names."""
    found: list[CardNumber] = []
    for judge, values in (demo.get("rewards") or {}).items():
        for side in ("before", "after", "change"):
            found += _demo_finding(f"{judge} score, {side}", "reward" if side == "change" else "", values.get(side))
    found += _demo_finding("reward accuracy", "accuracy", demo.get("accuracy"), "the reference itself: 0.500")
    found += _demo_finding("reward margin", "reward_margin", demo.get("margin"), "beta times nats")
    found += _demo_finding("KL to the reference", "kl", demo.get("kl"), "nats per answer")
    lengths = [at(demo, f"{side}.length") for side in ("before", "after")]
    if all(lengths):
        found += _card_number("length, after / before", "length_ratio", lengths[1] / lengths[0], None, None)
    cards = tuple(JudgeCard(name, (("kind", "a program, no language model"),)) for name in demo.get("rewards") or {})
    return CardNumbers(file.name, "", "the demo's held-out openings", tuple(found), cards)


def _demo_finding(name: str, metric: str, interval: Any, beside: str = "") -> list[CardNumber]:
    n = None if interval is None else f"{interval.get('clusters')} prompts"
    return list(_card_number(name, metric, at(interval, "estimate"), interval, n, beside))
