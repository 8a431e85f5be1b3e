"""Where faults are planted: the files that make the numbers, each with the quick tests that should notice."""

from __future__ import annotations

from benchmarks.mutation.covering import ROOT, Area


def _tests(*names: str) -> tuple[str, ...]:
    found = {path.stem: str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    return tuple(found[f"test_{name}"] for name in names)


AREAS: dict[str, Area] = {
    "losses": Area(
        tuple(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "mlxdpo/losses").glob("*.py") if p.stem != "__init__")),
        _tests("losses", "losses_parts", "objectives_docs"),
    ),
    "scoring": Area(("mlxdpo/forward/logprobs.py",), _tests("logprobs", "logprobs_paths", "details", "packed")),
    "encode": Area(
        ("mlxdpo/data/encode.py", "mlxdpo/data/render.py", "mlxdpo/data/template.py"),
        _tests("encode", "encode_rows", "template_probe"),
    ),
    "stats": Area(("eval/metrics/intervals.py",), _tests("eval_stats", "eval_clustered")),
}
"""What encoding was split into belongs to it: template."""
