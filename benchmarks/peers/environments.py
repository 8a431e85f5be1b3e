"""Which Python runs each side, and what is installed there: pinned versions, one environment for each peer."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

LINUX = sys.platform == "linux"
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".bench"

MLX = ("mlx-lm==0.32.2", "mlx[cpu]==0.32.4" if LINUX else "mlx==0.32.4")
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "mlx-lm-lora": ("mlx-lm-lora==5.10.2", *MLX),
    "soup-cli": ("soup-cli==0.77.0", *MLX),
    # Linux: exactly this torch, or gigabytes of CUDA libraries come along.
    "trl": ("torch==2.13.0", "trl==1.16.0", "peft==0.21.2", "transformers==5.24.0"),
}
MODULES = {
    "mlxdpo": "benchmarks.peers.sides.ours",
    "mlx-lm-lora": "benchmarks.peers.sides.mlx_lm_lora",
    "soup-cli": "benchmarks.peers.sides.soup_cli",
    "trl": "benchmarks.peers.sides.trl",
    "exact": "benchmarks.peers.sides.exact",
}
LODGERS = {"exact": "trl"}  # who needs no environment of its own
# What can be switched for a side: each trainer's own checkpointing, and parts of our step.
PARTS = ("plain", "no-packing", "chunked-head", "ungrouped", "mlx-attention", "mlx-swiglu", "no-lanes")
SWITCHES: dict[str, set[str]] = {
    "mlxdpo": {"checkpoint", *PARTS},
    "mlx-lm-lora": {"checkpoint"},
    "soup-cli": {"checkpoint"},
    "trl": {"checkpoint", "mps"},
    "exact": set(),
}


def switches_of(side: str) -> tuple[str, list[str]]:
    """`trl:checkpoint` as ("trl", ["checkpoint"]). Raises `ValueError` for a side or a switch that does not exist."""
    trainer, _, words = side.partition(":")
    switches = words.split("+") if words else []
    if trainer not in SWITCHES:
        raise ValueError(f"{side}: unknown; known: {', '.join(SWITCHES)}, each with :switches")
    if unknown := set(switches) - SWITCHES[trainer]:
        raise ValueError(f"{side}: no switch {min(unknown)}; known: {', '.join(sorted(SWITCHES[trainer]))}")
    return trainer, switches


def python_of(side: str, given: dict[str, str]) -> str:
    """The interpreter of `side`: the one given, our own, or that of its environment below .bench/, made if need be.

    Raises `subprocess.CalledProcessError` when the installation fails.
    """
    side = side if side in given else LODGERS.get(side, side)
    if side in given:
        return given[side]
    if side == "mlxdpo":
        return sys.executable
    return str(_installed(FOLDER / side, REQUIREMENTS[side]))


def _installed(folder: Path, requirements: tuple[str, ...]) -> Path:
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(requirements)
    if not done.exists() or done.read_text("utf-8") != wanted:
        print(f"installing {', '.join(requirements)} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        done.write_text(wanted, "utf-8")
    return python
