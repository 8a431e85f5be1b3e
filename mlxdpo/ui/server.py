"""The app behind its door: where it listens, whom it answers, what it never does.

It listens on 127.0.0.1. Bound elsewhere or shared it wants a password, and does not start without one. It sends
nothing out (no analytics, no fonts from the web), serves no files, keeps no history in the browser.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.io.names import is_loopback
from mlxdpo.types import UserError

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
    from mlxdpo.ui.page import build_page, css, script, theme

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
