"""The story of a constitutional run: chunk by chunk, prompts become conversations, conversations become pairs.

DIR/constitution.yaml  the constitution as it was used
DIR/settings.json      what the rows follow from: model, prompts, constitution, sampling
DIR/talks.jsonl        a line per prompt: answer, critique, revision, comparison; a stopped run goes on from it
DIR/pairs.jsonl        the pairs, whole or absent
DIR/recipe.yaml        trains on them
DIR/report.json        what was made and left out, in numbers
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.data.template import template_digest
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import as_written, json_lines, read_json, read_lines
from mlxdpo.io.staging import single_process
from mlxdpo.io.words import counted
from mlxdpo.io.yaml_file import yaml_text
from mlxdpo.model.policy import Policy
from mlxdpo.online.collect import Asked, PolicySource, Prompts
from mlxdpo.online.constitution.conversations import PAIR_KINDS, ChatModel, Line, Stopped, labelled
from mlxdpo.online.constitution.schema import COMPARED, Constitution, SamplingSettings, dump_constitution
from mlxdpo.online.partial_output import LOCK, answer_missing, changed_setting
from mlxdpo.types import Event, UserError

SETTINGS, RULES = "settings.json", "constitution.yaml"
CHUNK = 16  # prompts between two writes: what an interruption may lose


class Feedback(NamedTuple):
    """The model that compares, by default the one that answers."""

    policy: Policy
    made: Mapping[str, Any]


def apply_constitution(
    source: PolicySource,
    prompts: Prompts,
    rules: Constitution,
    how: SamplingSettings,
    out: Path,
    feedback: Feedback | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Answer, criticise, revise (or answer twice), compare, pair. Yields "talked" after each chunk, then "done" with
    the report, or "interrupted".

    Raises `UserError` when `out` was begun with other settings, and when no prompt gives a pair.
    """
    judge = feedback.policy if feedback else source.policy
    identity = _constitution_identity(source, prompts, rules, how, feedback)
    out.mkdir(parents=True, exist_ok=True)
    chat = ChatModel(source, how, should_stop)

    def answer(chunk: Sequence[Asked]) -> list[Line] | None:
        """The lines of a chunk; None when asked to stop."""
        try:
            return _conversation_lines(chat, chunk, rules, judge)
        except Stopped:
            return None

    with single_process(out / LOCK, f"{out}: another process is working in it; stop it first, or wait"):
        done = _begun_folder(out, identity, rules)
        if not (yield from answer_missing(prompts.asked, CHUNK, done, answer, out / TALKS, "talked")):
            return
        report = write_constitution_outputs(out, identity, prompts.left_out, how)
    yield Event("done", len(done), {"file": out / PAIRS, "report": report})


def _conversation_lines(chat: ChatModel, chunk: Sequence[Asked], rules: Constitution, judge: Policy) -> list[Line]:
    how = chat.how
    make, *sides = PAIR_KINDS[how.pairs]
    lines = make(chat, chunk, rules)
    if how.labels == "soft":
        labelled(lines, (sides[0], sides[1]), chat.source, judge, rules)
    sampling = how.model_dump(include={"seed", "temperature", "top_p", "max_tokens", "critique_tokens"})
    return [line | {"sampling": sampling} for line in lines]


def _constitution_identity(
    source: PolicySource, prompts: Prompts, rules: Constitution, how: SamplingSettings, feedback: Feedback | None
) -> dict[str, Any]:
    """What the lines follow from."""
    comparing = (
        {**feedback.made, "template": template_digest(feedback.policy.tokenizer, source.data)} if feedback else {}
    )
    found = {
        "source": dict(source.made),
        "feedback": comparing | {"wording": hashlib.sha256(COMPARED.encode()).hexdigest()},
        "prompts": prompts.digest,
        "constitution": rules.digest,
        "asking": how.model_dump(),
    }
    return json.loads(json.dumps(found))  # as it will be read back


def _begun_folder(out: Path, identity: Mapping[str, Any], rules: Constitution) -> set[str]:
    """The prompts that are done. Raises `UserError` naming the first setting that was another one."""
    file = out / SETTINGS
    if not file.exists():
        if left := sorted(path.name for path in out.iterdir() if path.name != LOCK):
            raise UserError(f"{out} holds {left[0]} already; choose an empty or new folder for --out")
        write_text(out / RULES, dump_constitution(rules))
        write_json(file, identity)
        return set()
    if changed := changed_setting(read_json(file), identity):
        raise UserError(f"{out} was started with a different {changed}; restore it, or choose another --out")
    with as_written(out / TALKS):
        return {line["prompt_id"] for line in read_lines(out / TALKS)}


PAIRS, TALKS, REPORT, RECIPE = "pairs.jsonl", "talks.jsonl", "report.json", "recipe.yaml"
UNDECIDED = "the principles are tied"


