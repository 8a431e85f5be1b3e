"""Whether the memory that a step takes can still be had, asked before each batch so that a run stops while it can save.

MLX on a CPU does not look at what the system's allocator answers: where there is no memory the process is gone without
a word. So the system is asked first, for address space that is given back at once: no page of it is touched.

macOS is not asked: it grants address space whatever its memory is, compresses and swaps, and Metal refuses what it
cannot hold with an error that MLX raises.
"""

from __future__ import annotations

import errno
import mmap
import sys
from pathlib import Path

import mlx.core as mx

MARGIN = 64_000_000  # bytes, besides what MLX counts: Python, the checkpoint that is written, threads


def has_room(size: int) -> bool:
    """Whether `size` bytes could be allocated now, by limits of the process (ulimit -v, -d) and of the system."""
    try:
        with mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
            return True
    except OSError:
        return False


class MemoryGuard:
    """What the steps so far took at their peak, and whether another one like that fits.

    A step larger than any before it is not foreseen here; `mlxdpo plan` foresees the largest one.
    """

    def __init__(self) -> None:
        self.short_of = 0

    def short(self) -> bool:
        """Whether the next batch would not fit; never on macOS, where asking tells nothing."""
        if sys.platform == "darwin":
            return False
        free = mx.get_active_memory() + mx.get_cache_memory()  # MLX has it already
        needed = max(0, mx.get_peak_memory() - free) + MARGIN
        self.short_of = 0 if has_room(needed) else needed
        return bool(self.short_of)

    def raise_if_low(self, where: Path) -> None:
        """Raise `OSError` (ENOMEM) naming the folder `where`, if that was so when last asked."""
        if self.short_of:
            need = f"the next step may need {self.short_of / 1e6:,.0f} MB more memory than is available"
            raise OSError(errno.ENOMEM, need, str(where))
