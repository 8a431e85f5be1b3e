"""Tables in the documentation are the registries' own."""

from pathlib import Path

from mlxdpo.data.formats import FORMATS

DOCS = Path(__file__).parents[2] / "docs"


def test_table_of_row_shapes_is_the_registry():
    rows = [
        f"| `{f.name}` | {', '.join(f'`{c}`' for c in f.columns)} | {f.about} | {f.example} |" for f in FORMATS.values()
    ]
    text = (DOCS / "data.md").read_text("utf-8")
    start = text.index("|---|---|---|---|\n") + len("|---|---|---|---|\n")
    assert text[start:].split("\n\n")[0].splitlines() == rows
