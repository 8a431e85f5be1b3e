"""The sections of a model card: Markdown built from a run's own files. What is not known is said to be not known.

Numbers are read from RUN/eval/*.json as `mlxdpo eval` wrote it. The evaluation package is not imported: its files are
the interface. What a file does not hold is no row, never a zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, names_of
from mlxdpo.exporters.record import CURVE, RUN, Exported, Target, card_metadata, command, public_name, without_paths
from mlxdpo.exporters.usage import REPO, USAGE, client_words, code_block
from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.io.names import is_hub_id
from mlxdpo.losses import LOSSES
from mlxdpo.model.policy import BUILTIN, find_model
from mlxdpo.runs import Run
from mlxdpo.types import UserError

FORMATS = (1, 2, 3)  # of results_*.json; in all of them the numbers of the card have the same places
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
    reasons = w["reasons"] if "reasons" in w else w.get("invalid") or {}  # up to format 2 the counts by reason
    rows += [
        ("same winner in both orders", _percent(at(w, "position.consistent"))),
        ("answer shown first wins (no bias: 50 %)", _percent(at(w, "position.first"))),
        ("prefers the longer answer", _percent(at(w, "longer.prefers_longer"))),
        ("invalid verdicts", ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "0"),
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
    cards = tuple(JudgeCard(name, (("kind", "a program, not a language model"),)) for name in demo.get("rewards") or {})
    return CardNumbers(file.name, "", "the demo's held-out openings", tuple(found), cards)


def _demo_finding(name: str, metric: str, interval: Any, beside: str = "") -> list[CardNumber]:
    n = None if interval is None else f"{interval.get('clusters')} prompts"
    return list(_card_number(name, metric, at(interval, "estimate"), interval, n, beside))


class Licences(NamedTuple):
    """Identifiers as the Hub spells them (apache-2.0) of the base model's and the data's licence; None: not known.

    They are what the user says, else what the base model's own card says, and never a guess.
    """

    model: str | None = None
    data: str | None = None


def known(config: Config, given: Licences) -> Licences:
    """`given`, with the base model's licence filled in from its card where that lies on this machine."""
    return given if given.model is not None else given._replace(model=_licence_of(_card_of(config)))


def _card_of(config: Config) -> Path | None:
    path = config.model.path
    if path in BUILTIN or Path(path).is_dir():
        return find_model(path) / "README.md"
    if not is_hub_id(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "README.md", revision=config.model.revision)
    return Path(found) if isinstance(found, str) else None


def _licence_of(card: Path | None) -> str | None:
    licence = card_metadata(card).get("license") if card else None
    return licence if isinstance(licence, str) else None


def cell(text: Any) -> str:
    """Text that cannot break out of a table's cell, nor carry markup of its own."""
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def card_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def linked(name: str) -> str:
    """A model or data set, as a link where it is on the Hub."""
    return f"[{name}](https://huggingface.co/{name})" if is_hub_id(name) else f"`{cell(name)}`"


ONLINE = {"ppo": "PPO (arXiv 1707.06347)", "rloo": "RLOO (arXiv 2402.14740)"}


def objective(config: Config) -> str:
    """What was minimised, with its paper."""
    if config.stage == "sft":
        return "supervised fine-tuning on the chosen completions (cross entropy)"
    if config.stage == "reward":
        return "a reward model (Bradley-Terry, arXiv 2203.02155)"
    if config.stage in ONLINE:
        return f"reward of the model's own samples: {ONLINE[config.stage]}, KL cost {config.rollout.kl:g}"
    terms = [f"{name}: {LOSSES[name].title} (arXiv {LOSSES[name].paper})" for name in names_of(config.loss.name)]
    settings = config.loss.model_dump(exclude_defaults=True, exclude={"name"}) | {"beta": config.loss.beta}
    return ", ".join([" + ".join(terms), *(f"{name} {value}" for name, value in sorted(settings.items()))])


def introduction(record: Exported, config: Config, findings: CardNumbers | None) -> str:
    """What this is, and the verdict of its evaluation."""
    title = cell(record.run)
    verdict = findings.headline if findings and findings.headline else ""
    missing = "" if findings else " **It has not been evaluated**: it may not be better than its base."
    return (
        f"# {title}\n\n{linked(record.base_model)}, tuned on preference pairs by mlxdpo. "
        f"Objective: {cell(objective(config))}.{missing}" + (f"\n\n> {cell(verdict)}" if verdict else "")
    )


