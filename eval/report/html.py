"""A report as one HTML page that needs nothing else: reads on a phone, in the dark and on paper.

The template escapes everything from models and data; a policy that allows no script and no outside resource stands in
the page's own head, for whatever an escape might miss.
"""

from __future__ import annotations

import re
from importlib import resources

from jinja2 import Environment

from mlxdpo_eval.report.blocks import Document, SampleBlock, Table
from mlxdpo_eval.report.plots import Figure

TONES = {"better": "good", "worse": "bad"}


def unbroken(words: str) -> str:
    """No line break inside `70.0 %`, `n = 100` and `[0.5, 0.7]`: their blanks become no-break spaces."""
    whole = re.sub(r"(\[[-+.\d]+,) (?=[-+.\d]+\])", "\\1\N{NO-BREAK SPACE}", words)
    return whole.replace(" %", "\N{NO-BREAK SPACE}%").replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def html_page(document: Document) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["unbroken"] = unbroken
    for name, kind in (("table", Table), ("sample", SampleBlock), ("figure", Figure)):
        environment.tests[name] = lambda block, kind=kind: isinstance(block, kind)
    template, style = (
        resources.files("mlxdpo_eval.report").joinpath(name).read_text("utf-8") for name in ("page.html", "page.css")
    )
    page = environment.from_string(template).render(
        document=document,
        lead=document.sentence.removeprefix(f"{document.verdict.capitalize()}: "),  # the heading says it already
        tone=TONES.get(document.verdict, "open"),
        style=style,
    )
    return page.replace("\N{NO-BREAK SPACE}", "&nbsp;")  # an editor shows the entity
