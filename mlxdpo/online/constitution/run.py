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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.data.template import template_digest
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import as_written, read_json, read_lines
from mlxdpo.io.lock import single_process
from mlxdpo.model.policy import Policy
from mlxdpo.online.collect import Asked, PolicySource, Prompts
from mlxdpo.online.constitution.conversations import PAIR_KINDS, ChatModel, Line, Stopped, labelled
from mlxdpo.online.constitution.schema import Constitution, SamplingSettings, dump_constitution
from mlxdpo.online.constitution.wording import COMPARED
from mlxdpo.online.constitution.write_outputs import PAIRS, TALKS, write_constitution_outputs
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
        raise UserError(f"{out} was begun with another {changed}; put it back, or choose another --out")
    with as_written(out / TALKS):
        return {line["prompt_id"] for line in read_lines(out / TALKS)}
