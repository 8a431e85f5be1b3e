"""`mlxdpo pull USER/REPO [--revision R] [--out DIR] [--base MODEL]`"""

from __future__ import annotations

from pathlib import Path


def run(repo: str, /, *, revision: str | None = None, out: Path | None = None, base: str | None = None) -> None:
    """Download a run or an adapter from the Hub as a run directory.

    Args:
        repo: Repository on the Hub: owner/name.
        revision: Branch, tag, commit, or a pull request (refs/pr/3).
        out: Run directory to make; unset means runs/<name>. It must not exist.
        base: Base model (folder, Hub id or `smollm2`) instead of the one that the repository names.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.exporters.pull import pull_run

    found = pull_run(repo, revision=revision, out=out, base=base, say=lambda text: console.print(text, markup=False))
    console.print(f"{repo} at {found.commit[:12]} -> {found.path} ({found.kind})", markup=False)
    if not found.base_checked:
        console.print(f"{found.base} is not on this machine: it will be downloaded and verified on first use")
    if found.kind == "adapter":
        console.print("its objective and data are unknown: the default beta is assumed; pass pairs with --data")
    else:
        console.print(heldout_words(found.path), markup=False)
    console.print(f"talk to it: mlxdpo chat {found.path}", markup=False)


def heldout_words(path: Path) -> str:
    """How a pulled run is evaluated: its held-out pairs came along, are on the Hub, or stayed where it was trained."""
    from mlxdpo.data.sources import is_hub_dataset
    from mlxdpo.exporters.record import HELDOUT
    from mlxdpo.runs import Run

    run = Run.open(path)
    data, counted = run.config().data, run.manifest()["data"].get("heldout")
    if (path / HELDOUT).exists() or is_hub_dataset(data.eval or data.path):
        return f"evaluate it: mlxdpo eval {path}"
    return (
        f"its held-out pairs ({counted or 'not counted'}, of {data.eval or data.path}) are not in the repository; ask "
        f"who published it to export --with-heldout, or take your own: mlxdpo eval {path} --data PAIRS.jsonl"
    )
