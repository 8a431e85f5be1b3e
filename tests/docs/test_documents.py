"""What the pages say of each other and of the figures: no dead link, no figure out of nowhere, decisions in order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
FIGURE = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?:e-\d+)?(?: %)?(?![\w-])")
DECISION = re.compile(r"^## (\d{4}-\d\d-\d\d): (.+)$", re.MULTILINE)


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL)


def slug(heading: str) -> str:
    """The anchor of a heading on a Git host and in MyST: lower case, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """All places of a page that a link may name."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    return {slug(re.sub(r"`|\]\([^)]*\)|\[", "", heading)) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def links(page: Path) -> list[str]:
    """Where a page leads within the repository."""
    found = [a or b for a, b in LINK.findall(re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL))]
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@each_page
def test_no_link_is_dead(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        ahead += [page.parent / link.partition("#")[0] for link in links(page) if not link.startswith("#")]
    assert {page.resolve() for page in PAGES} <= seen


@each_page
def test_every_file_that_a_page_names_exists(page):
    """`losses/pairwise.py` is in mlxdpo/, `tests/docs/test_docs.py` at the root; a page says which file is new."""
    text = page.read_text("utf-8")
    new = set(re.findall(r"`([\w/]+\.py)`, a new file", text))
    named = set(re.findall(r"`(\w+(?:/\w+)+\.py|(?:mlxdpo|eval|tests|docs|examples|benchmarks)/[\w/.-]+\.\w+)`", text))
    assert [name for name in named - new if not any((ROOT / top / name).is_file() for top in ("", "mlxdpo"))] == []


def test_the_map_leads_to_every_page_and_the_readme_names_it_at_the_top():
    linked = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs" / "README.md")}
    assert {page.resolve() for page in PAGES} - {ROOT / "docs" / "README.md"} <= linked
    assert "](docs/README.md)" in (ROOT / "README.md").read_text("utf-8").partition("\n## ")[0]


def test_decisions_are_dated_newest_last_and_in_the_index():
    """A new decision: `## YYYY-MM-DD: what was decided` at the end, and a line with date and link at its subject."""
    text = (ROOT / "docs" / "decisions.md").read_text("utf-8")
    index, body = text.split("<!-- /index -->")
    decisions = DECISION.findall(body)
    assert re.findall(r"^(?:#+ |\*\*)\d{4}.*", DECISION.sub("", body), re.MULTILINE) == []
    assert [date for date, _ in decisions] == sorted(date for date, _ in decisions) and len(decisions) > 40
    wanted = [f"- {date}: [{title}](#{slug(f'{date}: {title}'.replace('`', ''))})" for date, title in decisions]
    assert [line for line in wanted if index.splitlines().count(line) != 1] == []
    assert index.count("](#") == len(wanted)


def test_the_changelog_begins_with_what_is_unreleased_and_is_by_subject():
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert releases[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+, \d{4}-\d\d-\d\d", release) for release in releases[1:])
    assert [release for release in releases[1:] if f'version = "{release.partition(",")[0]}"' in _project()]


def _project() -> str:
    return (ROOT / "pyproject.toml").read_text("utf-8")


def test_every_measured_figure_of_the_changelog_stands_in_the_page_it_names():
    """Of lines that name a page of measurements; counts of what there is are the page's own business."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    checked = 0
    for line in re.findall(r"^- .+(?:\n  .+)*", text, re.MULTILINE):
        named = [ROOT / link for link in re.findall(r"\]\(([^)#]+\.md)\)", line)]
        there = "\n".join(page.read_text("utf-8") for page in named)
        figures = FIGURE.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)) if named else []
        for figure in (f for f in figures if re.search(r"[.%e]", f)):
            plain = figure.removesuffix(" %")
            assert re.search(rf"(?<![\d.]){re.escape(plain)}(?![\d])", there), f"{figure} is not in {named}"
            checked += 1
    assert checked >= 30
