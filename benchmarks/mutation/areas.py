"""Where faults are planted: the files that make the numbers, each with the quick tests that should notice."""

from __future__ import annotations

from benchmarks.mutation.covering import ROOT, Area


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


AREAS: dict[str, Area] = {
    "losses": Area(
        tuple(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "mlxdpo/losses").glob("*.py") if p.stem != "__init__")),
        _tests("losses", "losses_parts", "objectives_docs"),
    ),
    "scoring": Area(("mlxdpo/forward/logprobs.py",), _tests("scoring", "scoring_ways", "details", "packed")),
    "encode": Area(
        ("mlxdpo/data/encode.py", "mlxdpo/data/encode.py", "mlxdpo/data/render.py", "mlxdpo/data/template.py"),
        _tests("encode", "encode_rows", "template_probe"),
    ),
    "stats": Area(("eval/metrics/intervals.py",), _tests("eval_stats", "eval_clustered")),
}
"""What scoring, encoding and statistics were split into belongs to them: fit, render, template; clustered."""
