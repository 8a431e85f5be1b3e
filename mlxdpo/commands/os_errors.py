"""What stops a command though its input is right (a full disk, a folder that is read only, memory), in one sentence."""

from __future__ import annotations

import errno
from pathlib import Path

REMEDIES = {
    errno.ENOSPC: "free some space on this disk",
    errno.EDQUOT: "free some of your quota on this disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that you may write",
    errno.EPERM: "choose a folder that you may write",
    errno.EIO: "look at the disk, or at the terminal if it was closed",
    errno.EPIPE: "keep what reads the output open",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "close some programs, or lower train.batch_size",
}
NO_MEMORY = ("malloc", "allocate", "Insufficient Memory")  # what MLX says: it has one kind of error for everything


def error_message(error: BaseException) -> str | None:
    """The sentence, with the next step; None for everything else, which is a fault of the program."""
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = "standard output" if error.filename is None else str(error.filename)
        return f"{where}: {error.strerror}; {REMEDIES[error.errno]}{_then(error.filename)}"
    short = isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)
    if short or isinstance(error, MemoryError):
        detail = " ".join(str(error).split()) or "Python could not allocate"
        return (
            f"not enough memory ({detail}); close some programs, lower train.batch_size or data.max_length, or set "
            f"train.gradient_checkpointing true (mlxdpo plan tells what a run needs){_then(None)}"
        )
    return None


def _then(file: str | bytes | None) -> str:
    """How to go on: the run directory that a file belongs to is named."""
    parents = [] if file is None else Path(str(file)).parents
    run = next((folder for folder in parents if (folder / "config.yaml").exists()), None)
    return "" if run is None else f", then go on from the last checkpoint with: mlxdpo train --resume {run}"
