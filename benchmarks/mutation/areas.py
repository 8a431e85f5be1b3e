"""Where faults are planted: the files that make the numbers, each with the quick tests that should notice."""

from __future__ import annotations

from benchmarks.mutation.covering import ROOT, Area

AREAS: dict[str, Area] = {
    "losses": Area(
        tuple(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "mlxdpo/losses").glob("*.py") if p.stem != "__init__")),
        ("tests/test_losses.py", "tests/test_objectives_docs.py"),
    ),
    "scoring": Area(("mlxdpo/scoring.py",), ("tests/test_scoring.py", "tests/test_details.py", "tests/test_packed.py")),
    "encode": Area(
        ("mlxdpo/data/encode.py", "mlxdpo/data/fit.py", "mlxdpo/data/render.py", "mlxdpo/data/template.py"),
        ("tests/test_encode.py", "tests/test_encode_rows.py"),
    ),
    "stats": Area(
        ("eval/stats.py", "eval/clustered.py"),
        ("tests/test_eval_stats.py", "tests/test_eval_clustered.py"),
    ),
}
"""What scoring, encoding and statistics were split into belongs to them: fit, render, template; clustered."""
