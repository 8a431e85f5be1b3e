"""Is the tuned model really preferred? Import name: mlxdpo_eval."""

import mlxdpo  # noqa: F401  (before mlx.core: it puts a fast BLAS in front)
