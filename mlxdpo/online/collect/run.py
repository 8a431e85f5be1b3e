"""The story of a collection: draw answers chunk by chunk, screen them, have them ranked, write pairs.

    OUT.partial          what is done so far, one line per prompt; a collection that was stopped goes on from it
    OUT                  the rows, whole or absent
    OUT's .samples.jsonl every answer with its score or the reason it was left out (OUT.partial, when all is done)
    OUT's .report.json   what was drawn, left out and paired, in numbers

A prompt's noise is a function of seed and prompt, and a chunk is drawn as a whole or not at all, so a collection that
was interrupted ends in the same bytes as one that was not.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import DataConfig, Drawing
from mlxdpo.data.encode import encode_prompt
from mlxdpo.data.read import prompt_key
from mlxdpo.data.template import template_digest, unwrap
from mlxdpo.inference.generate import Completion, finished
from mlxdpo.inference.trained_run import prompt_text
from mlxdpo.io.atomic import append_line
from mlxdpo.io.digest import folder_digest
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.adapters import load_run, load_start
from mlxdpo.model.policy import Policy
from mlxdpo.online.collect import screen
from mlxdpo.online.collect.write_outputs import write_collection
from mlxdpo.online.prompts import Asked, Prompts
from mlxdpo.runs import Run
from mlxdpo.types import Event, Text, UserError

CHUNKS_OF = 2  # times batch_size answers: enough that rows which end early make room, little to lose
Score = Callable[[Sequence[str], Sequence[Sequence[str]]], list[list[float]]]
"""(prompts, the answers to each) -> a number for each answer, higher is better; NaN where there is no verdict."""


class Ranker(NamedTuple):
    """Who ranks: a name, everything that can change a score, and the function."""

    name: str
    identity: Mapping[str, Any]
    score: Score


class PolicySource(NamedTuple):
    """Whose answers: a loaded policy, how its text is written, and what rows say of it (run, digests)."""

    policy: Policy
    data: DataConfig
    made: Mapping[str, Any]


def source_of(run: Run, before: bool = False) -> PolicySource:
    """A run's tuned model, or the one it started from."""
    policy, start = (load_start(run) if before else load_run(run)), run.config().model.adapter
    adapter = Path(start) if before and start else run.adapter
    return policy_source(policy, run.config().data, run.path.name, None if before and not start else adapter)


def policy_source(policy: Policy, data: DataConfig, name: str, adapter: Path | None) -> PolicySource:
    """A loaded policy as a source; `adapter` is the folder of the adapter it has, if any."""
    own = {name: policy.identity[name] for name in ("digest", "dtype", "quantization")}
    digest = None if adapter is None else folder_digest(adapter)
    made = {"run": name, "model": own, "adapter": digest, "template": template_digest(policy.tokenizer, data)}
    return PolicySource(policy, data, made)


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
        raise UserError(f"{out} is there already; choose another --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    identity = _identity(source, prompts, ranker, how)
    total = len(prompts.asked)
    with _alone(partial):
        done = _begun(partial, identity)
        for chunk in _chunks(prompts.asked, how):
            missing = [one for one in chunk if prompt_key(one.prompt).hex() not in done]
            if missing:
                lines = _answered(source, chunk, ranker, how, should_stop)
                if lines is None:
                    yield Event("interrupted", len(done), {"file": partial})
                    return
                for key in (prompt_key(one.prompt).hex() for one in missing):
                    append_line(partial, lines[key])
                    done.add(key)
            yield Event("collected", len(done), {"done": len(done), "total": total})
        report = write_collection(partial, out, identity, prompts, how)
    yield Event("done", total, {"file": out, "report": report})


def _identity(source: PolicySource, prompts: Prompts, ranker: Ranker, how: Drawing) -> dict[str, Any]:
    """What the answers and their scores follow from. Which of them make pairs does not matter here."""
    drawing = how.model_dump(exclude={"pairs", "margin", "judge", "unfinished"})
    keep = _keeps_unfinished(source, how)
    judge = {"name": ranker.name, **ranker.identity}
    found = {"source": dict(source.made), "prompts": prompts.digest, "judge": judge, "drawing": drawing, "keep": keep}
    return json.loads(json.dumps(found))  # as it will be read back


def _keeps_unfinished(source: PolicySource, how: Drawing) -> bool:
    return how.unfinished == "keep" or (how.unfinished == "auto" and source.data.eos == "leave")


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{partial}: another process is collecting into it; stop it first, or wait") from None
        yield


def _begun(partial: Path, identity: Mapping[str, Any]) -> set[str]:
    """The prompts that are done. Raises `UserError` naming the first setting that was another one."""
    lines = read_lines(partial)
    then = next(lines, None)
    if then is None:
        append_line(partial, {"identity": identity})
        return set()
    for name, now in identity.items():
        if then["identity"].get(name) != now:
            raise UserError(
                f"{partial} was begun with another {name} ({_differing(then['identity'].get(name), now)}); "
                f"put it back, remove the file, or choose another --out"
            )
    return {line["prompt_id"] for line in lines}


def _differing(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return ", ".join(f"{name} {then.get(name)} then, {now.get(name)} now" for name in names)
    return f"{then} then, {now} now"


def _chunks(asked: Sequence[Asked], how: Drawing) -> Iterator[Sequence[Asked]]:
    size = max(1, CHUNKS_OF * how.batch_size // how.samples)
    return (asked[at : at + size] for at in range(0, len(asked), size))


def _answered(
    source: PolicySource, chunk: Sequence[Asked], ranker: Ranker, how: Drawing, should_stop: Callable[[], bool]
) -> dict[str, dict[str, Any]] | None:
    """A line per prompt of the chunk, by the prompt's name; None when asked to stop."""
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
            screen.fault(text, c.tokens, c.finish == "stop", keep, special)
            for text, c in zip(own, completions, strict=True)
        ]
        texts.append(own)
        faults.append(screen.repeats(own, bad, how.near))
    usable = [[text for text, why in zip(*both, strict=True) if not why] for both in zip(texts, faults, strict=True)]
    scores = ranker.score([prompt_text(one.prompt) for one in chunk], usable)
    parts = zip(chunk, drawn, texts, faults, scores, strict=True)
    return {prompt_key(one.prompt).hex(): _sample_line(one, d, t, f, s) for one, d, t, f, s in parts}


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
            score, why = None, screen.UNJUDGED
        kept = {"text": text, "tokens": len(completion.tokens), "finish": completion.finish, "score": score}
        answers.append(kept | {"left_out": why})
    prompt = one.prompt if isinstance(one.prompt, str) else [turn.as_dict() for turn in one.prompt]
    said = {"prompt_id": prompt_key(one.prompt).hex(), "where": one.where, "prompt": prompt, "answers": answers}
    return said | ({"tools": [dict(tool) for tool in one.tools]} if one.tools else {})
