"""What people type first, and what is then printed: the command meant, an option by meaning, a file in its place."""

import functools
import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
from tiny_runs import finish, recipe

from mlxdpo import cli
from mlxdpo.cli import COMMANDS, SHORTHAND, build_app, run
from mlxdpo.commands import terminal
from mlxdpo.commands.chat import HELP, talk
from mlxdpo.commands.guesses import TAKES_RECIPE, understood
from mlxdpo.commands.help_page import COMMON, EXAMPLES, GROUPS
from mlxdpo.config import Config
from mlxdpo.io.settings import dotted_names
from mlxdpo.io.synonyms import THEIR_NAMES, right_name
from mlxdpo.io.words import counted

GUESSES = {
    "dpo --model m --data x": ["unknown command dpo; did you mean: mlxdpo train --model m --data x"],
    "finetune --model m": ["unknown command finetune; did you mean: mlxdpo train --model m"],
    "sft --data x.jsonl": ["did you mean: mlxdpo train --stage sft --data x.jsonl"],
    "run": ["unknown command run; did you mean: mlxdpo train"],
    "evaluate runs/mine": ["unknown command evaluate; did you mean: mlxdpo eval runs/mine"],
    "eval": ["mlxdpo eval needs a run directory; the newest here: mlxdpo eval runs/mine"],
    "chat": ["mlxdpo chat needs a run directory; the newest here: mlxdpo chat runs/mine"],
    "generate runs/mine": ['no prompt given: mlxdpo generate runs/mine "Name a fruit."'],
    "ui": ["unknown command ui; did you mean: mlxdpo app"],
    "fuse runs/mine": ["unknown command fuse; did you mean: mlxdpo export runs/mine"],
    "pairs.jsonl": ["unknown command pairs.jsonl; to tune on it: mlxdpo tune pairs.jsonl --model smollm2"],
    "runs/mine": ["unknown command runs/mine; it is a run: mlxdpo eval runs/mine, or mlxdpo chat runs/mine"],
    "recipe.yaml": ["to train with it: mlxdpo train recipe.yaml"],
    "train runs/mine": ["`mlxdpo train --resume runs/mine` resumes it", "trains again from its recipe"],
    "train pairs.jsonl --lr 1e-5": [
        "pairs.jsonl is data: read as --data pairs.jsonl", "unknown option --lr; did you mean --optim.lr?"
    ],
    "train --data x --beta 0.1": ["unknown option --beta; did you mean --loss.beta?"],
    "train m pairs.jsonl --epochs 3 --batch_size 2": [
        "m is a model: read as --model m", "--epochs; did you mean --train.epochs?",
        "--batch_size; did you mean --train.batch-size?",
    ],
    "train --model m --data pairs.jsonl --frobnicate 1": [
        "unknown option --frobnicate; see mlxdpo train --help-all"
    ],
    "tune": ["mlxdpo tune needs PAIRS; see mlxdpo tune --help"],
    "frobnicate": ["unknown command frobnicate"],
}  # fmt: skip


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with what looks like a run, a model and data; nothing is opened."""
    for name, text in (("runs/mine/config.yaml", "model: m\n"), ("m/config.json", "{}"), ("pairs.jsonl", "")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", GUESSES)
def test_a_wrong_guess_is_told_what_was_meant(line, desk, capsys):
    assert run(line.split()) == 2
    said = capsys.readouterr().err
    assert [part for part in GUESSES[line] if part not in said] == [] and "Traceback" not in said


@functools.cache
def page_of(command):
    """A page of `--help` on a terminal of 80 columns, made once: those of all settings take a second."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as page:
        patch.setenv("COLUMNS", "80")
        assert run([*command.split(), "--help"]) == 0
    return page.getvalue()


@pytest.mark.parametrize("command", ["", *COMMANDS, "data"])
def test_pages_of_help_fit_80_columns_and_end_with_examples(command):
    page = page_of(command)
    assert max(map(len, page.splitlines())) <= 80
    for example in EXAMPLES.get(command, ()):
        assert example in " ".join(page.split())


def test_the_first_page_has_every_command_in_a_group():
    grouped = " ".join(GROUPS.values()).split()
    assert sorted(grouped) == sorted({name.split()[0] for name in COMMANDS})
    page = page_of("")
    places = [page.index(f"─ {title} ─") for title in GROUPS]
    assert places == sorted(places) and page.index("Examples") > places[-1]


