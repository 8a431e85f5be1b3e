"""The story of a constitutional run: chunk by chunk, prompts become conversations, conversations become pairs.

DIR/constitution.yaml  the constitution as it was used
DIR/settings.json      what the rows follow from: model, prompts, constitution, sampling
DIR/talks.jsonl        a line per prompt: answer, critique, revision, comparison; a stopped run goes on from it
DIR/pairs.jsonl        the pairs, whole or absent
DIR/recipe.yaml        trains on them
DIR/report.json        what was made and left out, in numbers
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.data.read import prompt_key
from mlxdpo.data.template import template_digest
from mlxdpo.io.atomic import append_line, write_json, write_text
from mlxdpo.io.json_file import as_written, read_json, read_lines
from mlxdpo.model.policy import Policy
from mlxdpo.online.collect import Asked, PolicySource, Prompts
from mlxdpo.online.constitution.conversations import WAYS, Line, Stopped, Talker, labelled
from mlxdpo.online.constitution.schema import Constitution, dump_constitution
from mlxdpo.online.constitution.settings import SamplingSettings
from mlxdpo.online.constitution.wording import COMPARED
from mlxdpo.online.constitution.write_outputs import PAIRS, REPORT, TALKS, write_constitution_outputs
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
    with _alone(out):
        done = _begun(out, identity, rules)
        talker = Talker(source, how, should_stop)
        for chunk in (prompts.asked[at : at + CHUNK] for at in range(0, len(prompts.asked), CHUNK)):
            missing = [key for one in chunk if (key := prompt_key(one.prompt).hex()) not in done]
            if missing:
                try:
                    lines = _conversation_lines(talker, chunk, rules, judge)
                except Stopped:
                    yield Event("interrupted", len(done), {"file": out / TALKS})
                    return
                for line in lines:
                    if line["prompt_id"] in missing:
                        append_line(out / TALKS, line)
                done |= set(missing)
            yield Event("talked", len(done), {"done": len(done), "total": len(prompts.asked)})
        report = write_constitution_outputs(out, identity, prompts.left_out, how)
    yield Event("done", len(done), {"file": out / PAIRS, "report": report, "said": out / REPORT})


def _conversation_lines(talker: Talker, chunk: Sequence[Asked], rules: Constitution, judge: Policy) -> list[Line]:
    how = talker.how
    make, *sides = WAYS[how.pairs]
    lines = make(talker, chunk, rules)
    if how.labels == "soft":
        labelled(lines, (sides[0], sides[1]), talker.source, judge, rules)
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


def _begun(out: Path, identity: Mapping[str, Any], rules: Constitution) -> set[str]:
    """The prompts that are done. Raises `UserError` naming the first setting that was another one."""
    file = out / SETTINGS
    if not file.exists():
        if left := sorted(path.name for path in out.iterdir() if path.name != LOCK):
            raise UserError(f"{out} holds {left[0]} already; choose an empty or new folder for --out")
        write_text(out / RULES, dump_constitution(rules))
        write_json(file, identity)
        return set()
    then = read_json(file)
    for name, now in identity.items():
        if then.get(name) != now:
            raise UserError(f"{out} was begun with {_differing(name, then.get(name), now)}; choose another --out")
    with as_written(out / TALKS):
        return {line["prompt_id"] for line in read_lines(out / TALKS)}


def _differing(name: str, then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        names = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        return ", ".join(f"{name} {key} {_short(then.get(key))}, now {_short(now.get(key))}" for key in names)
    return f"another {name} ({_short(then)}, now {_short(now)})"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


LOCK = ".lock"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    with (out / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is working in it; stop it first, or wait") from None
        yield
