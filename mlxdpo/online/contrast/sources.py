"""Who answers: a model on this machine, or a file of answers. (`chat_server`: a server.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, DataConfig
from mlxdpo.data.encode import encode_prompt
from mlxdpo.data.read import prompt_key, read_preferences
from mlxdpo.data.sources import READERS
from mlxdpo.inference.generate import finished
from mlxdpo.inference.mixtures import run_at
from mlxdpo.inference.run_prompts import text_of
from mlxdpo.io.digest import file_digest
from mlxdpo.io.names import is_hub_id
from mlxdpo.model.strength import check_strength
from mlxdpo.online.collect import rows
from mlxdpo.online.collect.run import continued, is_plain
from mlxdpo.online.prompts import Asked, PolicySource, source_of, start_source
from mlxdpo.runs import Run
from mlxdpo.types import Preference, UserError

NOT_IN_FILE = "no answer to the prompt in the file"
ShouldStop = Callable[[], bool]


class SourceAnswer(NamedTuple):
    """An answer. `finish` is "stop", "length" or "" where nobody knows; tokens are None where the source counts none;
    `left_out` says why it cannot stand in a pair, `failed` that the source gave none and may be asked again."""

    text: str = ""
    finish: str = ""
    tokens: int | None = None
    prompt_tokens: int | None = None
    left_out: str = ""
    failed: bool = False


class AnswerSource(NamedTuple):
    """Who answers, opened.

    made    what its answers follow from: digests of model, adapter and template, or address and model, or a file's
            digest
    size    prompts that are answered at once
    whole   whether a chunk has to be answered as a whole for an answer to be the same again
    answer  the answers to some prompts, as they come; it ends early when asked to stop
    """

    made: Mapping[str, Any]
    size: int
    whole: bool
    answer: Callable[[Sequence[Asked], ShouldStop], Iterator[tuple[Asked, SourceAnswer]]]


def is_answer_file(name: str) -> bool:
    """Whether a source is named like a file of rows."""
    return Path(name.removesuffix(".gz")).suffix in READERS


def open_file(file: str, side: str, data: DataConfig) -> AnswerSource:
    """Answers that a file holds: of rows with one answer that one, of pairs the one called `side`. The first answer to
    a prompt counts.

    Raises `UserError` for a file that is not there, and at its first bad row where `data.on_bad_row` is stop.
    """
    if not Path(file).is_file():
        raise UserError(f"--{side} {file}: there is no such file")
    found, _ = read_preferences(data.model_copy(update={"columns": {}, "format": "auto"}), file)
    texts: dict[bytes, str] = {}
    for row in found:
        said = getattr(row, side) if isinstance(row, Preference) else row.completion
        texts.setdefault(prompt_key(row.prompt), text_of(said))

    def answer(chunk: Sequence[Asked], should_stop: ShouldStop) -> Iterator[tuple[Asked, SourceAnswer]]:
        """The answers that the file has."""
        for one in chunk:
            text = texts.get(prompt_key(one.prompt))
            yield one, SourceAnswer(left_out=NOT_IN_FILE) if text is None else SourceAnswer(text)

    return AnswerSource({"file": Path(file).name, "sha256": file_digest(Path(file))}, 1_000, False, answer)


def check_model(name: str, side: str) -> tuple[str, float]:
    """(path or id, strength) of `MODEL` or `RUN@STRENGTH`, checked as far as can be without loading anything.

    Raises `UserError` for what is no folder, no id and no `smollm2`, and for a strength of what is no run.
    """
    path, at, tail = name.rpartition("@")
    if not at:
        path, tail = name, "1"
    try:
        strength = float(tail)
    except ValueError:
        raise UserError(
            f"--{side} {name}: {tail!r} is not a strength; expected RUN@0.5, or a model without @"
        ) from None
    check_strength(strength)
    if at and not is_run(path):
        raise UserError(f"--{side} {name}: only a run has a strength, and {path} is not a run; drop @{tail}")
    if not (path == "smollm2" or Path(path).is_dir() or is_hub_id(path)):
        raise UserError(
            f"--{side} {name}: not a folder, a Hub id or a file of answers; expected a model's folder or id, a run, "
            f"smollm2, a file such as answers.jsonl, or a server as http://localhost:1234/v1#MODEL"
        )
    return path, strength


def is_run(path: str) -> bool:
    """Whether a folder is a run directory."""
    return (Path(path) / "config.yaml").is_file()


def open_model(name: str, side: str, how: Any) -> AnswerSource:
    """A model of this machine, loaded; `how` are `AnswerSettings`. Raises `UserError` as `check_model` and loading."""
    path, strength = check_model(name, side)
    if is_run(path):
        source = source_of(run_at(Run.open(path), strength)) if strength else source_of(Run.open(path), before=True)
    else:
        source = start_source(Config.model_validate({"model": path}), Path(path).name)
    return policy_answers(source, how, {"strength": strength} if is_run(path) else {})


def policy_answers(source: PolicySource, how: Any, more: Mapping[str, Any]) -> AnswerSource:
    """A loaded policy as a source of answers; `more` stands beside what is said of it."""
    policy, data = source.policy, source.data
    special = frozenset(policy.tokenizer.all_special_ids)

    def answer(chunk: Sequence[Asked], should_stop: ShouldStop) -> Iterator[tuple[Asked, SourceAnswer]]:
        """Drawn by the policy, with noise that belongs to seed and prompt."""
        ids = [encode_prompt(one.prompt, policy.tokenizer, data, one.tools).tolist() for one in chunk]
        stream = finished(
            policy.model,
            ids,
            max_tokens=how.max_tokens,
            eos_ids=policy.eos_ids,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
            batch_size=how.batch_size,
        )
        for place, drawn in stream:
            if should_stop():
                return
            one = chunk[place]
            before = ids[place] if is_plain(one.prompt, policy.tokenizer, data) else []
            text = continued(policy.tokenizer, before, drawn.tokens)
            why = rows.fault(text, drawn.tokens, True, True, special)
            yield one, SourceAnswer(text, drawn.finish, len(drawn.tokens), len(ids[place]), why)

    return AnswerSource({**source.made, **more}, 2 * how.batch_size, True, answer)
