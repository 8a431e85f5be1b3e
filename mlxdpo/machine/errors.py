"""What stops a command though its input is right (a full disk, a folder that is read only, memory, macOS that stops
work on the GPU), in one sentence."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlxdpo.machine.device import cache_folder

REMEDIES = {
    errno.ENOSPC: "free some space on this disk",
    errno.EDQUOT: "free some of your disk quota",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "choose a folder with write permission",
    errno.EPERM: "choose a folder with write permission",
    errno.EIO: "check the disk, or whether the terminal was closed",
    errno.EPIPE: "keep the reader of the output open",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close some programs",
    errno.ENOMEM: "close some programs, or lower train.batch_size",
}
NO_MEMORY = ("malloc", "allocate", "Insufficient Memory", "CallbackErrorOutOfMemory")
"""What MLX says of memory: it has one kind of error for everything."""
STOPPED = (
    "ImpactingInteractivity",
    "CallbackErrorTimeout",
    "CallbackErrorHang",
    "InnocentVictim",
    "SubmissionsIgnored",
)
"""How macOS names that it stopped work on the GPU; the last two are said of what came after that."""
SHORT_ROWS = "vector kernels do not produce a logsumexp"  # of a gradient through attention of at most 8 queries
METAL = {
    SHORT_ROWS: "a row of at most 8 tokens met Metal's attention, which has no "
    "gradient for one; set the environment variable MLX_SDPA_VJP_FALLBACK=1 and report the recipe: no row should be "
    "that short",
    "NYI: attention sinks": "Metal's attention has no gradient for a model with attention sinks (gpt-oss); set "
    "the environment variable MLX_SDPA_VJP_FALLBACK=1, which takes more memory for long rows",
    "No Metal device": "this session of macOS has no GPU, as in a sandbox, a virtual machine or without a login; start "
    "it in Terminal on the Mac itself or over ssh into it, and see what `mlxdpo doctor` says",
    "the default metallib": "MLX cannot load its kernels for this Mac; install it again: pip install --force-reinstall "
    "mlx mlx-metal",
}
"""Part of what MLX says on Metal, and the sentence for it."""


def gpu_was_stopped(error: BaseException) -> bool:
    """Whether macOS stopped the program's work on the GPU: another process may well get through."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in STOPPED)


def error_message(error: BaseException, words: Sequence[str] = ()) -> str | None:
    """The sentence, with the next step and the error's notes; None for all else, which is a fault of the program.

    `words` are the command line: what goes on depends on the command, and not on whose file it was.
    """
    sentence = _sentence(error, words)
    return None if sentence is None else "; ".join([sentence, *getattr(error, "__notes__", ())])


def _sentence(error: BaseException, words: Sequence[str]) -> str | None:
    if isinstance(error, OSError) and error.errno in REMEDIES:
        file = error.filename2 or error.filename  # of two files (a copy), the second is the one that was written
        where = "standard output" if file is None else STAGED.sub(r"\1", os.fsdecode(file))
        elsewhere = f", or set MLXDPO_CACHE to another folder ({cache_folder()} now)" if _in_cache(file) else ""
        return f"{where}: {error.strerror}; {REMEDIES[error.errno]}{elsewhere}{_then(file, words)}"
    detail = " ".join(str(error).split()).rstrip(".")
    if gpu_was_stopped(error):
        return (
            f"macOS stopped the work on the GPU because it blocked the display or took too long ({detail}); let the "
            f"display sleep (train --keep-awake keeps the Mac itself awake), lower train.batch_size or "
            f"data.max_length, and see docs/mac.md"
        )
    short = isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)
    if short or isinstance(error, MemoryError):
        return (
            f"not enough memory ({detail or 'Python could not allocate'}); close some programs, lower train.batch_size "
            f"or data.max_length, or set train.gradient_checkpointing true (mlxdpo plan estimates what a run needs)"
            f"{_then(None, words)}"
        )
    if not isinstance(error, RuntimeError | ValueError):
        return None
    return next((f"{says} ({detail})" for part, says in METAL.items() if part in str(error)), None)


STAGED = re.compile(r"\.([^/]+)-draft-[^/]{8}(?=/|$)")
"""A folder that is renamed when it is complete: what is said names it as the user did."""


def _in_cache(file: str | bytes | None) -> bool:
    return file is not None and Path(os.fsdecode(file)).is_relative_to(cache_folder())


def _then(file: str | bytes | None, words: Sequence[str]) -> str:
    """The command that goes on: a training's own, where it has begun a run; else the same one again."""
    again = f", then run it again: {shlex.join(['mlxdpo', *words])}" if words else ""
    if words and words[0] != "train":
        return again
    given = [value for name, _, value in _given_options(words) if name in ("--out", "--resume")]
    folders = [*map(Path, given), *([] if file is None else Path(os.fsdecode(file)).parents)]
    run = next((folder for folder in folders if (folder / "config.yaml").exists()), None)
    return again if run is None else f", then {resume_hint(run)}"


def _given_options(words: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Options with their values, as --name value or --name=value."""
    for word, following in zip(words, [*words[1:], ""], strict=False):
        yield word.partition("=") if "=" in word else (word, "=", following)


def resume_hint(run: Path) -> str:
    """The command that goes on with a run."""
    return f"resume from the last checkpoint with: {shlex.join(['mlxdpo', 'train', '--resume', str(run)])}"
