"""What sdist and wheels hold: `python .ci/artefacts.py SOURCE SDIST WHEEL_FROM_SDIST WHEEL_FROM_CHECKOUT`.

Exit status 1, and a line for each, when a file of the packages is missing, when the two wheels differ, or when licence,
tests or docs did not come along.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

IN_SDIST = ("LICENSE", "README.md", "pyproject.toml", "Makefile", "requirements/lock.txt", "tests/conftest.py",
            "tests/support/tiny_models.py", "docs/data.md", "docs/app-vote.png", "examples", ".ci/smoke")  # fmt: skip
LITTER = ("__pycache__", ".pyc", ".venv", ".hypothesis", ".bench")


def is_litter(name: str) -> bool:
    """Whether a file, named from the top of the checkout, was made by using or testing it."""
    return name.startswith("runs/") or any(word in name for word in LITTER)


def files_of(wheel: Path) -> dict[str, int]:
    """Files of a wheel with their CRC-32, without the record, which only lists them."""
    with zipfile.ZipFile(wheel) as archive:
        return {i.filename: i.CRC for i in archive.infolist() if not i.filename.endswith("/RECORD")}


def packaged(source: Path) -> Iterator[str]:
    """Every file below mlxdpo/ and eval/ under the name it must have in a wheel."""
    for folder, name in (("mlxdpo", "mlxdpo"), ("eval", "mlxdpo_eval")):
        for path in sorted((source / folder).rglob("*")):
            inside = path.relative_to(source / folder).as_posix()
            if path.is_file() and not is_litter(f"{name}/{inside}"):
                yield f"{name}/{inside}"


def problems(source: Path, sdist: Path, from_sdist: Path, direct: Path) -> Iterator[str]:
    """What is wrong, in words."""
    first, second = files_of(from_sdist), files_of(direct)
    for name in sorted(first.keys() ^ second.keys()):
        yield f"{name}: only in the wheel from the {'sdist' if name in first else 'checkout'}"
    for name in sorted(first.keys() & second.keys()):
        if first[name] != second[name]:
            yield f"{name}: differs between the wheel from the sdist and the one from the checkout"
    for name in packaged(source):
        if name not in first:
            yield f"{name}: not in the wheel"
    with tarfile.open(sdist) as archive:
        inside = {member.name.partition("/")[2] for member in archive.getmembers()}
    for name in IN_SDIST:
        if name not in inside:
            yield f"{name}: not in the sdist"
    for name in (*first, *inside):
        if is_litter(name):
            yield f"{name}: does not belong into a release"
    if not any(name.endswith("/LICENSE") for name in first):
        yield "LICENSE: not in the wheel"
    for name in first:
        if name.split("/")[0] not in ("mlxdpo", "mlxdpo_eval") and ".dist-info/" not in name:
            yield f"{name}: would land in site-packages under a name that is not ours"


def main(paths: list[str]) -> int:
    """Print what is wrong."""
    found = list(problems(*map(Path, paths)))
    print("\n".join(found) or f"wheel: {len(files_of(Path(paths[2])))} files, the same from sdist and checkout")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
