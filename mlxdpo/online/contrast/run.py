"""The story of pairs from two sources: all chosen answers, then the rejected ones to what is left, then the rows.

    OUT.partial          a line per answer, on the disk as it comes; a command that was stopped goes on from it
    OUT                  the pairs, whole or absent
    OUT's .samples.jsonl every answer, or why there is none (OUT.partial, when all is done)
    OUT's .report.json   what was asked, left out and paired, and the tokens of each source

One source after the other: a machine holds one model in memory, and a server need not swap two. A prompt whose chosen
answer cannot be used costs no rejected one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mlxdpo.data.read import prompt_key
from mlxdpo.io.atomic import append_line, write_json, write_text
from mlxdpo.io.json_file import json_lines, read_lines
from mlxdpo.io.settings import Section
from mlxdpo.io.staging import single_process
from mlxdpo.online.collect import rows
from mlxdpo.online.collect.run import collection_sentences, report_file, samples_file
from mlxdpo.online.contrast.sources import AnswerSource, SourceAnswer
from mlxdpo.online.partial_output import answer_missing, changed_setting
from mlxdpo.online.prompts import Asked, Prompts
from mlxdpo.types import Event, UserError

SIDES = ("chosen", "rejected")
SAME = "prompts whose two answers are nearly the same"
REFUSAL = "a refusal"
Opener = Callable[[], AnswerSource]
Row = dict[str, Any]


class AnswerSettings(Section):
    """How both sources are asked, and which answers are left out."""

    max_tokens: int = Field(default=512, ge=1)
    """Maximum answer length, tokens."""
    temperature: float = Field(default=0.7, ge=0)
    """Of sampling; 1 is the model itself, 0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that sum to this probability."""
    seed: int = Field(default=0, ge=0)
    """Noise of sampling; a server may not heed it."""
    batch_size: int = Field(default=16, ge=1)
    """Prompts that a model on this machine answers at once."""
    requests: int = Field(default=4, ge=1, le=256)
    """Requests to a server at the same time."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for an answer of a server."""
    unfinished: Literal["drop", "keep"] = "drop"
    """Answers cut off at max_tokens: drop or keep them."""
    refusals: Literal["drop", "keep"] = "drop"
    """Answers that decline in English ("I'm sorry, but I can't ..."): drop or keep them."""
    near: float = Field(default=0.9, gt=0, le=1)
    """Leave out a pair whose answers share this much of their word triples (Jaccard); 1: equal words."""


