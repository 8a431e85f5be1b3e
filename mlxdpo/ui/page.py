"""The page: its tabs, its looks. Compare and Blind vote share the MLX thread; the others are `build(runs, guard)`."""

import importlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlxdpo.ui.guard import Guard
from mlxdpo.ui.input_checks import check_inputs

TABS = {"Runs": "runs", "Data": "data", "Train": "train", "Constitution": "constitution"}
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")


HEADING = '<h1 class="heading">mlxdpo <span class="quiet">the same model before and after preference tuning</span></h1>'


def css() -> str:
    """The page's style sheet."""
    return files("mlxdpo.ui").joinpath("page.css").read_text("utf-8")


def script() -> str:
    """What the page does by itself: keys."""
    return files("mlxdpo.ui").joinpath("page.js").read_text("utf-8")


def theme() -> Any:
    """System fonts: Gradio's own themes would fetch theirs from the web."""
    import gradio as gr

    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)


def build_page(runs: Path, guard: Guard, first: str | None = None) -> Any:
    """The whole page as a `gr.Blocks`: the run directories below `runs`, `first` of them open."""
    import gradio as gr

    from mlxdpo.ui.app_state import AppState
    from mlxdpo.ui.compare.tab import build as build_compare
    from mlxdpo.ui.vote.tab import build as build_vote

    app = AppState(runs, first)
    app.warm()
    with gr.Blocks(title="mlxdpo", analytics_enabled=False) as page:
        gr.HTML(HEADING)
        with gr.Tab("Compare", id="compare"):
            compared = build_compare(app, guard, page)
        with gr.Tab("Blind vote", id="vote"):
            voted = build_vote(app, guard, page)
        compared.change(lambda name: gr.Dropdown(app.names(), value=name), compared, voted, api_visibility="private")
        for name, module in TABS.items():
            with gr.Tab(name, id=f"{module}_tab"):
                importlib.import_module(f"mlxdpo.ui.{module}.tab").build(runs, guard)
    check_inputs(page)
    return page
