"""The story of a collection: draw answers chunk by chunk, screen them, have them ranked, write pairs.

    OUT.partial          what is done so far, one line per prompt; a collection that was stopped goes on from it
    OUT                  the rows, whole or absent
    OUT's .samples.jsonl every answer with its score or the reason it was left out (OUT.partial, when all is done)
    OUT's .report.json   what was drawn, left out and paired, in numbers

A prompt's noise is a function of seed and prompt, and a chunk is drawn as a whole or not at all, so a collection that
was interrupted ends in the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import DataConfig, Drawing
from mlxdpo.data.encode import encode_prompt
from mlxdpo.data.read import prompt_key
from mlxdpo.data.template import unwrap
from mlxdpo.inference.generate import Completion, finished
from mlxdpo.inference.trained_run import prompt_text
from mlxdpo.io.atomic import append_line, write_json, write_text
from mlxdpo.io.json_file import json_lines, read_lines
from mlxdpo.io.staging import single_process
from mlxdpo.model.policy import Policy
from mlxdpo.online.collect import rows
from mlxdpo.online.collect.rows import made_of, pair_rows, written
from mlxdpo.online.partial_output import answer_missing, changed_setting
from mlxdpo.online.prompts import Asked, PolicySource, Prompts
from mlxdpo.types import Event, Text, UserError

CHUNKS_OF = 2  # times batch_size answers: enough that rows which end early make room, little to lose
Score = Callable[[Sequence[str], Sequence[Sequence[str]]], list[list[float]]]
"""(prompts, the answers to each) -> a number for each answer, higher is better; NaN where there is no verdict."""


class Ranker(NamedTuple):
    """Who ranks: a name, everything that can change a score, and the function."""

    name: str
    identity: Mapping[str, Any]
    score: Score


def collect(
    source: PolicySource,
    prompts: Prompts,
    ranker: Ranker,
    how: Drawing,
    out: Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Draw, rank and pair; yields "collected" after each chunk, then "done" with the report, or "interrupted".

    Raises `UserError` when `out` is there already, was begun with other settings, or no prompt gives a pair.
    """
    partial = out.with_name(f"{out.name}.partial")
    if out.exists() and not partial.exists():
        raise UserError(f"{out} already exists; choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    identity = _identity(source, prompts, ranker, how)
    size = max(1, CHUNKS_OF * how.batch_size // how.samples)

    def answer(chunk: Sequence[Asked]) -> list[dict[str, Any]] | None:
        """The lines of a chunk; None when asked to stop."""
        return _answered(source, chunk, ranker, how, should_stop)

    lock = out.with_name(f"{out.name}.lock")
    with single_process(lock, f"{partial}: another process is collecting into it; stop it first, or wait"):
        done = _begun(partial, identity)
        if not (yield from answer_missing(prompts.asked, size, done, answer, partial, "collected")):
            return
        report = write_collection(partial, out, identity, prompts, how)
        lock.unlink()
    yield Event("done", len(done), {"file": out, "report": report})


def _identity(source: PolicySource, prompts: Prompts, ranker: Ranker, how: Drawing) -> dict[str, Any]:
    """What the answers and their scores follow from. Which of them make pairs does not matter here."""
    drawing = how.model_dump(exclude={"pairs", "margin", "judge", "unfinished"})
    keep = _keeps_unfinished(source, how)
    judge = {"name": ranker.name, **ranker.identity}
    found = {"source": dict(source.made), "prompts": prompts.digest, "judge": judge, "drawing": drawing, "keep": keep}
    return json.loads(json.dumps(found))  # as it will be read back


def _keeps_unfinished(source: PolicySource, how: Drawing) -> bool:
    return how.unfinished == "keep" or (how.unfinished == "auto" and source.data.eos == "leave")


def _begun(partial: Path, identity: Mapping[str, Any]) -> set[str]:
    """The prompts that are done. Raises `UserError` naming the first setting that was another one."""
    lines = read_lines(partial)
    then = next(lines, None)
    if then is None:
        append_line(partial, {"identity": identity})
        return set()
    if changed := changed_setting(then["identity"], identity):
        raise UserError(
            f"{partial} was started with a different {changed}; restore it, remove the file, or choose another --out"
        )
    return {line["prompt_id"] for line in lines}


def _answered(
    source: PolicySource, chunk: Sequence[Asked], ranker: Ranker, how: Drawing, should_stop: Callable[[], bool]
) -> list[dict[str, Any]] | None:
    """A line per prompt of the chunk; None when asked to stop."""
    policy, keep = source.policy, _keeps_unfinished(source, how)
    ids = [encode_prompt(one.prompt, policy.tokenizer, source.data, one.tools).tolist() for one in chunk]
    drawn = _draw_answers(policy, ids, how, should_stop)
    if drawn is None:
        return None
    special, texts, faults = frozenset(policy.tokenizer.all_special_ids), [], []
    for one, prompt, completions in zip(chunk, ids, drawn, strict=True):
        before = prompt if is_plain(one.prompt, policy.tokenizer, source.data) else []
        own = [continued(policy.tokenizer, before, c.tokens) for c in completions]
        bad = [
            rows.fault(text, c.tokens, c.finish == "stop", keep, special)
            for text, c in zip(own, completions, strict=True)
        ]
        texts.append(own)
        faults.append(rows.repeats(own, bad, how.near))
    usable = [[text for text, why in zip(*both, strict=True) if not why] for both in zip(texts, faults, strict=True)]
    scores = ranker.score([prompt_text(one.prompt) for one in chunk], usable)
    parts = zip(chunk, drawn, texts, faults, scores, strict=True)
    return [_sample_line(*part) for part in parts]


def is_plain(prompt: Text, tokenizer: Any, data: DataConfig) -> bool:
    """Whether a prompt is continued as it stands, without a chat turn."""
    chats = data.template == "chat" or (data.template == "auto" and bool(unwrap(tokenizer).chat_template))
    return isinstance(prompt, str) and not chats


def continued(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of `tokens` behind the tokens `before`: some tokenizers take the space off the first word of a text,
    and a continuation without it would grow into the last word of its prompt."""
    whole, start = tokenizer.decode([*before, *tokens]), tokenizer.decode([*before])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode([*tokens])


def _draw_answers(
    policy: Policy, ids: Sequence[list[int]], how: Drawing, should_stop: Callable[[], bool]
) -> list[list[Completion]] | None:
    stream = finished(
        policy.model,
        [one for one in ids for _ in range(how.samples)],
        max_tokens=how.max_tokens,
        eos_ids=policy.eos_ids,
        temperature=how.temperature,
        top_p=how.top_p,
        seed=how.seed,
        batch_size=how.batch_size,
    )
    found: dict[int, Completion] = {}
    for place, completion in stream:
        if should_stop():
            return None
        found[place] = completion
    return [[found[k * how.samples + i] for i in range(how.samples)] for k in range(len(ids))]


def _sample_line(
    one: Asked, drawn: Sequence[Completion], texts: Sequence[str], faults: Sequence[str], scores: Sequence[float]
) -> dict[str, Any]:
    given = iter(scores)
    answers = []
    for completion, text, why in zip(drawn, texts, faults, strict=True):
        score = None if why else next(given)
        if score is not None and score != score:
            score, why = None, rows.UNJUDGED
        kept = {"text": text, "tokens": len(completion.tokens), "finish": completion.finish, "score": score}
        answers.append(kept | {"left_out": why})
    prompt = one.prompt if isinstance(one.prompt, str) else [turn.as_dict() for turn in one.prompt]
    line = {"prompt_id": prompt_key(one.prompt).hex(), "where": one.where, "prompt": prompt, "answers": answers}
    return line | ({"tools": [dict(tool) for tool in one.tools]} if one.tools else {})


Lines = Sequence[Mapping[str, Any]]


def report_file(out: Path) -> Path:
    """Where the report on the rows in `out` stands."""
    return out.with_name(f"{out.stem}.report.json")


def samples_file(out: Path) -> Path:
    """Where every answer behind the rows in `out` stands."""
    return out.with_name(f"{out.stem}.samples.jsonl")


def write_collection(
    partial: Path, out: Path, identity: Mapping[str, Any], prompts: Prompts, how: Drawing
) -> dict[str, Any]:
    """Write report and rows, then rename `partial`. Done again after a kill in between, it writes the same.

    Raises `UserError` where no prompt gives a pair; the answers then wait in `partial` for another rule.
    """
    lines = list(read_lines(partial))[1:]
    found = [pair_rows(line, how) for line in lines]
    rows = [row for own, _ in found for row in own]
    none = Counter(why for _, why in found if why)
    report = {
        "prompts": len(lines),
        "prompts_left_out": prompts.left_out,
        "prompts_without_pair": dict(none.most_common()),
        "answers": sum(len(line["answers"]) for line in lines),
        "answers_left_out": dict(Counter(a["left_out"] for a in _all_answers(lines) if a["left_out"]).most_common()),
        "mean_score": _mean_score([a["score"] for a in _all_answers(lines) if a["score"] is not None]),
        "rows": len(rows),
        "pairs": how.pairs,
        "margin": how.margin,
        "identity": identity,
    }
    if not rows:
        write_json(report_file(out), report)
        why = "; ".join(collection_sentences(report))
        raise UserError(f"{out}: no prompt gave a pair ({why}); the answers are in {partial.name}")
    made, turns = made_of(identity), any(not isinstance(one.prompt, str) for one in prompts.asked)
    text = json_lines(written(row, turns) | {"made": made} for row in rows)
    write_json(report_file(out), report | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_text(out, text)
    partial.rename(samples_file(out))
    return report


def collection_sentences(report: Mapping[str, Any]) -> list[str]:
    """What was left out, in words with counts."""
    parts = ("prompts_left_out", "answers_left_out", "prompts_without_pair")
    nouns = {"answers_left_out": "answers: "}
    return [f"{count} {nouns.get(part, '')}{why}" for part in parts for why, count in report[part].items()]


def _all_answers(lines: Lines) -> Iterator[Mapping[str, Any]]:
    return (answer for line in lines for answer in line["answers"])


def _mean_score(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None
