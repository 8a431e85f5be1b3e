"""The page: its tabs, its looks. Compare and Blind vote share the MLX thread; the others are `build(runs, guard)`."""

import importlib
import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlxdpo.ui.guard import Guard
from mlxdpo.ui.kinds import check_kinds

TABS = {"Runs": "runs_tab", "Data": "data_tab", "Train": "train_tab", "Constitution": "constitution_tab"}
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

    from mlxdpo.ui import compare_tab, vote_tab
    from mlxdpo.ui.desk import Desk

    desk = Desk(runs, first)
    desk.warm()
    with gr.Blocks(title="mlxdpo", analytics_enabled=False) as page:
        gr.HTML(HEADING)
        with gr.Tab("Compare", id="compare"):
            compared = compare_tab.build(desk, guard, page)
        with gr.Tab("Blind vote", id="vote"):
            voted = vote_tab.build(desk, guard, page)
        compared.change(lambda name: gr.Dropdown(desk.names(), value=name), compared, voted, api_visibility="private")
        for name, module in TABS.items():
            if importlib.util.find_spec(f"mlxdpo.ui.{module}") is not None:
                with gr.Tab(name, id=module):
                    importlib.import_module(f"mlxdpo.ui.{module}").build(runs, guard)
    check_kinds(page)
    return page
