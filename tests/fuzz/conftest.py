"""Prints, after the fuzz tests, how many cases each target met and what came of them."""

import pytest
from counting import TALLY


@pytest.fixture(scope="session")
def private(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def private_cache(request, monkeypatch, private):
    """A cache of this session's own, but for the tokenizers, which are fetched once."""
    if request.node.get_closest_marker("tokenizers") is None:
        monkeypatch.setenv("MLXDPO_CACHE", private)


def pytest_terminal_summary(terminalreporter):
    if not TALLY:
        return
    terminalreporter.write_line("\nfuzz: target, cases = clean + refused with one sentence, tracebacks, silent drops")
    total = [0] * 5
    for target, seen in sorted(TALLY.items()):
        row = [seen[name] for name in ("cases", "clean", "refused", "tracebacks", "drops")]
        total = [a + b for a, b in zip(total, row, strict=True)]
        terminalreporter.write_line(_line(target, row))
    terminalreporter.write_line(_line("total", total))


def _line(name, row):
    cases, clean, refused, tracebacks, drops = row
    return f"  {name:<28}{cases:>7,} = {clean:>6,} + {refused:>6,}   {tracebacks:>3}   {drops:>3}"