def contents(record: Exported, repo: str) -> str:
    """What the repository holds and how each part is loaded."""
    rows = [(_folder_of(target), name, target.relation, target.note or "") for name, target in record.targets.items()]
    rows.append((f"{RUN}/", "run", "", "recipe, manifest and adapter: `mlxdpo pull` makes a run directory of it"))
    snippets = [USAGE[name](record, target) for name, target in record.targets.items() if name in USAGE]
    snippets = [snippet.replace(REPO, repo) for snippet in snippets]
    pull = f"mlxdpo pull {repo} --out runs/pulled\nmlxdpo generate runs/pulled --prompt '...'"
    parts = [
        card_table(("folder", "target", "relation to the base", "note"), rows),
        *snippets,
        code_block("sh", pull),
    ]
    return "## What is here\n\n" + "\n\n".join(parts)


def _folder_of(target: Target) -> str:
    return "(root)" if target.folder == "." else f"{target.folder}/"


def base(record: Exported, manifest: Mapping[str, Any], licences: Licences) -> str:
    """The base model: what it is, which weights, and whose licence."""
    model = manifest["model"]
    bits = "none" if not model["quantization"] else f"{model['quantization']['bits']} bits"
    rows = [
        ("model", record.base_model if is_hub_id(record.base_model) else f"{record.base_model} (not a Hub id)"),
        ("revision", record.base_revision or model["revision"] or "not recorded"),
        ("trained from", public_name(model["source"])),
        ("digest of its weights", model["digest"]),
        ("trained in", f"{model['dtype']}, quantisation: {bits}"),
        ("relation", record.relation),
        ("licence", licences.model or "unknown: check the base model's page before you use this"),
        ("reference of the rewards", _reference_of(manifest)),
    ]
    return "## Base model\n\n" + card_table(("", ""), rows)


def _reference_of(manifest: Mapping[str, Any]) -> str:
    source = manifest["reference_source"]
    adapter = " with the adapter that training began from" if source["adapter"] else ""
    return f"{public_name(source['model'])}{adapter}, digest {manifest['reference']['digest']}"


def data(config: Config, manifest: Mapping[str, Any], licences: Licences) -> str:
    """The preference pairs: source, counts, what was left out, licence."""
    found = manifest["data"]
    rows = [
        ("source", public_name(found["source"])),
        ("training pairs", found["pairs"]),
        ("held-out pairs", found["heldout"]),
        ("digest", found["digest"]),
        ("licence", licences.data or "unknown: check before publishing this model"),
    ]
    lines = [f"- {cell(line)}" for line in _left_out(found["reports"])]
    rest = "\n\nRows left out or changed:\n\n" + "\n".join(lines) if lines else ""
    return f"## Data\n\n{card_table(('', ''), rows)}{rest}"


def _left_out(reports: Mapping[str, Any]) -> Iterable[str]:
    for name, report in reports.items():
        for verb in ("refused", "changed"):
            for reason, count in report.get(verb, {}).items():
                yield without_paths(f"{name}: {count} {verb}: {reason}")


