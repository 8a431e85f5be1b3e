"""The command line: one file per command in `commands/`, imported only when it is called, so `--help` is instant."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mlxdpo.distributed.launcher import process_count, process_rank
from mlxdpo.types import UserError

SHORTHAND = {"--model": "--model.path", "--data": "--data.path", "--adapter": "--model.adapter"}
SHORTHAND |= {"--rounds": "--rounds.count", "--every": "--rounds.every", "--reference": "--rounds.reference"}


def build_app(everything: bool = False) -> Any:
    """The application with all its commands; `everything` puts all settings on the pages of `--help`."""
    from cyclopts import App, Group

    app = App(
        name="mlxdpo",
        help="Tune a language model on preference pairs, on a Mac, and find out whether it got better.",
        version_flags=["--version"],
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # it would exit without a word
        group_commands=Group("Commands", sort_key=len(COMMANDS)),
        **_page("", everything),
    )
    parents = {name: App(name=name, help=text, **_page(name, everything)) for name, text in PARENTS.items()}
    for parent in parents.values():
        app.command(parent)
    for name, help_text in COMMANDS.items():
        first, _, second = name.partition(" ")
        target, short = (parents[first], second) if second else (app, name)
        module = f"mlxdpo.commands.{ELSEWHERE.get(name, name.translate(UNDERSCORES) + ':run')}"
        target.command(module, name=short, help=help_text, **_page(name, everything))
    return app


def _page(command: str, everything: bool) -> dict[str, Any]:
    """How the page of `--help` of a command looks."""
    from mlxdpo.commands.help_page import examples_of, group_of, help_formatter

    found = {"help_formatter": help_formatter(command, SHORTHAND, everything), "help_epilogue": examples_of(command)}
    if not command:
        return found
    alone = {} if " " in command else {"group": group_of(command)}
    return found | alone | {"group_parameters": "Options", "version_flags": []}


UNDERSCORES = str.maketrans(" -", "__")
ELSEWHERE = {
    "import": "import_:run",
    "data formats": "data_check:list_formats",
    "merge": "dial:merge",
    "runs list": "runs:list_runs",
    "runs diff": "runs:diff",
}  # a keyword names no module
PARENTS = {
    "data": "Look at preference data before training on it.",
    "runs": "List the runs of a folder, or what differs between two.",
}
COMMANDS = {
    "demo": "Tune a real model in minutes, offline, and show what changed.",
    "tune": "From preference pairs to a verdict in one command: check, plan, probe, train, evaluate, report.",
    "train": "Tune a model on preference pairs.",
    "sweep": "Train a recipe under several settings and seeds; report which are best and which are indistinguishable.",
    "plan": "Estimate a run's memory, steps and padding without loading the model.",
    "bench": "Speed of training on this machine, with its matmul rate for comparison.",
    "score": "Log-probs, implicit rewards and margins of every row.",
    "eval": "Evaluate whether tuning made the model better, with intervals, and write a report.",
    "compare": "Compare evaluated runs with the first of them; exit 1 when something got worse.",
    "frontier": "Reward against drift for the checkpoints of one or several runs.",
    "dial": "Measure a run at several strengths of its adapter and recommend one.",
    "merge": "Merge the adapters of several runs, or of a run and its base, into a run.",
    "collect": "New pairs from a run's own answers, ranked by a judge, a reward or the app's votes.",
    "iterate": "Collect, train and evaluate in rounds; stops when the judge is being gamed.",
    "pairs": "Pairs without a judge: chosen answers from one model, server or file, rejected ones from another.",
    "constitution": "Let a model revise or compare its answers by written principles: pairs without human labels.",
    "chat": "Chat with a run's model in the terminal, before and after tuning.",
    "generate": "Answer a prompt with a run's model, before or after tuning.",
    "influence": "Which training pairs taught an answer, or part of it, and which taught against it.",
    "app": "See a model before and after tuning, vote blind, make the next round's pairs.",
    "data check": "Describe a preference file and its problems, and show a pair as the model sees it.",
    "data audit": "Audit each pair with a model: likely flips, near-duplicates, shortcuts; drop, flip, select.",
    "data formats": "List the supported row shapes.",
    "runs list": "The runs of a folder: state, settings, steps, held-out figures.",
    "runs diff": "The settings in which two runs differ.",
    "export": "Write a run as adapter, fused weights or GGUF, verify each on held-out pairs, push to the Hub.",
    "import": "Convert a PEFT adapter to one that training can start from.",
    "import-recipe": "Convert a recipe of TRL, Axolotl, LLaMA-Factory or mlx-lm to one for `mlxdpo train`.",
    "pull": "Download a run or an adapter from the Hub as a run directory.",
    "objectives": "List the objectives with their papers and settings.",
    "doctor": "Check this machine and installation.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 the user's input is wrong, 130 interrupted, 1 anything else."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run a command and return its exit status."""
    from cyclopts import CycloptsError

    from mlxdpo.commands.guesses import understood

    words = ["--help" if word == "--help-all" else _expand(word) for word in arguments]
    try:
        _refuse_launched(words)
        words = understood(words, COMMANDS)
        return build_app("--help-all" in arguments)(words, exit_on_error=False, print_error=False) or 0
    except UserError as error:
        return _print_refusal(error)
    except CycloptsError as error:
        return _print_refusal(UserError(*_cyclopts_message(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (OSError, MemoryError, RuntimeError) as error:
        from mlxdpo.machine.errors import error_message

        if (sentence := error_message(error, arguments)) is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 1


def _refuse_launched(words: Sequence[str]) -> None:
    """Raise `UserError` for a command that several processes would do several times over."""
    if process_count() > 1 and words and words[0] in COMMANDS and words[0] != "train":
        if process_rank() > 0:
            sys.exit(2)
        raise UserError(
            f"mlx.launch started {process_count()} processes, and `mlxdpo {words[0]}` is for one; only `mlxdpo train` "
            f"(stages dpo, sft, reward) shares its work: start this without mlx.launch"
        )


def _expand(word: str) -> str:
    name, equals, value = word.partition("=")
    return SHORTHAND.get(name, name) + equals + value


def _print_refusal(error: UserError) -> int:
    """Print what is wrong, a line for each thing, and give the exit status."""
    for sentence in str(error).splitlines():
        print(f"error: {sentence}", file=sys.stderr)
    return 2


def _cyclopts_message(error: Any) -> list[str]:
    from cyclopts.exceptions import MissingArgumentError, UnknownOptionError
    from pydantic import ValidationError

    cause = error.__cause__
    if isinstance(cause, ValidationError):
        from mlxdpo.config import Config, explain

        return explain(cause, "command line", Config)
    if isinstance(error, UnknownOptionError):
        from mlxdpo.commands.guesses import unknown_options

        return unknown_options(error)
    if isinstance(error, MissingArgumentError):
        from mlxdpo.commands.guesses import missing_argument

        return [missing_argument(error)]
    return [" ".join(str(error).split())]


if __name__ == "__main__":
    main()
