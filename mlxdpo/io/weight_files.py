"""Which files of a folder are a model's weights: one answer for loading, digest, plan and export.

An index decides. Where there is none, every `model*.safetensors` counts, unless they contradict one another. What is no
weights that can be read gets a sentence with the way out.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlxdpo.io.json_file import read_json
from mlxdpo.io.names import is_plain_name
from mlxdpo.types import UserError

INDEX = "model.safetensors.index.json"
PATTERN = "model*.safetensors"
SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
POINTER = b"version https://git-lfs"


def weight_files(folder: Path) -> list[Path]:
    """The weight files that count, by name, as far as they are there; none in a folder that has no weights."""
    index = folder / INDEX
    if index.is_file():
        return [folder / name for name in sorted(indexed_files(index)) if (folder / name).is_file()]
    return sorted(folder.glob(PATTERN))


def indexed_files(index: Path) -> set[str]:
    """The file names in a model's index.

    Raises `UserError` for one that is not a plain name beside the index: it would lead out of the model's folder.
    """
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index}: expected a `weight_map` of file names; download it again")
    for name in found.values():
        if not is_plain_name(name):
            raise UserError(f"{index}: {name[:80]!r} is not the name of a file in the same folder; it was not read")
    return set(found.values())


def left_over(folder: Path) -> list[str]:
    """Names of weight files that lie there and do not count."""
    return sorted({file.name for file in folder.glob(PATTERN)} - {file.name for file in weight_files(folder)})


def missing_files(folder: Path) -> list[str]:
    """Names of weight files that the index, or the numbers in the others' names, say are there, and that are not."""
    index = folder / INDEX
    if index.is_file():
        return sorted(name for name in indexed_files(index) if not (folder / name).is_file())
    numbered = [found for file in folder.glob(PATTERN) if (found := SHARD.fullmatch(file.name))]
    if len({found[2] for found in numbered}) != 1:
        return []
    count, width = int(numbered[0][2]), len(numbered[0][1])
    here, first = {int(found[1]) for found in numbered}, min(count, 1000)
    return [f"model-{i:0{width}d}-of-{numbered[0][2]}.safetensors" for i in range(1, first + 1) if i not in here]


def check_weight_files(folder: Path, name: str) -> list[Path]:
    """`weight_files`, whole. Raises `UserError` for files that are missing, contradict one another, or are none."""
    files = weight_files(folder)
    if missing := missing_files(folder):
        raise UserError(f"{name}: {missing[0]} is missing ({len(missing)} of its weight files); download it again")
    for file in files:
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                raise UserError(
                    f"{name}: {file.name} is a Git-LFS pointer, not the weights; run `git lfs pull` in that folder"
                )
    names = {file.name for file in files}
    if not (folder / INDEX).is_file() and "model.safetensors" in names and any(map(SHARD.fullmatch, names)):
        raise UserError(
            f"{name}: holds model.safetensors and shards of a model and no {INDEX} to say which count; "
            f"move one or the other away"
        )
    return files


@contextlib.contextmanager
def only_weights(folder: Path) -> Iterator[Path]:
    """A folder with the files of `folder` in which `model*.safetensors` finds the weights that count and nothing else.

    mlx-lm takes every file of that name, in the order of the file system. It is `folder` itself where that is the same.
    """
    files = weight_files(folder)
    if {file.name for file in files} == {file.name for file in folder.glob(PATTERN)}:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mlxdpo-weights-") as made:
        view, others = Path(made), [file for file in folder.iterdir() if file.suffix != ".safetensors"]
        for file in others:
            (view / file.name).symlink_to(file.resolve())
        for number, file in enumerate(files):
            (view / f"model-{number:05d}.safetensors").symlink_to(file.resolve())
        yield view
