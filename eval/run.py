"""The evaluation of a run, start to end: score held-out pairs, answer before and after, judge, measure drift, write.

RUN/eval/results_<time>.json   every number, with its settings
RUN/eval/eval_pairs.jsonl      per held-out pair: what the pair metrics are made of
RUN/eval/eval_retained.jsonl   per retained check: the scores before and after, and written answers
RUN/eval/eval_samples.jsonl    per pair of answers: texts, KL, every verdict in both orders
RUN/report.html, RUN/report.md
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo import Preference, Run
from mlxdpo.inner import (
    BestOfK,
    PairLogps,
    TrainedRun,
    distinct_prompts,
    encode_pairs,
    folder_digest,
    heldout_pairs,
    heldout_records,
    open_trained_run,
    pair_logps,
    prompt_name,
    saying_left,
    versions,
)
from mlxdpo_eval.heldout import (
    BestOfKReport,
    Heldout,
    RecordPairs,
    best_of_k_report,
    heldout_report,
    pair_lines,
    pair_records,
)
from mlxdpo_eval.judge_quality import ask_again, human_agreement
from mlxdpo_eval.judged_answers import WinRate, answer_pairs, judge_answers, win_rate
from mlxdpo_eval.judges import BothOrders, Judge
from mlxdpo_eval.judges.program import LENGTH_REWARDS, reward_judge
from mlxdpo_eval.judges.protocol import Metered
from mlxdpo_eval.judges.votes import Ballots, read_ballots
from mlxdpo_eval.metrics.length import length_baseline
from mlxdpo_eval.metrics.slices import select_columns, slice_columns
from mlxdpo_eval.report.blocks import Headline, answers_headline, best_of_k_headline, pairs_headline, votes_headline
from mlxdpo_eval.report.retained import first_screen
from mlxdpo_eval.results import FORMAT, drift_report, identify_run, sample_lines, write_lines, write_results
from mlxdpo_eval.retained.run import Retained, check_retained
from mlxdpo_eval.sampling import Answers, Sampling, default_max_tokens, first_answers, on_policy_kl, sample_before_after
from mlxdpo_eval.voting import VoteRun, vote_run

Say = Callable[[str], None]
Columns = Mapping[str, Sequence[Hashable]]


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate besides the run itself: other `data`, a file of human `votes`, columns to slice by.

    `retest` comparisons are asked of each judge a second time. A judge of whose verdicts a larger share than
    `max_invalid` is invalid has given no verdict. With `retained` the bundled checks are made before and after, `limit`
    of each area.
    """

    data: str | None = None
    votes: Path | None = None
    slices: tuple[str, ...] = ()
    retest: int = 0
    max_invalid: float = 0.1
    retained: bool = False
    limit: int | None = None


class Judged(NamedTuple):
    """One judge's result, its verdicts, and its control: untuned answers against untuned answers."""

    result: WinRate
    found: list[BothOrders]
    control: WinRate


class Evaluation(NamedTuple):
    """What was found: `results` as written, and the sentences of judges that gave no verdict."""

    results: dict[str, Any]
    file: Path
    failures: list[str]


class HeldoutData(NamedTuple):
    """Held-out pairs as read; `records` and `paired` where the data are best-of-k records."""

    rows: list[Preference]
    left_out: list[str]
    source: str
    records: list[BestOfK]
    paired: RecordPairs | None


class EvalParts(NamedTuple):
    """The parts of an evaluation that its results are written from."""

    judged: list[Judged]
    pairs: Heldout
    best: BestOfKReport | None
    votes: VoteRun | None


DEFAULT_OPTIONS = EvalOptions()


def evaluate(
    run: Run,
    judges: Sequence[Judge],
    sampling: Sampling,
    options: EvalOptions = DEFAULT_OPTIONS,
    say: Say = lambda text: None,
) -> Evaluation:
    """Measure a run and write everything.

    Raises `UserError` when the run's model or reference is another one, there are no held-out pairs, a column to slice
    by is not there, or the file of votes holds none.
    """
    started = time.monotonic()
    data = _heldout_data(run, options.data)
    columns = slice_columns([row.columns for row in data.rows], options.slices)
    ballots = None if options.votes is None else read_ballots(options.votes)
    opened = open_trained_run(run)
    rows, examples, encoding = encode_pairs(opened, data.rows)
    say(f"scoring {len(rows)} held-out pairs ({data.source})")
    logps = pair_logps(opened, examples, progress=saying_left("scored batches of pairs", say))
    sampling = sampling if sampling.max_tokens else replace(sampling, max_tokens=default_max_tokens(examples))
    prompts = distinct_prompts(rows, sampling.prompts)
    say(f"answering {len(prompts)} prompts, {sampling.samples} x before and after, to {sampling.max_tokens} tokens")
    before, after, control = sample_before_after(opened, prompts, sampling, say)
    say("measuring drift")
    kl_of = first_answers(after)
    kl = on_policy_kl(opened, kl_of, sampling.temperature, say)
    retained = _retained(opened, options, say)
    by_answer = _columns_of_answers(select_columns(columns, data.rows, prompts), prompts, before)
    inputs = _JudgeInputs(run, before, after, control, ballots, by_answer, options.retest, say)
    judged = [_run_judge(judge, inputs) for judge in judges]
    found = EvalParts(
        judged,
        heldout_report(opened, rows, logps, select_columns(columns, data.rows, rows)),
        _best_of_k(data, rows, logps, columns),
        None if ballots is None else vote_run(ballots, folder_digest(run.adapter)),
    )
    judge_identities = {"judges": {judge.name: dict(judge.identity) for judge in judges}}
    results = {
        "format": FORMAT,
        "run": identify_run(opened),
        "settings": asdict(sampling) | judge_identities | _asked_options(options),
        "data": {"source": data.source, "pairs": len(rows), "left_out": data.left_out + encoding.lines()},
        **_findings(found, before, after, options.max_invalid),
        "drift": drift_report(before, after, kl_of, kl),
        "retained": retained,
        "versions": versions(),
    }
    write_lines(run.path / "eval" / "eval_pairs.jsonl", pair_lines(opened, rows, logps))
    verdicts = {j.result.judge: j.found for j in judged}
    lines = sample_lines(before, after, dict(zip(kl_of.names, kl, strict=True)), verdicts)
    write_lines(run.path / "eval" / "eval_samples.jsonl", lines)
    if retained is not None:
        results["sentences"] = first_screen(results["headline"], retained, results["sentences"])
    spent = {judge.name: judge.spent() for judge in judges if isinstance(judge, Metered)}
    file, written = write_results(run, results, time.monotonic() - started, spent)
    failed = [j.result for j in judged if j.result.failed(options.max_invalid)]
    return Evaluation(written, file, [answers_headline(result, options.max_invalid).sentence for result in failed])


