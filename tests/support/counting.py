"""One case: it ends in a clean result or in one printable sentence; whatever else happens fails, and all is counted."""

import os
from collections import Counter, defaultdict

from hypothesis import HealthCheck, given, settings

from mlxdpo.types import UserError

FULL = os.environ.get("MLXDPO_FUZZ") == "full"
TALLY = defaultdict(Counter)
"""Target -> counts of cases, and of what came of them."""


class SilentDrop(AssertionError):
    """Rows went in that neither came out nor were counted as refused."""


def case(target, call):
    """Run one case; its result, or None for input that was refused."""
    seen = TALLY[target]
    seen["cases"] += 1
    try:
        result = call()
    except UserError as error:
        check_sentence(str(error))
        seen["refused"] += 1
        return None
    except SilentDrop:
        seen["drops"] += 1
        raise
    except Exception:
        seen["tracebacks"] += 1
        raise
    seen["clean"] += 1
    return result


def check_sentence(said):
    """A line for each thing that is wrong, which any terminal can print, not a page."""
    for line in said.split("\n"):
        assert line.strip() and len(line) < 500, f"{len(line)} characters: {line[:600]}"
        assert line.isprintable(), repr(line)


def balanced(read, kept, refused):
    """Raise `SilentDrop` unless every row that went in came out or was counted."""
    if read != kept + refused:
        raise SilentDrop(f"{read} rows read, {kept} kept, {refused} refused")


def fuzzed(small, full, **strategies):
    """Hypothesis with `small` cases in an everyday run and `full` of them in `make fuzz`."""
    options = settings(
        max_examples=full if FULL else small,
        derandomize=not FULL,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: options(given(**strategies)(test))
