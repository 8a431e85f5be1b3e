"""A report as blocks, the same for HTML and Markdown: built from the result files alone, so it can be made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlxdpo_eval.metrics.frontier import read_frontier
from mlxdpo_eval.report.blocks import (
    Document,
    Part,
    Result,
    Table,
    bounded,
    bounds,
    decimal,
    e_value_text,
    percent,
    roughly,
    share,
    smallest_effect,
)
from mlxdpo_eval.report.cost import cost_sentences
from mlxdpo_eval.report.plots import evaluation_plots, reward_over_drift
from mlxdpo_eval.report.retained import retained_part
from mlxdpo_eval.report.samples import more_samples, three_samples
from mlxdpo_eval.results import to_json

OF_JUDGING = ("judges", "slices", "retest", "max_invalid")  # settings that the answers do not depend on


def build_document(
    results: Result, pairs: Sequence[Result], samples: Sequence[Result], frontier: Result | None = None
) -> Document:
    """The report on one evaluation, with the frontier where one was measured."""
    plots, run, head = evaluation_plots(results, pairs), results["run"], results["headline"]
    told, three = three_samples(samples)
    sections = [
        Part("Three answers before and after", [told, *three]),
        Part("What it cost", list(cost_sentences(results))),
        Part("How often the tuned answers win", [*_answer_tables(results), *plots.get("winrates", [])]),
        *([] if results["votes"] is None else [Part("Human votes", [*votes_table(results["votes"]), *plots["votes"]])]),
        *(
            []
            if results["best_of"] is None
            else [Part("Best of several", _best_of_k_tables(results["best_of"], results))]
        ),
        *([] if results.get("retained") is None else [retained_part(results["retained"])]),
        Part("Held-out pairs", [*_pair_tables(results), *plots.get("pairs", [])]),
        Part("Drift", _drift_tables(results) + ([] if frontier is None else _frontier_blocks(frontier))),
        Part("More answers", more_samples(samples)),
        Part("Can the judges be trusted?", judge_cards(results)),
        Part("How this was measured", _settings_table(results)),
    ]
    model, when = run["model"]["source"], results["when"]["created"].replace("T", " ").removesuffix("+00:00")
    subtitle = (
        f"{model}, {run['loss']['name']} with beta {run['loss']['beta']:g}, {run['training_pairs']} training pairs; "
        f"evaluated {when} UTC"
    )
    return Document(run["name"], head["verdict"], head["sentence"], subtitle, _tiles(results), sections)


def _tiles(results: Result) -> list[tuple[str, str, str]]:
    pairs, drift = results["pairs"]["rewards"], results["drift"]
    tiles = [(f"win rate, {w['judge']}", share(w["rate"]), percent(w["interval"])) for w in results["winrates"][:2]]
    ratio = drift["length_ratio"]
    return [
        *tiles,
        ("held-out accuracy", share(pairs["accuracy"]), percent(pairs["accuracy_interval"])),
        ("KL to the reference", f"{drift['kl']:.2f} nats", bounds(drift["kl_interval"])),
        (
            "length, after / before",
            "–" if ratio["value"] is None else f"{ratio['value']:.2f}",
            bounds(ratio["interval"]),
        ),
    ]


ANSWER_COLUMNS = (
    "judge", "win / tie / loss", "win rate", "at equal length", "asked", "answered", "invalid", "equal",
)  # fmt: skip


def _answer_tables(results: Result) -> list[Any]:
    judged, controls = results["winrates"], results["controls"]
    rows = [_win_rate_row(w["judge"], w) for w in judged]
    rows.append(_win_rate_row("control: always the longest", controls["longest"]))
    if (length := controls["length"]) is not None:
        name = f"control: length alone, the better way (always the {length['rule']})"
        rows.append((name, "", bounded(length["rate"], length["interval"]), *[""] * 5))
    rows += [
        _win_rate_row(f"control: reference against itself, {w['judge']}", w) for w in controls["reference_vs_reference"]
    ]
    first = controls["longest"]
    note = (
        f"{first['n']} pairs of answers. Asked: pairs whose answers differ; equal ones are in no rate and no share. "
        "Win rate = wins + ties / 2 of the pairs that were answered, both orders asked, 95 % interval clustered by "
        f"prompt. {smallest_effect(first['prompts'], first['detectable']).capitalize()}. Where more than "
        f"{share(results['settings']['max_invalid'])} of what was asked is invalid, there is no verdict."
    )
    blocks: list[Any] = [Table(ANSWER_COLUMNS, rows, note)]
    scored = [w for w in judged if w["rewards"]]
    if scored:
        blocks.append(
            Table(
                ("mean score", "before", "after", "change"),
                [_mean_score_row(w) for w in scored],
                "Paired by prompt and noise.",
            )
        )
    for w in judged:
        blocks += _slice_tables("win rate by {}, " + w["judge"], w["slices"], results)
    if not judged:
        blocks.insert(0, "No judge was named, so it was not measured whether the answers are better: add --judge.")
    return blocks


def _win_rate_row(name: str, w: Result) -> tuple[str, ...]:
    controlled = w["controlled"]
    equal = "–" if controlled is None else bounded(controlled["rate"], controlled["interval"])
    counts = f"{w['wins']} / {w['ties']} / {w['losses']}"
    four = (str(w[key]) for key in ("asked", "answered", "invalid", "equal"))
    return name, counts, bounded(w["rate"], w["interval"]), equal, *four


def _mean_score_row(w: Result) -> tuple[str, ...]:
    r, means = w["rewards"], []
    for name, sign in (("before", ""), ("after", ""), ("change", "+")):
        means.append("–" if r[name] is None else bounded(r[name]["estimate"], r[name], sign))
    return w["judge"], *means


def _pair_tables(results: Result) -> list[Any]:
    r, length, calibrated = (results["pairs"][name] for name in ("rewards", "length", "calibration"))
    ranks, moved = r["rankings"], r["displacement"]
    median, fell = decimal(r["margin"]["median"], "+"), share(r["fell"])
    rows = [
        ("reward accuracy (tie = 1/2)", bounded(r["accuracy"], r["accuracy_interval"]),
         "0.500 for the reference itself"),
        ("accuracy at equal length", bounded(length["controlled"]["rate"], length["controlled"]["interval"]), ""),
        (f"control: length alone (always the {length['baseline']['rule']})",
         bounded(length["baseline"]["rate"], length["baseline"]["interval"]), "the better of longer and shorter"),
        ("reward margin", bounded(r["margin"]["mean"], r["margin"]["interval"], "+"), f"median {median}"),
        ("margin per token", bounded(r["token_margin"]["mean"], r["token_margin"]["interval"], "+"), ""),
        ("ranking accuracy, before to after", f"{decimal(ranks['reference'])} to {decimal(ranks['policy'])}",
         f"{ranks['gained']} gained, {ranks['lost']} lost, McNemar p = {ranks['p']:.3g}"),
        ("log-prob of the chosen, nats", bounded(moved["mean"], moved["interval"], "+"), f"fell in {fell} of pairs"),
        ("calibration error (ECE)", bounded(calibrated["ece"], calibrated["ece_interval"]),
         f"a perfect model: {decimal(calibrated['floor']['mean'])}, to {decimal(calibrated['floor']['high'])}"),
    ]  # fmt: skip
    note = (
        f"{r['n']} pairs of {results['pairs']['prompts']} prompts from {results['data']['source']}; "
        "95 % intervals clustered by prompt."
    )
    groups = [(g["name"], bounded(g["accuracy"], g["interval"]), str(g["n"])) for g in length["groups"] if g["n"]]
    blocks = [
        Table(("held-out pairs", "value", "details"), rows, note),
        Table(("accuracy by length", "accuracy", "pairs"), groups),
    ]
    return blocks + _slice_tables("accuracy by {}", results["pairs"]["slices"], results)


def _best_of_k_tables(found: Result, results: Result) -> list[Any]:
    best = found["best"]
    rule, length = max((("longest", found["longest"]), ("shortest", found["shortest"])), key=lambda x: x[1]["accuracy"])
    sizes = ", ".join(f"{count} of {k}" for k, count in found["sizes"].items())
    rows = [
        ("a right completion first", bounded(best["accuracy"], best["interval"]), str(best["n"])),
        ("control: chance", decimal(best["chance"]), str(best["n"])),
        (
            f"control: length alone (always the {rule})",
            bounded(length["accuracy"], length["interval"]),
            str(length["n"]),
        ),
    ]
    if (ties := found["ties"]) is not None:
        rows.append(("RewardBench 2's ties score", decimal(ties["score"]), str(ties["n"])))
    note = (
        f"Records with one prompt and several completions ({sizes}), scored by log pi - log ref. Equal scores at the "
        f"top share the record; in {found['tied']} records all are equal. {found['left_out']} records were left out "
        "because a completion could not be scored. The pairs below are each right completion against each wrong one."
    )
    title = "a right completion first, by {}"
    table = Table(("best of several", "accuracy", "records"), rows, note)
    return [table, *_slice_tables(title, found["slices"], results, "records")]


def _slice_tables(title: str, slices: Result, results: Result, items: str = "pairs") -> list[Table]:
    """A table for each column asked for, and for others that have two slices to compare."""
    asked = results["settings"]["slices"]
    shown = [(name, s) for name, s in slices.items() if name in asked or len(s["shown"]) > 1]
    return [_slice_table(title.replace("{}", name), s, items) for name, s in shown]


def _slice_table(title: str, found: Result, items: str) -> Table:
    rows = [(s["name"], bounded(s["share"], s["interval"]), str(s["n"]), decimal(s["q"])) for s in found["shown"]]
    worst = found["worst"]
    said = (
        "No slice is large enough to show. "
        if worst is None
        else f"Worst: {worst['name']}, {decimal(worst['share'])}. "
    )
    note = (
        f"{said}Intervals are simultaneous for all slices; q is corrected for multiple comparisons. "
        f"{found['hidden']} slices with {found['hidden_rows']} {items} are too small to show."
    )
    return Table((title, "share", items, "q against the rest"), rows, note)


def _drift_tables(results: Result) -> list[Any]:
    drift, (before, after) = results["drift"], (results["drift"][name] for name in ("before", "after"))
    names = {
        "length": "tokens per answer", "stopped": "ended by itself (EOS)",
        "repetition": "repeated 3-grams", "distinct_2": "distinct bigrams",
    }  # fmt: skip
    rows = [
        (text, *(bounded(side[name]["value"], side[name]["interval"]) for side in (before, after)))
        for name, text in names.items()
    ]
    rows.append(("KL to the reference, nats per answer", "0.000", bounded(drift["kl"], drift["kl_interval"])))
    rows.append(("KL per token, nats", "0.000", f"{drift['kl_per_token']:.4f}"))
    note = (
        f"KL is summed over the vocabulary at each step of {drift['answers']} of the tuned model's own answers, "
        "the first to each prompt. "
        "Drift is not quality: a model can drift without getting better."
    )
    return [
        Table(("answers", "before", "after"), rows, note),
        f"{share(drift['same'])} of the answers are the same word for word.",
    ]


def _frontier_blocks(found: Result) -> list[Any]:
    points, best = read_frontier(found)
    rows = [
        (
            p.name,
            bounded(p.kl, to_json(p.kl_interval)),
            bounded(p.reward, to_json(p.reward_interval)),
            "yes" if p in best else "",
        )
        for p in points
    ]
    note = f"{found['prompts']} prompts, {found['samples']} answers each, the same noise at every point."
    header = ("checkpoint", "KL, nats", f"win rate, {found['judge']}", "no other beats it")
    return [Table(header, rows, note), reward_over_drift(points, best, f"win rate, {found['judge']}")]


def _objective(loss: Result, chosen: Result) -> str:
    """Name, beta, and what differs from the defaults: most parameters are those of other objectives."""
    shown = {name: loss[name] for name in ("name", "beta")} | dict(chosen)
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())


def _settings_table(results: Result) -> list[Any]:
    run, settings = results["run"], results["settings"]
    reference = run["reference"]
    rows = [
        ("base model", f"{run['model']['source']}, {run['model']['dtype']}, weights {run['model']['digest'][:16]}"),
        (
            "reference, locked",
            f"{results['run']['reference_source']['model']}, {reference['dtype']}, weights {reference['digest'][:16]}",
        ),
        ("adapter", run["adapter_sha256"][:16]),
        ("objective", _objective(run["loss"], run["loss_set"])),
        ("answers", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items() if k not in OF_JUDGING)),
        ("judges", "; ".join(_judge_method(*judge) for judge in settings["judges"].items()) or "none"),
        ("versions", ", ".join(f"{k} {v}" for k, v in results["versions"].items())),
        ("took", f"{results['when']['seconds']:.0f} s"),
    ]
    files = (
        "Every number can be recomputed from eval_pairs.jsonl and eval_samples.jsonl in the folder of the results file."
    )
    return [Table(("setting", "value"), rows), *results["data"]["left_out"], files]


def _judge_method(name: str, identity: Result) -> str:
    """A judge with how it is asked: the method of a server, the rule of a panel."""
    how = identity.get("asked_by") or identity.get("rule")
    return f"{name} ({how})" if how else name


COLUMNS = (
    "judge", "consistent", "shown first wins", "prefers longer", "same when asked again", "invalid", "worst to best",
    "agrees with humans",
)  # fmt: skip


def judge_cards(results: Result) -> list[Any]:
    """Report cards of all judges, and their rates corrected by votes."""
    rows = [_judge_card(w) for w in results["winrates"]]
    if not rows:
        return ["No judge was named."]
    note = (
        "Consistent: the same answer wins in both orders. Shown first: how often that place wins, 50 % without bias. "
        "A judge that always prefers the longer answer measures length. Asked again: the same comparisons a second "
        "time, past the cache (--retest N). Invalid verdicts are left out of every rate; worst and best are the rate "
        "were they all losses or all wins. Humans: the judge's opinion on the very pairs that people voted on."
    )
    blocks: list[Any] = [Table(COLUMNS, rows, note)]
    corrected = [w for w in results["winrates"] if w["humans"] and w["humans"]["debiased"]]
    if corrected:
        lines = [(w["judge"], *_corrected_rate(w["humans"])) for w in corrected]
        header = ("win rate, corrected by human votes (PPI++)", "win rate", "votes used", "votes saved")
        blocks.append(
            Table(header, lines, "Votes on prompts of this evaluation, taken as a sample of its comparisons.")
        )
    return blocks


def _corrected_rate(humans: Result) -> tuple[str, str, str]:
    found = humans["debiased"]
    return bounded(found["estimate"]["estimate"], found["estimate"]), str(humans["corrected"]), share(found["saving"])


def _judge_card(w: Result) -> tuple[str, ...]:
    place, longer, humans, again = w["position"], w["longer"], w["humans"], w["retest"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in w["reasons"].items())
    invalid = f"{w['invalid']} of {w['asked']} asked{f': {reasons}' if reasons else ''}"
    return (
        w["judge"],
        "–" if place is None else share(place["consistent"]),
        "–" if place is None or place["first"] is None else share(place["first"]),
        "–" if longer is None or longer["prefers_longer"] is None else share(longer["prefers_longer"]),
        "not asked" if again is None else _asked_again(again),
        invalid,
        f"{decimal(w['worst'])} to {decimal(w['best'])}",
        _agreement_with_humans(humans),
    )


def _asked_again(found: Result) -> str:
    bounds = "" if found["interval"] is None else f" ({percent(found['interval'])})"
    failed = f", {found['invalid']} invalid" if found["invalid"] else ""
    return f"{share(found['same'])} of {found['n']}{bounds}{failed}"


def _agreement_with_humans(found: Result | None) -> str:
    if not found:
        return "no votes"
    agreed = found["agreement"]
    return f"{share(agreed['raw'])} of {agreed['n']}, kappa {decimal(agreed['kappa'])}"


def votes_table(found: Result) -> list[Any]:
    """The running verdict of people, safe to look at after every vote."""
    left_out = [f"{count} x {reason}" for reason, count in (found["uncounted"] | found["left_out"]).items()]
    said = f"Not counted: {'; '.join(left_out)}." if left_out else "Every line of the file counts."
    if not found["n"]:
        return [f"No vote of {found['file']} counts as evidence. {said}"]
    now = found["looks"][-1]
    told = "–" if found["needed"] is None else roughly(found["needed"])
    rows = [
        ("tuned answers preferred", bounded(now["rate"], now)),
        ("win / tie / loss", f"{found['wins']} / {found['ties']} / {found['losses']}"),
        ("both bad, among the ties", str(found["both_bad"])),
        ("e-value against no difference", e_value_text(found["e_value"])),
        ("decided (e-value 20) at vote", "not yet" if found["decided_at"] is None else str(found["decided_at"])),
        ("votes still needed at this rate", told),
    ]
    note = (
        "The interval and the e-value are valid at every look, so you may stop at any time. The first vote on "
        f"each prompt counts, a tie as one half. {said}"
    )
    return [Table((f"{found['n']} votes from {found['file']}", "value"), rows, note)]
