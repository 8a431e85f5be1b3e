"""Every architecture that transformers and mlx-lm share computes what torch computes, or is refused.

A tiny random model is saved by transformers itself and loaded by us; completions of unequal length, beyond sliding
window and original rotary length, are scored by the way that training takes. Tolerance 1e-3 nats a completion.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of `benchmarks`, which no installation has

from benchmarks.models.__main__ import WORDS
from benchmarks.models.measure import compare
from benchmarks.models.tiny import VARIANTS, shared_types

# transformers warns about names that its own models still use.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8").partition("<!-- models: end")[0]
CASES = [(kind, "", {}) for kind in shared_types()] + [
    (kind, name, changes) for kind, some in VARIANTS.items() for name, changes in some.items()
]


@pytest.mark.parametrize(("kind", "name", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_log_probs(kind, name, changes):
    found = compare(kind, changes)
    print(f"{found.verdict}: {found.gap} nats, mlx-lm alone: {found.alone}; {found.note}")
    assert found.verdict != "different", f"{found.gap} nats off"
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{kind}{name and f': {name}'}` |"))
    assert f"| {WORDS[found.verdict]} |" in line, "run `make models`"


def test_most_are_equal():
    verdicts = [
        line.split(" | ")[1] for line in PAGE.splitlines() if line.startswith("| `") and ":" not in line.split("|")[1]
    ]
    assert sum(word.startswith("equal") for word in verdicts) >= 70 and len(verdicts) == len(shared_types())
