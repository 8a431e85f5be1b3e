"""The app behind its door: where it listens, whom it answers, what it never does.

It listens on 127.0.0.1. Bound elsewhere or shared it wants a password, and does not start without one. It sends
nothing out (no analytics, no fonts from the web), serves no files, keeps no history in the browser.

The page is its tabs: Compare and Blind vote share the MLX thread; the others are `build(runs, guard)`.
"""

from __future__ import annotations

import importlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.io.names import is_loopback
from mlxdpo.types import UserError
from mlxdpo.ui.guard import Guard, check_inputs

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SHARED = "*.gradio.live"
ANY_ADDRESS = "ip"
PASSWORD = "MLXDPO_APP_PASSWORD"
SHORTEST_PASSWORD, SHORTEST_OPEN, DIFFERENT = 8, 12, 5
"""Characters: on this machine alone; where others can reach the app; different ones among them then."""


class Login(NamedTuple):
    """Who may use the app."""

    user: str
    password: str


class Served(NamedTuple):
    """A running app: its address, Gradio's page, the secret that its page's requests carry."""

    url: str
    page: Any
    nonce: str


def is_open(host: str, share: bool) -> bool:
    """Whether others than this machine can reach the app."""
    return share or not is_loopback(host)


def check_login(host: str, share: bool, login: Login | None) -> None:
    """Raises `UserError` unless an app that others can reach has a password worth its name."""
    least = SHORTEST_OPEN if is_open(host, share) else SHORTEST_PASSWORD
    if login is not None and len(login.password) < least:
        raise UserError(f"the password has {len(login.password)} characters; use at least {least}")
    if login is not None and is_open(host, share) and len(set(login.password)) < DIFFERENT:
        raise UserError(f"the password has {len(set(login.password))} different characters; use at least {DIFFERENT}")
    if login is None and is_open(host, share):
        where = "shared over the internet" if share else f"bound to {host}"
        raise UserError(f"an app that is {where} needs a password: add --auth NAME and set {PASSWORD}, or be asked")


def hosts_for(host: str, share: bool, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The Host names that are answered. An address in figures cannot be rebound by a name server, a name can."""
    import socket

    names = [*LOOPBACK, host.lower(), *(name.lower() for name in extra)]
    if not is_loopback(host):
        own = socket.gethostname().lower()
        names += [ANY_ADDRESS, own, f"{own}.local"]
    return tuple(dict.fromkeys([*names, *([SHARED] if share else [])]))


def start_app(
    runs: Path,
    first: str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    login: Login | None = None,
    share: bool = False,
    names: tuple[str, ...] = (),
) -> Served:
    """Open the app and return while it runs. Raises `UserError` where it would be open without a password."""
    check_login(host, share, login)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    _need_gradio()
    from starlette.middleware import Middleware

    from mlxdpo.ui.guard import Gate, Shutter, new_nonce, page_guard

    nonce = new_nonce()
    page = build_page(runs, page_guard(nonce), first)
    page.queue(max_size=64, default_concurrency_limit=8)
    gate = Middleware(Gate, nonce=nonce, hosts=hosts_for(host, share, names))  # type: ignore[arg-type]
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=port, share=share,
            auth=tuple(login) if login else None,
            app_kwargs={"middleware": [gate]}, strict_cors=True, allowed_paths=[], max_file_size="5mb",
            run_history=False, footer_links=[], enable_monitoring=False, show_error=False, ssr_mode=False, pwa=False,
            mcp_server=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
            theme=theme(), css=css(), js=script(),
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} on {host} cannot be used ({error}); give another one with --port") from None
    page.app.middleware_stack = Shutter(page.app.middleware_stack)
    return Served(page.share_url or page.local_url, page, nonce)


def _need_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("the app needs gradio; install it with: pip install 'mlxdpo[app]'") from None


TABS = {"Runs": "runs", "Data": "data", "Train": "train", "Constitution": "constitution"}
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "monospace")


# Gradio's container is a flex item as wide as its content: without a width each tab would have another. In the page,
# not in the sheet: Gradio puts a class before every selector there, which these would no longer match with.
LAYOUT = """<style>
html { scrollbar-gutter: stable; }
.gradio-container { width: 100% !important; min-width: 0; }
.gradio-container > .main { width: 100%; min-width: 0; }
@media (max-width: 640px) { .gradio-container > .main { padding: 8px !important; } }
</style>"""
HEADING = '<h1 class="heading">mlxdpo <span class="quiet">the same model before and after preference tuning</span></h1>'


def css() -> str:
    """The page's style sheet."""
    return files("mlxdpo.ui").joinpath("page.css").read_text("utf-8")


def script() -> str:
    """What the page does by itself: keys."""
    return files("mlxdpo.ui").joinpath("page.js").read_text("utf-8")


def theme() -> Any:
    """System fonts: Gradio's own themes would fetch theirs from the web. Text stands out from its ground 4.5 to 1."""
    import gradio as gr

    base = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)
    return base.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
    )


def build_page(runs: Path, guard: Guard, first: str | None = None) -> Any:
    """The whole page as a `gr.Blocks`: the run directories below `runs`, `first` of them open."""
    import gradio as gr

    from mlxdpo.ui.compare.tab import build as build_compare
    from mlxdpo.ui.engine import AppState
    from mlxdpo.ui.vote.tab import build as build_vote

    app = AppState(runs, first)
    app.warm()
    with gr.Blocks(title="mlxdpo", analytics_enabled=False) as page:
        gr.HTML(LAYOUT + HEADING)
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
