"""What a command line that is not understood probably means: options by meaning, commands by their usual words."""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mlxdpo.io.synonyms import right_name
from mlxdpo.types import UserError


def unknown_options(error: Any) -> list[str]:
    """A sentence for each option of a command line that its command does not have; `error` is cyclopts's."""
    known = {name for argument in error.argument_collection or () for name in option_names(argument)}
    words = [word.partition("=")[0] for word in error.root_input_tokens if word.startswith("--") and word != "--"]
    own = str(error.token.value).partition("=")[0]
    found = [word for word in dict.fromkeys(words) if word == own or not _is_known(word, known)]
    command = " ".join(error.command_chain or ())
    return [option_sentence(word, known, command) for word in found or [own]]


def option_names(argument: Any) -> Iterator[str]:
    """How an argument of cyclopts is spelled on the command line, also to switch it off."""
    yield from (name for name in argument.names if name.startswith("--"))
    yield from argument.negatives


def _is_known(word: str, known: set[str]) -> bool:
    plain = word.replace("_", "-")
    inside = any(plain.startswith(f"{name}.") for name in known if name == "--data.columns")
    return word in ("--help", "--version", "--help-all") or plain in known or inside


def option_sentence(word: str, known: Collection[str], command: str) -> str:
    """That an option is unknown, with the one of `known` that is probably meant."""
    dotted = {name.removeprefix("--").replace("-", "_"): name for name in known}
    meant = right_name(word.removeprefix("--"), dotted)
    hint = f"did you mean {dotted[meant]}?" if meant else f"see mlxdpo {command} --help-all"
    return f"unknown option {word}; {hint}"


ENDINGS_OF_DATA = (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".tsv", ".jsonl.gz", ".json.gz", ".jsonl.zst")
OTHER_WORDS = {
    "train": "dpo finetune fine-tune fine_tune ft fit lora qlora learn start run",
    "train --stage sft": "sft",
    "train --stage reward": "reward rm",
    "train --resume": "resume continue",
    "eval": "evaluate judge test benchmark report",
    "generate": "infer inference predict sample ask complete prompt",
    "chat": "talk repl",
    "app": "ui gui serve server web studio webui",
    "export": "fuse convert quantize quantise push upload gguf",
    "pull": "download",
    "data check": "check validate inspect",
    "plan": "estimate memory",
    "import-recipe": "import_recipe migrate convert-recipe",
    "objectives": "losses list-losses",
    "sweep": "tune-hyperparameters hpo grid search grid-search hyperparameters",
    "runs list": "ls list history",
    "runs diff": "diff",
}
"""Commands by what people call them elsewhere."""

TAKES_RECIPE = ("train", "plan", "iterate", "sweep")


def understood(words: list[str], commands: Collection[str]) -> list[str]:
    """The words of a command line with files given by position as the options they stand for, with a note.

    Raises `UserError` where a command is unknown, or a run is given where a recipe is expected.
    """
    if not words or words[0].startswith("-") or words[0] == "data":
        return words
    if words[0] == "runs":
        return words if words[1:2] and words[1] in ("list", "diff", "--help") else ["runs", "list", *words[1:]]
    first, rest = words[0], words[1:]
    if first not in commands:
        raise UserError(_unknown_command(first, rest, commands))
    if first == "tune" and rest[:1] == ["--data.path"]:
        return [first, *rest[1:]]
    if first not in (*TAKES_RECIPE, "score"):
        return words
    count = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    return [first, *(part for word in rest[:count] for part in _as_option(first, word)), *rest[count:]]


def _as_option(command: str, word: str) -> list[str]:
    """What a file or folder by position stands for."""
    place = Path(word)
    if not word.strip() or not word.isprintable():  # Path("") is the working folder
        return [word]
    if word.lower().endswith(ENDINGS_OF_DATA):
        return _read_as("data", word, "--data.path")
    if os.path.isfile(place / "config.json"):
        return _read_as("a model", word, "--model.path")
    if os.path.isfile(place / "config.yaml"):
        if command != "train":
            return [str(place / "config.yaml")]
        raise UserError(
            f"{word} is a run: `mlxdpo train --resume {word}` resumes it, "
            f"`mlxdpo train {place / 'config.yaml'} --out NEW` trains again from its recipe"
        )
    if os.path.isdir(place):
        return _read_as("data", word, "--data.path")
    return [word]


def _read_as(kind: str, word: str, option: str) -> list[str]:
    print(f"{word} is {kind}: read as {option.removesuffix('.path')} {word}", file=sys.stderr)
    return [option, word]


def _unknown_command(first: str, rest: list[str], commands: Collection[str]) -> str:
    place = Path(first)
    meant = next((command for command, names in OTHER_WORDS.items() if first.lower() in names.split()), None)
    if meant is None and not first.lower().endswith((*ENDINGS_OF_DATA, ".yaml", ".yml")):
        near = difflib.get_close_matches(first.lower(), commands, n=1)
        meant = near[0] if near else None
    if meant is not None:
        line = shlex.join([*meant.split(), *(_shorthand(word) for word in rest)])
        return f"unknown command {first}; did you mean: mlxdpo {line}"
    if first.lower().endswith(ENDINGS_OF_DATA):
        return f"unknown command {first}; to tune on it: mlxdpo tune {first} --model smollm2"
    if first.lower().endswith((".yaml", ".yml")):
        return f"unknown command {first}; to train with it: mlxdpo train {first}"
    if os.path.isfile(place / "config.yaml"):
        return f"unknown command {first}; it is a run: mlxdpo eval {first}, or mlxdpo chat {first}"
    return f"unknown command {first}; known: {', '.join(name for name in commands)}"


def _shorthand(word: str) -> str:
    return word.removesuffix(".path") if word in ("--model.path", "--data.path") else word


def missing_argument(error: Any) -> str:
    """A sentence for what a command line leaves out; for a run, with the newest one here."""
    command = " ".join(error.command_chain or ())
    name = str(error.argument.name if error.argument is not None else "an argument")
    if name != "PATH" or command.startswith("data"):
        return f"mlxdpo {command} needs {name}; see mlxdpo {command} --help"
    runs = sorted(Path("runs").glob("*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
    if not runs:
        return f"mlxdpo {command} needs a run directory, and runs/ has none; mlxdpo train makes one"
    return f"mlxdpo {command} needs a run directory; the newest here: mlxdpo {command} {runs[0].parent}"