def test_common_options_come_first_and_the_rest_behind_help_all(capsys):
    short = page_of("train")
    run(["train", "--help-all"])
    whole = capsys.readouterr().out
    assert "--data STR" in short and "--rollout.samples" not in short and "--rollout.samples" in whole
    hidden = int(re.search(r"(\d+) more: mlxdpo train --help-all", short)[1])
    assert hidden > 50 and "--help-all" not in whole


def test_common_options_and_meanings_exist():
    names = set(dotted_names(Config))
    assert {name.removeprefix("--").replace("-", "_") for name in COMMON} <= names
    assert THEIR_NAMES.keys() - names == {"resume"}
    assert right_name("learning_rate", names) == "optim.lr" and right_name("lora.r", names) == "lora.rank"
    assert right_name("colour", names) is None


def test_every_example_parses(desk):
    for line in (line for lines in EXAMPLES.values() for line in lines):
        words = [SHORTHAND.get(word, word).strip('"') for word in line.replace('"Name a fruit."', "hi").split()[1:]]
        build_app().parse_args(understood(words, COMMANDS), exit_on_error=False, print_error=False)


def test_files_by_position_become_options_and_recipes_stay(desk):
    assert understood(["train", "pairs.jsonl", "--out", "x"], COMMANDS) == [
        "train", "--data.path", "pairs.jsonl", "--out", "x"
    ]  # fmt: skip
    assert understood(["plan", "runs/mine"], COMMANDS) == ["plan", "runs/mine/config.yaml"]
    for command in TAKES_RECIPE:
        assert understood([command, "a.yaml"], COMMANDS) == [command, "a.yaml"]


def test_a_run_answers_by_position_and_in_a_conversation(tmp_path, cache, monkeypatch, capsys):
    finish(recipe(tmp_path, "run", train={"steps": 2}))
    monkeypatch.chdir(tmp_path)
    assert run(["generate", "run", "red", "--max-tokens", "4", "--json"]) == 0
    once = capsys.readouterr().out
    assert run(["generate", "run", "--prompt", "red", "--max-tokens", "4", "--json"]) == 0
    assert capsys.readouterr().out == once
    lines = iter(["red", "/both", "blue", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(["chat", "run", "--max-tokens", "4", "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    assert HELP in said and "before: " in said and "after: " in said
    assert json.loads(once)["text"] in said


def test_a_conversation_follows_its_commands(monkeypatch, capsys):
    asked = []

    def answer(side, before, text):
        """Remembers what was asked; stops in the middle of one answer."""
        asked.append((side, list(before), text))
        yield "one "
        if text == "stop":
            raise KeyboardInterrupt
        yield f"{side}"

    lines = iter(["hi", "/both", "again", "/nonsense", "/new", "/before", "stop"])

    def typed(prompt):
        """The next line, then the end of the input."""
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    talk(answer, "")
    first = ("hi", "one after")
    assert asked == [("after", [], "hi"), ("before", [first], "again"), ("after", [first], "again"),
                     ("before", [], "stop")]  # fmt: skip
    said = capsys.readouterr().out
    assert "before: one before\nafter: one after" in said and HELP in said and "one  (stopped)" in said


def test_live_lines_fit_80_columns_of_a_terminal_and_are_whole_elsewhere(monkeypatch):
    values = dict.fromkeys(terminal.SHOWN.keys() - {"accuracy", "margin"}, 123.456789)
    whole = terminal._fit_line("step 100000/100000", values, "10:00:00 left")
    assert len(whole) > 80 and "GB" in whole
    monkeypatch.setattr(terminal, "console", type(terminal.console)(force_terminal=True, width=80))
    line = terminal._fit_line("step 100/1000", values, "10:00:00 left")
    assert len(line) <= 80 and "loss" in line and line.endswith("left") and "GB" not in line


def test_one_is_singular():
    assert [counted(n, "pair") for n in (0, 1, 2, 12_000)] == ["0 pairs", "1 pair", "2 pairs", "12,000 pairs"]
    assert counted(2, "pass", "passes") == "2 passes"


def test_commands_have_no_word_that_means_another():
    from mlxdpo.commands.guesses import OTHER_WORDS

    words = [word for names in OTHER_WORDS.values() for word in names.split()]
    assert len(words) == len(set(words)) and not set(words) & COMMANDS.keys()
    assert cli.run([]) == 0 and sys.stdout is not None
