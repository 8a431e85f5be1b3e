"""Who a set of weights is: a digest of their bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mlxdpo.digests import file_digest

SHAPING = (
    "model*.safetensors",
    "config.json",
    "hf_quant_config.json",
    "adapters.safetensors",
    "adapter_config.json",
)


def folder_digest(folder: Path, code: bool = False) -> str:
    """SHA-256 over the names and contents of the files in `folder` that shape a log-probability.

    `code` says that the folder's Python files are run (model.trust_remote_code), and so are among them.
    """
    patterns = (*SHAPING, "*.py") if code else SHAPING
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    parts = [f"{file.name} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
