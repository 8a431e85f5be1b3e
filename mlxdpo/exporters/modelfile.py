"""Ollama: a Modelfile with the template in its language, the ends of turns, and weights or the adapter alone.

`parse_modelfile` reads a Modelfile back by Ollama's published rules, for the gate: what is not read as it was meant
stops the export.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.nn as nn

from mlxdpo.data.template import Writer, probe
from mlxdpo.exporters import gguf
from mlxdpo.exporters.go_template import TurnTemplate, go_template, learn_template
from mlxdpo.exporters.source import ExportSource
from mlxdpo.types import Message, UserError

MODELFILE = "Modelfile"
TOOL = "ollama"
INSTRUCTIONS = ("from", "license", "template", "system", "adapter", "parameter", "message", "requires")


class Instruction(NamedTuple):
    """One line of a Modelfile: `name` (of a PARAMETER its own), and its unquoted value."""

    name: str
    value: str


def writer_of(source: ExportSource) -> Writer:
    """The run's chat template, with the settings that it was trained under."""
    policy = source.trained.policy
    return probe(policy.tokenizer, source.trained.config.data, policy.eos_ids)


def turn_template(source: ExportSource) -> TurnTemplate:
    """What the run's chat template puts around turns. Raises `UserError` where it has none, or does more."""
    writer = writer_of(source)
    if not writer.chat or source.trained.config.data.template == "plain":
        raise UserError("ollama: the run was trained without a chat template; export --to gguf")
    return without_bos(learn_template(partial(_rendered_prompt, writer)), writer)


def _rendered_prompt(writer: Writer, turns: Sequence[Message]) -> str:
    return writer.render(turns, (), generate=True)


def without_bos(template: TurnTemplate, writer: Writer) -> TurnTemplate:
    """The template without the token that llama.cpp puts before every prompt by itself."""
    bos = writer.tokenizer.decode(list(writer.start)) if writer.start else ""
    system = template.system and (template.system[0].removeprefix(bos), template.system[1])
    start, user = template.start, template.user
    if bos and start.startswith(bos):
        return template._replace(start=start.removeprefix(bos), system=system)
    return template._replace(system=system, user=user)


def stop_texts(source: ExportSource) -> list[str]:
    """The tokens that end an answer, as text: what training taught, and the base's own."""
    writer = writer_of(source)
    ends = sorted(writer.ends | source.trained.policy.eos_ids)
    return [text for text in writer.tokenizer.convert_ids_to_tokens(ends) if text]


def refuse_ollama(source: ExportSource) -> None:
    """Raise `UserError` for a run that Ollama cannot have: its template, its family, or the tool when it is asked."""
    turn_template(source)
    (gguf.refuse_lora if source.choices.ollama_base else gguf.refuse_gguf)(source)


def write_ollama(source: ExportSource, folder: Path) -> str | None:
    """Write the weights (or with `--ollama-base` the adapter alone) and the Modelfile beside them."""
    base = source.choices.ollama_base
    note = gguf.write_lora(source, folder) if base else gguf.write_gguf(source, folder)
    template = turn_template(source)
    weights = [f"FROM {base}", f"ADAPTER ./{gguf.LORA_FILE}"] if base else [f"FROM ./{gguf.FILE}"]
    text = modelfile(weights, template, stop_texts(source))
    (folder / MODELFILE).write_text(text, "utf-8")
    check_modelfile(text, template, stop_texts(source))
    return f"{note}; not asked: files read back by Ollama's rules" + (
        "; contents are not trimmed" if template.trims else ""
    )


def modelfile(weights: Sequence[str], template: TurnTemplate, stops: Sequence[str]) -> str:
    """The text of a Modelfile."""
    lines = [*weights, f'TEMPLATE """{go_template(template)}"""', *(f'PARAMETER stop "{text}"' for text in stops)]
    return "\n".join(lines) + "\n"


def check_modelfile(text: str, template: TurnTemplate, stops: Sequence[str]) -> None:
    """Raise `UserError` when Ollama would read something else than was written."""
    read = parse_modelfile(text)
    named = {one.name: one.value for one in read}
    if named.get("template") != go_template(template) or [one.value for one in read if one.name == "stop"] != [*stops]:
        raise UserError("ollama: the template or a stop token cannot be written into a Modelfile; export --to gguf")


def parse_modelfile(text: str) -> list[Instruction]:
    """Read a Modelfile as Ollama does (its parser's rules: comments, quotes, three quotes over lines; unprintable
    characters besides line ends and tabs are dropped). Raises `UserError` for what Ollama refuses."""
    text = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
    found, rest = [], text
    while rest := rest.lstrip(" \t\n"):
        if rest.startswith("#"):
            rest = rest.partition("\n")[2]
            continue
        head = re.match(r"([A-Za-z]+)[ \t]+", rest)
        name = head[1].lower() if head else ""
        if head is None or name not in INSTRUCTIONS:
            raise UserError(f"Modelfile: {rest.splitlines()[0][:40]!r} is not an instruction")
        rest = rest[head.end() :]
        if name == "parameter":
            parameter = re.match(r"([A-Za-z0-9_]+)[ \t]+", rest)
            if parameter is None:
                raise UserError("Modelfile: PARAMETER without a name")
            name, rest = parameter[1], rest[parameter.end() :]
        value, rest = _modelfile_value(rest)
        found.append(Instruction(name, value))
    if "from" not in (one.name for one in found):
        raise UserError("Modelfile: no FROM")
    return found


def _modelfile_value(rest: str) -> tuple[str, str]:
    """A value, unquoted, and what follows. It ends at the first line end where its quotes are closed."""
    for at, letter in enumerate(rest + "\n"):
        if letter != "\n":
            continue
        text = rest[:at].strip()
        for quotes in ('"""', '"'):
            if text.startswith(quotes):
                if len(text) >= 2 * len(quotes) and text.endswith(quotes):
                    return text[len(quotes) : -len(quotes)], rest[at:]
                break
        else:
            return text, rest[at:]
    raise UserError("Modelfile: a quoted value has no end")


def reload_ollama(source: ExportSource, folder: Path) -> nn.Module:
    """What the Modelfile names, read back from its own files."""
    if source.choices.ollama_base:
        return gguf.reload_lora(source, folder)
    return gguf.reload_gguf(source, folder)


def create_command(folder: Path, name: str) -> list[str]:
    """The command that makes a model of Ollama's of an exported folder."""
    return [TOOL, "create", re.sub(r"[^a-z0-9._-]+", "-", name.lower()), "-f", str(folder / MODELFILE)]


def refuse_run_without_tool() -> None:
    """Raise `UserError` where `--run` is asked for and there is no `ollama`."""
    if shutil.which(TOOL) is None:
        raise UserError(
            "--run: `ollama` is not on the PATH; install it, or drop --run and run the printed command later"
        )


def create_model(folder: Path, name: str) -> None:
    """Run `ollama create`. Raises `UserError` with its last words when it fails."""
    command = create_command(folder, name)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"`{' '.join(command)}` stopped with status {done.returncode}: {last[0][:200]}")
