"""Plain words: turns that no reader expects are banned from messages, help and pages, and the pages stay short.

Checked are the README, docs/*.md, the changelog's unreleased part, every message in the code, the help of commands and
settings, and the docstrings of what `import mlxdpo` offers. Code, inline code and quoted output are left out of pages.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mlxdpo

ROOT = Path(__file__).parents[2]
CONTRIBUTORS = {"architecture.md", "decisions.md", "testing.md"}  # of docs/: not read to use mlxdpo
MEASURED = (
    "eval/retained/",
    "eval/judges/protocol.py",
    "eval/judges/rubric.py",
)  # items and prompts: figures depend on them
HELP = ("mlxdpo/commands/", "mlxdpo/cli.py", "mlxdpo/api/", "mlxdpo/config.py")  # their docstrings are printed

BANNED = {
    r"(?<![Tt]here )\b(?:is|are|was|were) no (?!longer|more|less|better|worse|larger|smaller)": "is not a; unknown",
    r"\bof (?:its|their|his) own\b": "separate; its",
    r"\b[Ww]hoever\b": "anyone who",
    r"\bas (?:it|they) stands?\b": "unchanged",
    r"\b[Ii]n (?:its|their|the) place\b(?! where)": "instead",
    r"\bto the (?:last )?(?:bit|byte|letter)\b": "bit-identical",
    r"\b[Gg]o(?:es|ing)? on\b": "continues; resume; continue",
    r"\b(?:held|holds?|holding)(?: \w+){0,4} against\b": "compared with",
    r"\bsay(?:s|ing)? of\b": "says about",
    r"\b[Ss]tands?\b(?! for\b)(?!-)": "is",
    r"\ball the same\b(?! \w)": "anyway",
    r"\b[Bb]eside\b": "next to; with; in addition to",
    r"\b[Ss]urely\b": "significantly",
    r"\banew\b": "again",
    r"\b(?<!-)lies?\b": "is",
    r"\b[Pp]erhaps\b": "optionally; maybe",
    r"\b(?:Scored|Shown|[Hh]eld out|Reported|Refused|Left out|Kept|Counted|Tested) are\b(?! never)": "subject first",
    r"\b(?:Scored|Shown|Reported|Refused|Left out|Kept|Counted|Tested) is\b": "subject first",
    r"\bdamaged\b": "corrupted",
    r"\bsomebody\b": "someone",
    r"\bbut for\b": "except",
    r", else (?!if\b)": "otherwise",
    r"\bbehind (?!a proxy)": "after",
    r"\bha(?:s|ve) to be\b": "must be",
    r"\bwants\b": "needs",
    r"\bmakes? no sense\b": "does not apply",
    r"\bfor ever\b": "indefinitely",
    r"\bis gone\b": "no longer exists",
    r"\b(?:was|were|is|are) begun\b": "started",
    r"\bis said\b": "is printed",
    r"\bwithout a word\b": "silently",
    r"\baside\b": "ignored",
    r"\bis none\b": "is not one",
    r"\bis not there\b": "does not exist",
    r"\bgives? no\b": "has no",
    r"\b[Mm]end(?:s|ed)?\b": "fix",
    r"\b(?:told|tell|tells) from\b": "distinguish from",
    r"\bbecomes of\b": "happens to",
    r"\bthat nothing reads\b": "unused",
    r"\bcomes? to be\b": "reach",
    r"\bunlike the run's\b": "differently from",
}  # fmt: skip


def prose(text: str) -> str:
    """A page without code, inline code and comments, whitespace made one space."""
    return re.sub(r"\s+", " ", re.sub(r"```.*?```|<!--.*?-->|`[^`\n]*`", "", text, flags=re.DOTALL))


@cache
def pages() -> dict[str, str]:
    """Every page a user reads, and the changelog's unreleased part: name -> text."""
    found = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    found |= {"/README.md": (ROOT / "README.md").read_text("utf-8")}
    return found | {"CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text("utf-8").split("\n## ")[1]}


def doc_ids(tree: ast.AST) -> set[int]:
    """Which constants are docstrings, those of fields and constants included."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def literals(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether a docstring) of every string with a space in it; an f-string with {} for its values."""
    docs, inner = doc_ids(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner.update(id(part) for part in node.values)
            yield (
                node.lineno,
                "".join(str(getattr(p, "value", "{}")) if isinstance(p, ast.Constant) else "{}" for p in node.values),
                False,
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inner
            and " " in node.value
        ):
            yield node.lineno, node.value, id(node) in docs


@cache
def messages() -> dict[str, str]:
    """Everything that a run may print: place -> text."""
    found = {}
    for path in sorted(path for top in ("mlxdpo", "eval") for path in (ROOT / top).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not name.startswith(MEASURED):
            for line, text, is_doc in literals(ast.parse(path.read_text("utf-8"))):
                if not is_doc or name.startswith(HELP):
                    found[f"{name}:{line}"] = found.get(f"{name}:{line}", "") + " " + re.sub(r"\s+", " ", text)
    for name in ("", *mlxdpo._DOOR):
        thing = getattr(mlxdpo, name) if name else mlxdpo
        found[f"mlxdpo.{name}"] = re.sub(r"\s+", " ", inspect.getdoc(thing) or "")
    return found


@pytest.mark.parametrize("turn", BANNED)
def test_no_banned_turn(turn):
    """The message names what to write instead."""
    texts = {name: prose(text) for name, text in pages().items()} | messages()
    found = [
        f"{name}: ...{text[max(0, hit.start() - 50) : hit.end() + 40]}..."
        for name, text in texts.items()
        for hit in re.finditer(turn, text)
    ]
    assert found == [], f"write: {BANNED[turn]}"


def test_the_banned_turns_are_found_where_they_are():
    sample = (
        "X is no Y, a file of its own; it goes on beside others, held against them, perhaps damaged, else it stands."
    )
    assert sum(bool(re.search(turn, sample)) for turn in BANNED) == 9


def words(text: str) -> int:
    """Words of running text: no code blocks, no tables, nothing between comment marks."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL)
    return sum(len(line.split()) for line in text.splitlines() if not line.startswith("|"))


def test_the_pages_stay_short():
    """The README with everything in it; the pages for users together, by running text. Say things once; link."""
    assert len(pages()["/README.md"].split()) <= 900
    used = {
        name: words(text) for name, text in pages().items() if name not in CONTRIBUTORS | {"/README.md", "CHANGELOG.md"}
    }
    assert sum(used.values()) <= 9000, used