def _asked_options(options: EvalOptions) -> dict[str, Any]:
    return {"slices": list(options.slices), "retest": options.retest, "max_invalid": options.max_invalid}


def _retained(opened: TrainedRun, options: EvalOptions, say: Say) -> Retained | None:
    if not options.retained:
        return None
    found, lines = check_retained(opened, options.limit, say)
    write_lines(opened.run.path / "eval" / "eval_retained.jsonl", lines)
    return found


def _heldout_data(run: Run, data: str | None) -> HeldoutData:
    if data is not None and (found := heldout_records(run, data)) is not None:
        records, report, source = found
        paired = pair_records(records)
        return HeldoutData(paired.rows, report.lines(), source, records, paired)
    rows, report, source = heldout_pairs(run, data)
    return HeldoutData(rows, report.lines(), source, [], None)


def _best_of_k(
    data: HeldoutData, rows: Sequence[Preference], logps: PairLogps, columns: Columns
) -> BestOfKReport | None:
    if data.paired is None:
        return None
    by_record = select_columns(columns, data.rows, data.paired.first)
    return best_of_k_report(data.records, data.paired, rows, logps, by_record)


def _columns_of_answers(columns: Columns, prompts: Sequence[Preference], answers: Answers) -> dict[str, list[Hashable]]:
    """Columns of prompts as columns of the answers to them."""
    names = [prompt_name(row.prompt) for row in prompts]
    of = {column: dict(zip(names, values, strict=True)) for column, values in columns.items()}
    return {column: [values[name] for name in answers.names] for column, values in of.items()}


class _JudgeInputs(NamedTuple):
    """The same for every judge."""

    run: Run
    before: Answers
    after: Answers
    control: Answers
    ballots: Ballots | None
    columns: Columns
    retest: int
    say: Say


def _run_judge(judge: Judge, inputs: _JudgeInputs) -> Judged:
    how = f", by {judge.identity['asked_by']}" if "asked_by" in judge.identity else ""
    inputs.say(f"judging {len(inputs.before.texts)} pairs of answers: {judge.name}{how}")
    found, first = judge_answers(judge, inputs.before, inputs.after), first_answers(inputs.before)
    result = win_rate(judge, found, inputs.before, inputs.after, inputs.columns)
    if inputs.ballots is not None:
        adapter = folder_digest(inputs.run.adapter)
        result = result._replace(humans=human_agreement(judge, found, inputs.before, inputs.ballots, adapter))
    if inputs.retest:
        inputs.say(f"asking {judge.name} again")
        again = ask_again(judge, answer_pairs(inputs.before, inputs.after), found, inputs.before.names, inputs.retest)
        result = result._replace(retest=again)
    against = win_rate(judge, judge_answers(judge, first, inputs.control), first, inputs.control)
    return Judged(result, found, against)


def _findings(found: EvalParts, before: Answers, after: Answers, max_invalid: float) -> dict[str, Any]:
    baseline = reward_judge("longest", LENGTH_REWARDS["longest"])
    longest = win_rate(baseline, judge_answers(baseline, before, after), before, after)
    changed = sum(a != b for a, b in zip(before.texts, after.texts, strict=True))
    headlines = _headlines(found, 0 if changed else len(after.texts), max_invalid)
    return {
        "headline": headlines[0],
        "sentences": [headline.sentence for headline in headlines],
        "pairs": found.pairs,
        "best_of": found.best,
        "votes": found.votes,
        "winrates": [j.result for j in found.judged],
        "controls": {
            "reference_vs_reference": [j.control for j in found.judged],
            "longest": longest,
            "length": None if longest.rate is None else length_baseline(longest.rate, longest.interval),
        },
    }


def _headlines(found: EvalParts, unchanged: int, max_invalid: float) -> list[Headline]:
    """A headline for each part, the report's first: the first judge named, else people, else the held-out pairs."""
    headlines = [answers_headline(j.result, max_invalid) for j in found.judged]
    if found.votes is not None and found.votes.n:
        headlines.append(votes_headline(found.votes))
    if found.best is not None:
        headlines.append(best_of_k_headline(found.best))
    return [*headlines, pairs_headline(found.pairs, unchanged)]
