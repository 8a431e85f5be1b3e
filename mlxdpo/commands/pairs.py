"""`mlxdpo pairs --chosen SOURCE --rejected SOURCE --prompts FILE --out pairs.jsonl`"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from cyclopts import Parameter

from mlxdpo.config import DataConfig
from mlxdpo.io.names import is_loopback
from mlxdpo.online.contrast.run import AnswerSettings
from mlxdpo.types import Event, UserError

AS_IT_IS = AnswerSettings()
KEYS = {"chosen": "MLXDPO_CHOSEN_KEY", "rejected": "MLXDPO_REJECTED_KEY"}
RETRIES = 3  # requests for one answer after the first


def run(
    *,
    chosen: str,
    rejected: str,
    prompts: str,
    out: Path,
    asking: Annotated[AnswerSettings, Parameter(name="*")] = AS_IT_IS,
    json: bool = False,
) -> int:
    """Write preference pairs without a judge: chosen answers from one source, rejected ones from another.

    Use a slightly stronger model for chosen and a weaker one for rejected: the difference teaches, not the quality of
    chosen (delta learning, arXiv 2507.06187). The same command resumes after a stop; no answer is requested twice.

    Args:
        chosen: Source of the chosen answers: a model's folder or Hub id, smollm2, a run (RUN or RUN@STRENGTH), an
            OpenAI-compatible server (http://localhost:1234/v1#MODEL; its key in $MLXDPO_CHOSEN_KEY), or a file of
            answers.
        rejected: Source of the rejected answers, likewise; a key in $MLXDPO_REJECTED_KEY.
        prompts: Prompts that both answer: rows with a prompt, with or without answers; a data file, a folder or a Hub
            id.
        out: File of pairs, JSON lines.
        asking: How the sources are queried, and what is excluded.
        json: Print the report as JSON.
    """
    from mlxdpo.commands.collect import write_pairs
    from mlxdpo.online.contrast.run import contrast_sentences
    from mlxdpo.online.contrast.sources import is_answer_file

    names = {"chosen": chosen, "rejected": rejected}
    if chosen == rejected and not is_answer_file(chosen):
        raise UserError(f"--chosen and --rejected are both {chosen}; use two different sources")
    return write_pairs(
        lambda should_stop: _contrasting(names, prompts, asking, out, should_stop),
        "answered",
        lambda report: [f"{out}: {report['rows']} pairs of {report['prompts']} prompts", *contrast_sentences(report)],
        f"train on it: mlxdpo train --model ... --data {out}",
        json,
    )


def _contrasting(
    names: Mapping[str, str], prompts: str, how: AnswerSettings, out: Path, should_stop: Callable[[], bool]
) -> Iterator[Event]:
    from mlxdpo.online.contrast import contrast_sources
    from mlxdpo.online.prompts import read_prompts

    openers = {side: source_opener(name, side, how) for side, name in names.items()}
    return contrast_sources(names, openers, read_prompts(DataConfig(), prompts), how, out, should_stop)


def source_opener(name: str, side: str, how: AnswerSettings) -> Callable[[], Any]:
    """What opens a source when its turn comes. Raises `UserError` now where its name is wrong already."""
    from mlxdpo.online.contrast.sources import check_model, is_answer_file, open_file, open_model

    if name.startswith(("http://", "https://")):
        url, model = server_address(name, side)
        return partial(_open_server, _chat_client(model, url, side, how.timeout), side, how)
    if is_answer_file(name):
        source = open_file(name, side, DataConfig())
        return lambda: source
    check_model(name, side)
    return partial(open_model, name, side, how)


def server_address(name: str, side: str) -> tuple[str, str]:
    """(URL, model) of `URL#MODEL`. Raises `UserError` for another form, a key in the URL, and one sent in the clear."""
    url, _, model = name.partition("#")
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        parts, sound = urlsplit(""), False
    if not sound:
        raise UserError(f"--{side} {name}: no address; expected a server as http://localhost:1234/v1#MODEL")
    if parts.username or parts.password or parts.query:
        raise UserError(f"--{side}: do not put the key in the URL, because the URL is saved; set ${KEYS[side]}")
    if os.environ.get(KEYS[side]) and parts.scheme == "http" and not is_loopback(parts.hostname):
        raise UserError(f"--{side} {name}: ${KEYS[side]} would be sent to {parts.hostname} unencrypted; use https")
    if not model:
        raise UserError(f"--{side} {name}: name the model after #, such as {url.rstrip('/')}#{_first_model(url, side)}")
    return url.rstrip("/"), model


def _first_model(url: str, side: str) -> str:
    """A model that the server lists, or a placeholder."""
    return next(iter(_chat_client("", url, side, 5.0).models()), "MODEL")


def _chat_client(model: str, url: str, side: str, timeout: float) -> Any:
    """The client. Raises `UserError` where its library is not installed."""
    import importlib.util

    from mlxdpo_eval.judges.server import Server

    if importlib.util.find_spec("openai") is None:
        raise UserError(f"--{side} {url}: needs the openai client; install it: pip install 'mlxdpo[judges]'")
    return Server(model, url, timeout, RETRIES, key=KEYS[side])


def _open_server(server: Any, side: str, how: AnswerSettings) -> Any:
    from mlxdpo.online.contrast.chat_server import server_answers

    made = {"server": server.url, "model": server.model}
    name = f"--{side} {server.url}#{server.model}"
    return server_answers(name, made, partial(complete, server), server.model, how)


def complete(server: Any, body: Mapping[str, Any]) -> bytes:
    """The answer to one chat completion, as it came.

    Raises `RequestRefused` with the server's own words, and `NoAnswer` when none came, after a few tries.
    """
    from mlxdpo.online.contrast.chat_server import NoAnswer, RequestRefused
    from mlxdpo_eval.judges.server import Refused, Unanswered

    try:
        return server.complete(body)
    except Refused as error:
        raise RequestRefused(error.status, " ".join(filter(None, (error.words, error.parameter)))) from None
    except Unanswered as error:
        raise NoAnswer(str(error)) from None
