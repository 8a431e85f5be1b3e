"""Mutants that no test can notice, one by one with the reason: file, then what is changed where.

An entry that names no mutant of its file any more is reported as an error, so that the list cannot rot.
"""

from __future__ import annotations

EQUIVALENT: dict[str, dict[str, str]] = {}