def write_constitution_outputs(
    out: Path, identity: Mapping[str, Any], left_out: Mapping[str, int], how: SamplingSettings
) -> dict[str, Any]:
    """Write report, recipe and pairs from the conversations; done again, it writes the same.

    Raises `UserError` where no conversation gives a pair.
    """
    lines = list(read_lines(out / TALKS))
    reasons = Counter(why for line in lines if (why := _why_none(line, how)))
    rows = [pair_of(line, identity, how) for line in lines if not _why_none(line, how)]
    labels = [line["probability"] for line in lines if line.get("probability") is not None]
    report = {
        "pairs": how.pairs,
        "prompts": len(lines),
        "prompts_left_out": dict(left_out),
        "left_out": dict(reasons.most_common()),
        "rows": len(rows),
        "critiques_cut": sum(line.get("critique", {}).get("finish") == "length" for line in lines),
        "principles": dict(Counter(line["principle"] for line in lines if "principle" in line).most_common()),
        "labels": _summary(labels),
        "position": label_position_bias(lines),
        "identity": identity,
    }
    write_json(out / REPORT, report)
    if not rows:
        why = "; ".join(constitution_sentences(report))
        raise UserError(f"{out}: no prompt gave a pair ({why}); see the conversations in {TALKS}")
    write_text(out / RECIPE, recipe(out, identity, how))
    write_text(out / PAIRS, json_lines(rows))
    return report


def pair_of(line: Mapping[str, Any], identity: Mapping[str, Any], how: SamplingSettings) -> dict[str, Any]:
    """The row of a conversation. `probability` is that chosen is better: of samples at least one half."""
    sides, p = list(PAIR_KINDS[how.pairs][1:]), line.get("probability")
    flipped = how.pairs == "samples" and p is not None and p < 0.5
    if flipped:
        sides.reverse()
    chosen, rejected = (line[side]["text"] for side in sides)
    row = {"prompt": line["prompt"], "chosen": chosen, "rejected": rejected}
    row |= {name: line[name] for name in ("tools", "principle", "prompt_id") if name in line}
    if p is not None:
        votes = {name: vote["probability"] for name, vote in line["votes"].items()}
        row |= {"probability": 1 - p if flipped else p}
        row |= {"by_principle": {name: 1 - q if flipped else q for name, q in votes.items()}}
    source = identity["source"]
    made = {**source, "model": source["model"]["digest"], "constitution": identity["constitution"][:16]}
    return row | {"made": made | line["sampling"]}


def _why_none(line: Mapping[str, Any], how: SamplingSettings) -> str:
    undecided = how.pairs == "samples" and line.get("probability") == 0.5
    return line["left_out"] or (UNDECIDED if undecided else "")


def recipe(out: Path, identity: Mapping[str, Any], how: SamplingSettings) -> str:
    """A recipe for the pairs. Of two samples the label is all that is known, so their probability is read; a revision
    is better by the way it was made (arXiv 2212.08073 section 3.1), whatever the label says."""
    data: dict[str, Any] = {"path": str(out / PAIRS)}
    if how.pairs == "samples":
        data["columns"] = {"probability": "probability"}
    return yaml_text({"data": data})


def constitution_sentences(report: Mapping[str, Any]) -> list[str]:
    """What was left out, and what the labels look like, in words with counts."""
    lines = [f"{counted(count, 'prompt')} left out: {why}" for why, count in report["prompts_left_out"].items()]
    lines += [f"{count} without a pair: {why}" for why, count in report["left_out"].items()]
    if report["critiques_cut"]:
        lines.append(f"{report['critiques_cut']} critiques cut off at critique_tokens")
    if (labels := report["labels"]) and report["pairs"] == "revisions":
        lines.append(f"by its own labels {labels['above_half']} of {labels['count']} revisions are the better answer")
    if labels and (place := report["position"]):
        lines.append(
            f"mean label {labels['mean']:.3f}; bias towards the first answer {place['bias']:+.2f} logits, "
            f"the same answer preferred in both orders {place['consistent']:.0%}"
        )
    return lines


def label_position_bias(lines: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """How much comparisons depend on the order: `bias`, the mean log-odds for whatever is shown as A, and the share of
    comparisons that prefer the same answer in both orders."""
    votes = [vote for line in lines for vote in line.get("votes", {}).values()]
    if not votes:
        return None
    both = [(vote["shown_first"], vote["shown_second"]) for vote in votes]
    bias = sum((a - b) / 2 for a, b in both) / len(both)
    return {"bias": bias, "consistent": sum(a * b > 0 for a, b in both) / len(both), "comparisons": len(both)}


def _summary(labels: Sequence[float]) -> dict[str, Any] | None:
    if not labels:
        return None
    spread = {"least": min(labels), "most": max(labels), "mean": sum(labels) / len(labels)}
    return {"count": len(labels), "above_half": sum(p > 0.5 for p in labels), **spread}
