"""The page: its tabs, its looks. Each tab is a module with `build(runs, guard)`."""

import importlib
import importlib.util
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlxdpo.ui.guard import Guard

TABS = {
    "Compare": "compare_tab",
    "Blind vote": "vote_tab",
    "Runs": "runs_tab",
    "Data": "data_tab",
    "Train": "train_tab",
}
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")


def css() -> str:
    """The page's style sheet."""
    return files("mlxdpo.ui").joinpath("page.css").read_text("utf-8")


def theme() -> Any:
    """System fonts: Gradio's own themes would fetch theirs from the web."""
    import gradio as gr

    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)


def build_page(runs: Path, guard: Guard) -> Any:
    """The whole page as a `gr.Blocks`; `runs` is the folder whose run directories it shows."""
    import gradio as gr

    with gr.Blocks(title="mlxdpo", analytics_enabled=False) as page:
        for name, module in TABS.items():
            if importlib.util.find_spec(f"mlxdpo.ui.{module}") is not None:
                with gr.Tab(name, id=module):
                    importlib.import_module(f"mlxdpo.ui.{module}").build(runs, guard)
    return page
