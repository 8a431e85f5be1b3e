"""The parts of a report on who judged: people's votes as they came in, and what each judge's word is worth."""

from __future__ import annotations

from typing import Any

from mlxdpo_eval.report.blocks import Result, Table, bounded, decimal, e_value_text, percent, roughly, share

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
    invalid = ", ".join(f"{count} {reason}" for reason, count in w["invalid"].items()) or "0"
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
        "The interval and the e-value hold at every look, so stopping when one likes is no cheating. The first vote on "
        f"each prompt counts, a tie as one half. {said}"
    )
    return [Table((f"{found['n']} votes from {found['file']}", "value"), rows, note)]
