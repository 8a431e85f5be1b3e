"""What docs/build.py makes of schema, commands and front door is complete, and a link that leads nowhere is found."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import mlxdpo
from mlxdpo.cli import COMMANDS
from mlxdpo.config import Config

ROOT = Path(__file__).parents[2]


def module(name):
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def build():
    """docs/build.py."""
    return module("build")


def leaves(values, prefix=""):
    """Dotted names and values of a nested mapping of settings."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_every_key_of_a_recipe_is_in_the_reference_with_its_default_and_a_meaning(build):
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| `(.*?)` \| (.+) \|$", build.configuration(), re.MULTILINE)
    assert [(name, default) for name, _, default, _ in rows] == [
        (name, "unset" if value in (None, "") else build.cell(repr(value)))
        for name, value in sorted(
            leaves(Config().model_dump()), key=lambda leaf: [row[0] for row in rows].index(leaf[0])
        )
    ]
    assert all(kind and meaning for _, kind, _, meaning in rows)


def test_types_are_said_as_a_reader_needs_them(build):
    kinds = dict(re.findall(r"^\| `([\w.]+)` \| (.+?) \|", build.configuration(), re.MULTILINE))
    assert kinds["stage"] == "dpo, sft, reward, ppo, rloo"
    assert kinds["model.quantize"] == "4, 8"
    assert kinds["loss.beta"] == "float, > 0" and kinds["data.columns"] == "dict of str, str"
    assert kinds["lora.keys"] == "list of str" and kinds["data.eval_fraction"] == "float, ≥ 0, &lt; 1"


def test_every_name_of_the_front_door_is_documented(build):
    page = build.front_door()
    assert re.findall(r"auto\w+:: mlxdpo\.(?:[a-z_]+\.)*(\w+)\n", page) == list(mlxdpo._DOOR)
    assert ".. autodata:: mlxdpo.losses.registry.LOSSES\n" in page


@pytest.mark.slow
def test_every_command_is_in_the_reference_with_its_help(build, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = build.commands()
    parts = re.split(r"^## mlxdpo ", text, flags=re.MULTILINE)[1:]
    assert [part.splitlines()[0] for part in parts] == list(COMMANDS)
    assert all(f"```text\nmlxdpo {part.splitlines()[0]}" in part for part in parts)


def test_links_to_the_readme_lead_to_the_index_and_those_to_other_readmes_stay(build):
    text = build.with_index(build.ROOT / "docs" / "README.md")
    assert "](../README.md" not in text and "](../index.md#install)" in text
    assert "](../examples/README.md)" in text
    assert "](docs/README.md)" in build.with_index(build.ROOT / "README.md")


def test_links_that_lead_nowhere_are_found(build, tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html">x</a><a href="b.html#here">x</a><a href="#top"></a><h1 id="top">x</h1>'
        '<a href="https://example.org">x</a><a href="b.html#gone">x</a><img src="none.png">'
    )
    (tmp_path / "b.html").write_text('<p id="here">x</p><a href="a.html?q=1#top">x</a><a href="c.html">x</a>')
    assert build.broken_links(tmp_path) == [
        "a.html: b.html#gone names a place that is not there",
        "a.html: none.png is not there",
        "b.html: c.html is not there",
    ]


def test_a_docstring_becomes_text_in_which_formulas_are_formulas(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    conf = module("conf")
    assert conf.as_rst(["Mean of |y_w| * `beta`, a_", "and b."]) == [
        r"Mean of \|y_w\| \* \ ``beta``\ , a\_",
        "and b.",
        "",
    ]
    assert conf.as_rst(["Fields:", "", "a    (B,)", "     nats", "", "End."]) == [
        *("Fields:", "", "::", "", "    a    (B,)", "         nats", "", "End.", "")
    ]