def contrast_sources(
    names: Mapping[str, str],
    openers: Mapping[str, Opener],
    prompts: Prompts,
    how: AnswerSettings,
    out: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Ask both sources the same prompts and pair their answers; yields "answered" now and then, at last "done" with
    the report, or "interrupted".

    `names` and `openers` have an entry for each of `SIDES`; a source is opened when its turn comes. Raises `UserError`
    when `out` is there already, was begun with other settings, or no prompt gives a pair.
    """
    partial = out.with_name(f"{out.name}.partial")
    if out.exists() and not partial.exists():
        raise UserError(f"{out} already exists; choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(_settings_of(names, prompts, how)))  # as it will be read back
    lock = out.with_name(f"{out.name}.lock")
    with single_process(lock, f"{partial}: another process is working on it; stop it first, or wait"):
        _check_begun(partial, identity)
        total, kept = 2 * len(prompts.asked), 0
        for side in SIDES:
            made, found = answers_in(partial)
            asked = _still_wanted(prompts.asked, found, side, how)
            before = 0 if side == "chosen" else len(prompts.asked)
            total = total if side == "chosen" else before + len(asked)
            stream = _ask_side(side, openers[side], asked, made.get(side), found[side], partial, should_stop)
            for event in stream:
                if event.kind == "interrupted":
                    yield event
                    return
                counts = {"done": before + event.values["done"], "total": total, "kept": kept + event.values["kept"]}
                yield Event("answered", event.step, counts)
            kept += len(found[side])
        report = write_contrast(partial, out, identity, prompts, how)
        lock.unlink()
    yield Event("done", report["rows"], {"file": out, "report": report})


def _settings_of(names: Mapping[str, str], prompts: Prompts, how: AnswerSettings) -> Row:
    """What the answers follow from. What is left out of them is decided at the end."""
    asking = how.model_dump(include={"max_tokens", "temperature", "top_p", "seed", "batch_size"})
    return {**{side: names[side] for side in SIDES}, "prompts": prompts.digest, "asking": asking}


def _check_begun(partial: Path, identity: Row) -> None:
    """Begin `partial`, or raise `UserError` naming the first setting that was another one."""
    then = next(read_lines(partial), None)
    if then is None:
        append_line(partial, {"identity": identity})
    elif changed := changed_setting(then["identity"], identity):
        raise UserError(
            f"{partial} was started with a different {changed}; restore it, remove the file, or choose another --out"
        )


def answers_in(partial: Path) -> tuple[dict[str, Any], dict[str, dict[str, Row]]]:
    """(what each source is, its answers by side and prompt id). Of failed requests only later successes count."""
    made, found = dict[str, Any](), {side: dict[str, Row]() for side in SIDES}
    for line in read_lines(partial):
        if "made" in line:
            made.setdefault(line["side"], line["made"])
        elif "prompt_id" in line and not line["failed"]:
            found[line["side"]][line["prompt_id"]] = line
    return made, found


def _still_wanted(
    asked: Sequence[Asked], found: Mapping[str, Mapping[str, Row]], side: str, how: AnswerSettings
) -> list[Asked]:
    """All prompts for the chosen side; for the rejected one those whose chosen answer can be used."""
    if side == "chosen":
        return list(asked)
    chosen = found["chosen"]
    keys = ((one, prompt_key(one.prompt).hex()) for one in asked)
    return [one for one, key in keys if key in chosen and not why_left_out(chosen[key], how)]


def _ask_side(
    side: str,
    opener: Opener,
    asked: Sequence[Asked],
    made: Any,
    found: Mapping[str, Row],
    partial: Path,
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    """Ask one source what it has not answered yet. Raises `UserError` where it is not what it was at the start."""
    done = set(found)
    if all(prompt_key(one.prompt).hex() in done for one in asked):
        return
    source = opener()
    own = json.loads(json.dumps(dict(source.made)))
    if made is None:
        append_line(partial, {"side": side, "made": own})
    elif changed := changed_setting(made, own):
        raise UserError(f"{partial}: its {side} answers are of another {changed}; choose another --out")

    def answer(chunk: Sequence[Asked]) -> Iterator[Row]:
        """Lines as the answers come."""
        wanted = chunk if source.whole else [one for one in chunk if prompt_key(one.prompt).hex() not in done]
        for one, got in source.answer(wanted, should_stop):
            yield answer_line(side, one, got)

    yield from answer_missing(asked, source.size, done, answer, partial, "answered")


def answer_line(side: str, one: Asked, got: SourceAnswer) -> Row:
    """The line of an answer in the partial output."""
    return {"side": side, "prompt_id": prompt_key(one.prompt).hex(), "where": one.where, **got._asdict()}


DECLINES = re.compile(
    r"\b(?:i|we)\s*(?:am|'m|’m|are|'re|’re)?\s*(?:really|very|so|truly)?\s*"
    r"(?:can\s?not|can['’]?t|could\s?n['’]t|won['’]?t|will not|would\s?n['’]t|unable to|not able to|not going to"
    r"|must decline to|have to decline to|do(?:n['’]t| not) feel comfortable|not comfortable)\s+"
    r"(?:\w+ly\s+|in good conscience\s+)?(?:to\s+|be able to\s+)?"
    r"(?:assist|help|provid|fulfil|compl|answer|respond|support|engage|creat|writ|generat|shar|discuss|giv|offer|do\b"
    r"|continue|participat|promot|produc|accommodat|satisf)",
    re.IGNORECASE,
)
FLAT = re.compile(
    r"^\W*(?:i['’]m |i am )?(?:very |so )?sorry,? (?:but )?(?:no\b|that['’]s not something)", re.IGNORECASE
)
BEGINNING = 200
"""Characters in which an answer that declines says so."""


def is_refusal(text: str) -> bool:
    """Whether an English answer declines to answer, by the words it begins with."""
    start = text.strip()[:BEGINNING]
    return bool(DECLINES.search(start) or FLAT.search(start))


def why_left_out(line: Mapping[str, Any], how: AnswerSettings) -> str:
    """Why an answer cannot stand in a pair; "" where it can."""
    if line["left_out"]:
        return line["left_out"]
    if line["finish"] == "length" and how.unfinished == "drop":
        return rows.UNFINISHED
    if not line["text"].strip():
        return rows.EMPTY
    return REFUSAL if how.refusals == "drop" and is_refusal(line["text"]) else ""


def write_contrast(partial: Path, out: Path, identity: Row, prompts: Prompts, how: AnswerSettings) -> Row:
    """Write report and rows, then rename `partial`. Done again after a kill in between, it writes the same.

    Raises `UserError` where no prompt gives a pair; the answers then wait in `partial` for other filters.
    """
    made, found = answers_in(partial)
    failed = _failed_lines(partial, found)
    pairs, answers_out, without = [], Counter[str](), Counter[str]()
    for one in prompts.asked:
        key = prompt_key(one.prompt).hex()
        both = [found[side].get(key) or failed[side].get(key) for side in SIDES]
        reasons = [f"{side}, {why_left_out(line, how)}" if line and why_left_out(line, how) else "" for side, line in
                   zip(SIDES, both, strict=True)]  # fmt: skip
        answers_out.update(filter(None, reasons))
        if any(reasons) or both[0] is None or both[1] is None:
            continue
        if _nearly_same(both[0]["text"], both[1]["text"], how.near):
            without[SAME] += 1
            continue
        pairs.append(_contrast_row(one, both[0], both[1]))
    report = {
        "prompts": len(prompts.asked),
        "prompts_left_out": prompts.left_out,
        "answers": sum(map(len, found.values())),
        "answers_left_out": dict(answers_out.most_common()),
        "prompts_without_pair": dict(without),
        "rows": len(pairs),
        "tokens": {side: _tokens_of(found[side].values()) for side in SIDES},
        "filters": how.model_dump(include={"unfinished", "refusals", "near"}),
        "identity": {**identity, "sources": made},
    }
    if not pairs:
        write_json(report_file(out), report)
        why = "; ".join(collection_sentences(report))
        raise UserError(f"{out}: no prompt gave a pair ({why}); the answers are in {partial.name}")
    by = {side: {"source": identity[side], **_in_rows(made[side])} for side in SIDES}
    turns = any(not isinstance(one.prompt, str) for one in prompts.asked)
    drawn = {"made": by | {name: identity["asking"][name] for name in ("max_tokens", "temperature", "top_p", "seed")}}
    text = json_lines(rows.written(row, turns) | drawn for row in pairs)
    write_json(report_file(out), report | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_text(out, text)
    partial.rename(samples_file(out))
    return report


def _failed_lines(partial: Path, found: Mapping[str, Mapping[str, Row]]) -> dict[str, dict[str, Row]]:
    """The last failure of each prompt that was never answered."""
    failed = {side: dict[str, Row]() for side in SIDES}
    for line in read_lines(partial):
        if line.get("failed") and line["prompt_id"] not in found[line["side"]]:
            failed[line["side"]][line["prompt_id"]] = line
    return failed


def _nearly_same(a: str, b: str, near: float) -> bool:
    return a.split() == b.split() or rows.jaccard(rows.grams(a), rows.grams(b)) >= near


def _contrast_row(one: Asked, chosen: Row, rejected: Row) -> Row:
    prompt = one.prompt if isinstance(one.prompt, str) else [turn.as_dict() for turn in one.prompt]
    row: Row = {"prompt": prompt, "chosen": chosen["text"], "rejected": rejected["text"]}
    if one.tools:
        row["tools"] = [dict(tool) for tool in one.tools]
    for part in ("finish", "tokens"):
        row |= {f"{part}_chosen": chosen[part], f"{part}_rejected": rejected[part]}
    return row


def _in_rows(made: Mapping[str, Any]) -> Row:
    """What a row says of a source: of a model its digest alone."""
    model = made.get("model")
    return {**made, "model": model["digest"]} if isinstance(model, Mapping) else dict(made)


def _tokens_of(lines: Any) -> dict[str, int]:
    """Tokens of prompts and answers, as far as the source counted them."""
    found = list(lines)
    count = lambda name: sum(line[name] or 0 for line in found)  # noqa: E731
    return {"prompt": count("prompt_tokens"), "completion": count("tokens")}


def contrast_sentences(report: Mapping[str, Any]) -> list[str]:
    """What was left out, and what each source used, in words with counts."""
    used = [
        f"{side}: {tokens['completion']:,} tokens answered to {tokens['prompt']:,} tokens of prompts"
        for side, tokens in report["tokens"].items()
        if tokens["completion"]
    ]
    return [*collection_sentences(report), *used]