def training(config: Config, manifest: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Objective, adapters, steps, the exact command, hardware, and the curve."""
    lora, steps = config.lora, [m for m in metrics if "loss" in m]
    shape = "every weight" if lora.method == "full" else f"{lora.method}, rank {lora.rank}, scale {lora.multiplier:g}"
    machine, versions = manifest["machine"], manifest["versions"]
    done = max((m["step"] for m in steps), default=0)
    rows = [
        *_made_of(manifest),
        ("objective", objective(config)),
        ("trained", f"{shape}; layers: {', '.join(lora.keys) if lora.keys else 'all linear ones in the blocks'}"),
        ("steps", f"{done}, {config.train.batch_size} x {config.train.gradient_accumulation} pairs each"),
        ("learning rate", f"{config.optim.lr:g}, {config.optim.schedule}, {config.optim.name}"),
        ("seed", manifest["seed"]),
        ("hardware", f"{machine['kind']}: {machine['name']}, {machine['memory'] / 1e9:.0f} GB, {machine['system']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        *_ends(metrics),
    ]
    parts = [
        "## Training",
        card_table(("", ""), rows),
        "The command, on the data named above:",
        code_block("sh", command(config)),
    ]
    return "\n\n".join([*parts, f"![loss, reward accuracy and margin over the steps]({CURVE})"] if steps else parts)


def _made_of(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What was done to trained adapters afterwards, where these weights are not those of a training."""
    made = manifest.get("made_of")
    if made and "strength" in made:
        name, factor = made["runs"][0]["run"], f"{made['strength']:g}"
        yield "strength", f"strength {factor} of {name}: {factor} times what training changed in the weights"
    if made and "merge" in made:
        shares = ", ".join(f"{w:g} {one['run']}" for w, one in zip(made["weights"], made["runs"], strict=True))
        yield "merge", f"{made['merge']}, of {len(made['runs'])} runs' adapters ({shares}); the rows below: the first's"


def _ends(metrics: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    held = [m for m in metrics if m.get("eval_loss") is not None]
    if held:
        ends = [f"{m['eval_loss']:.4f} at step {m['step']}" for m in (held[0], held[-1])]
        yield "held-out loss", ", ".join(ends)


def evaluation_section(findings: CardNumbers | None) -> str:
    """The table of numbers, each with interval and n, and what the judges are worth."""
    if findings is None:
        return "## Evaluation\n\nNot evaluated. `mlxdpo eval` measures it, with intervals."
    rows = [(f.name, f"{f.value:.4g}", interval_text(f), f.n or "not recorded", f.beside) for f in findings.findings]
    note = (
        f"Held-out pairs: {cell(without_paths(findings.data))}. Intervals are 95 %, clustered by prompt; "
        f"`none` means that the data do not support one. Source: eval/{cell(findings.file)} of the run."
    )
    parts = ["## Evaluation", card_table(("number", "value", "95 % interval", "n", "details"), rows), note]
    parts += [f"### Judge: {cell(c.judge)}\n\n{card_table(('', ''), without_paths(c.rows))}" for c in findings.cards]
    if not findings.cards:
        parts.append("No judge was used, so it is unknown whether its answers are better.")
    return "\n\n".join(parts)


def interval_text(finding: CardNumber) -> str:
    """The bounds, or that there are none."""
    if finding.low is None or finding.high is None:
        return "none"
    return f"{finding.low:.4g} to {finding.high:.4g}"


def fidelity(record: Exported) -> str:
    """How each artefact, reloaded, differs from the run that it was made from."""
    rows = []
    for name, target in record.targets.items():
        f = target.fidelity
        verdict = "passed" if f.passed else f"**failed**: {f.reason or 'no reason recorded'}"
        figures = (
            _card_value(f.token_kl, ".2e"),
            _card_value(f.policy_reference_kl, ".2e"),
            _card_value(f.slope, ".4f"),
        )
        change = f"{f.accuracy_run:.3f} to {f.accuracy_artefact:.3f}"
        n = f"{f.pairs} pairs, {f.tokens} tokens"
        rows.append((name, *figures, _card_value(f.correlation, ".4f"), change, n, verdict, client_words(target)))
    header = ("target", "KL(run, artefact)", "KL(run, reference)", "slope", "correlation", "accuracy", "n", "gate")
    header = (*header, "client: greedy answers that are the run's")
    note = (
        "Each artefact was loaded again and compared with the run on held-out pairs: mean KL per token in nats, slope "
        f"and correlation of its DPO margins over the run's. Pairs: {cell(without_paths(record.data))}."
    )
    return f"## Fidelity of the export\n\n{card_table(header, rows)}\n\n{note}"


def _card_value(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def limits(config: Config, findings: CardNumbers | None) -> str:
    """What nobody should read into this card."""
    lines = [
        "**Not safety evaluated.** Preference tuning can weaken refusals of the base model; this was not checked.",
        "Only the judges and pairs above were measured, not other tasks, languages or lengths.",
        "An implicit reward says how the model ranks given answers, not how well it writes.",
        "The limits and licences of the base model and the data also apply.",
    ]
    if findings is None:
        lines[1] = "Only the training metrics were measured."
    if config.lora.method == "full":
        lines.append("Every weight was trained: the base cannot be restored by removing an adapter.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
