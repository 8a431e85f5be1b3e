"""`mlxdpo app [RUN] [--host H --port P --auth NAME --share]`"""

from __future__ import annotations

import getpass
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from mlxdpo.types import UserError

if TYPE_CHECKING:
    from mlxdpo.ui.server import Login

Port = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=65535))]


def run(
    path: Path | None = None,
    /,
    *,
    runs: Path = Path("runs"),
    host: str = "127.0.0.1",
    port: Port | None = None,
    auth: str | None = None,
    share: bool = False,
    name: list[str] | None = None,
    open_browser: bool = False,
) -> int:
    """See a model before and after tuning, vote blind, make the next round's pairs; also runs, data and training.

    Args:
        path: Run directory to open first; its parent is the folder of runs.
        runs: Folder of run directories.
        host: Address to listen on; addresses reachable by others require --auth.
        port: Port; the first free one from 7860 when not given.
        auth: User name. The password comes from $MLXDPO_APP_PASSWORD or is asked for; it is never printed.
        share: Open a public link through Gradio's relay; needs --auth.
        name: Additional host name for the app, for use with a proxy.
        open_browser: Open the page in the browser.
    """
    from mlxdpo.machine.openblas import preload_blas
    from mlxdpo.ui.server import start_app

    folder, first = runs_folder(path, runs)
    if not preload_blas().fast:
        print(preload_blas().note, file=sys.stderr)
    served = start_app(folder, first, host=host, port=port, login=ask_login(auth), share=share, names=tuple(name or ()))
    print(f"mlxdpo app: {served.url}   (Ctrl+C ends it; training continues)", flush=True)
    if open_browser:
        import webbrowser

        webbrowser.open(served.url)
    try:
        threading.Event().wait()
    finally:
        served.page.close()
    return 0


def runs_folder(path: Path | None, runs: Path) -> tuple[Path, str | None]:
    """The folder of runs and the run to open with. Raises `UserError` for a path that is not a run."""
    from mlxdpo.runs import Run

    if path is None:
        return runs, None
    run = Run.open(path).path
    return (run if run.parent != Path() else run.resolve()).parent, run.resolve().name


def ask_login(user: str | None) -> Login | None:
    """User and password, the password from the environment or the terminal. Raises `UserError` without one."""
    from mlxdpo.ui.server import PASSWORD, Login

    if user is None:
        return None
    if password := os.environ.get(PASSWORD):
        return Login(user, password)
    if not sys.stdin.isatty():
        raise UserError(f"--auth {user}: no password; set {PASSWORD}, or start from a terminal to be asked")
    return Login(user, getpass.getpass(f"password for {user}: "))
