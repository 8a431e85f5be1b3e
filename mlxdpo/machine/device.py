"""What this machine is: Metal, CUDA or CPU; its memory limits, default number type and measured matmul rate."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform as machine
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

# Shares of the recommended working set. mlx-lm wires all of it, which froze Macs (mlx-examples #1076, mlx-lm #828).
WIRED_SHARE = 0.9
# MLX keeps freed buffers, wired, up to nearly all memory. A quarter holds the temporaries of a step of any model that
# fits, so that the next step of the same shape allocates nothing, and leaves the rest to other programs.
CACHE_SHARE = 0.25

TRACES = 24


def cache_folder() -> Path:
    """Where mlxdpo keeps what it can make again: $MLXDPO_CACHE, or mlxdpo/ in the user's cache folder."""
    if own := os.environ.get("MLXDPO_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxdpo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxdpo"


class Machine(NamedTuple):
    """What computes here. `memory` is what MLX may use, in bytes."""

    kind: str
    name: str
    memory: int
    system: str


def this_machine() -> Machine:
    """Metal, CUDA or CPU, with its name and memory."""
    return _detect_machine()


@functools.cache
def _detect_machine() -> Machine:
    import mlx.core as mx

    system = f"{machine.system()} {machine.release()} {machine.machine()}"
    if mx.metal.is_available() and mx.default_device() == mx.gpu:
        info = _device_info()
        memory = int(info.get("max_recommended_working_set_size") or info.get("memory_size") or _ram())
        return Machine("metal", str(info.get("device_name", "Apple GPU")), memory, system)
    if mx.default_device() == mx.gpu:
        info = _device_info()
        return Machine("cuda", str(info.get("device_name", "CUDA GPU")), int(info.get("memory_size") or 0), system)
    return Machine("cpu", machine.processor() or machine.machine(), _ram(), system)


def _device_info() -> dict[str, Any]:
    import mlx.core as mx

    return dict(mx.device_info())


def _ram() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def default_dtype(stored: Collection[Any] = ()) -> Any:
    """On a GPU bfloat16, or float16 where the `stored` dtypes of a model have that and no bfloat16: another 16-bit
    type would move its weights by 0.2 %, the scales of packed ones by 0.6 %. On a CPU float32, because 16-bit matmuls
    bypass the BLAS there."""
    import mlx.core as mx

    if this_machine().kind == "cpu":
        return mx.float32
    return mx.float16 if mx.float16 in stored and mx.bfloat16 not in stored else mx.bfloat16


class MemoryLimits(NamedTuple):
    """What MLX may take on Metal, in bytes: kept resident, allocated before it waits for work to end, and kept for
    reuse after it was freed."""

    wired: int
    allocated: int
    cached: int


def memory_limits(recommended: int) -> MemoryLimits:
    """The limits for a recommended working set of so many bytes.

    MLX's own are 1.5 times the recommended set for both of the last two. Beyond the second it does not fail: it starts
    no further work before some has ended, so how far Python runs ahead is bounded.
    """
    return MemoryLimits(int(recommended * WIRED_SHARE), recommended, int(recommended * CACHE_SHARE))


def limit_memory() -> MemoryLimits | None:
    """Set the limits of this machine, on Metal alone; None elsewhere. `load_policy` does, for every command that
    computes."""
    import mlx.core as mx

    if this_machine().kind != "metal":
        return None
    limits = memory_limits(this_machine().memory)
    mx.set_wired_limit(limits.wired)
    mx.set_memory_limit(limits.allocated)
    mx.set_cache_limit(limits.cached)
    return limits


def memory_use() -> dict[str, float]:
    """GB (1e9 bytes) of MLX: most ever in use, in use, and kept for reuse. What a Mac's other programs miss is the
    sum of the last two."""
    import mlx.core as mx

    return {
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "active_memory_gb": mx.get_active_memory() / 1e9,
        "cache_memory_gb": mx.get_cache_memory() / 1e9,
    }


def compiled(function: Any, **options: Any) -> Any:
    """`mx.compile` on a GPU; on a CPU the function itself.

    There it gains nothing (a SmolLM2 step took 6.9 s compiled and 6.8 s not), and it calls a C++ compiler at run time,
    seconds for each new kernel, where there is one.
    """
    import mlx.core as mx

    return function if this_machine().kind == "cpu" else mx.compile(function, **options)


def most_traces() -> int | None:
    """How many shapes a compiled step may have, as MLX keeps each trace for good; None where nothing is compiled."""
    return None if this_machine().kind == "cpu" else TRACES


def matmul_rate(size: int = 1024, repeats: int = 5, dtype: str = "float32") -> float:
    """Matmul rate of this machine in FLOP/s: the best of a few runs."""
    import mlx.core as mx

    a = mx.random.normal((size, size), dtype=getattr(mx, dtype))
    mx.eval(a, a @ a)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@functools.cache
def float32_matmul() -> str:
    """What float32 matmuls are computed in here, measured: "float32", or "TF32" with 10 bits of its 23.

    By default an M5 with macOS 26.2 or newer and CUDA take TF32; MLX_ENABLE_TF32=0 in the environment forbids it.
    """
    import mlx.core as mx

    fine = 1 + 2.0**-12  # needs 12 bits
    return "float32" if (mx.full((512, 512), fine) @ mx.eye(512))[0, 0].item() == fine else "TF32"


LIBRARIES = ("mlx-metal", "mlx-cuda-13", "mlx-cuda-12", "mlx-cpu")  # what `mlx` brings its kernels in


def library_wheel() -> str:
    """The wheel that MLX's kernels came in, with the system it was built for: "mlx-metal macosx_26_0_arm64"."""
    for name in LIBRARIES:
        try:
            wheel = importlib.metadata.distribution(name).read_text("WHEEL") or ""
        except importlib.metadata.PackageNotFoundError:
            continue
        tags = [line.rpartition("-")[2].strip() for line in wheel.splitlines() if line.startswith("Tag:")]
        return f"{name} {' '.join(tags) or 'of no known tag'}"
    return "none: MLX was built here"


def macos_version() -> str:
    """Such as 26.2; empty elsewhere."""
    return machine.mac_ver()[0]


def versions() -> dict[str, str]:
    """Versions of what shapes a number."""
    names = ("mlxdpo", "mlx", "mlx-lm", "transformers", "numpy")
    return {"python": machine.python_version(), **{name: version_of(name) for name in names}}


@functools.cache
def version_of(name: str) -> str:
    """The version of a package that is installed; its metadata is read and parsed once."""
    return importlib.metadata.version(name)
