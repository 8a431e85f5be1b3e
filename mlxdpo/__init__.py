"""mlxdpo: Direct Preference Optimization on Apple silicon, in MLX."""

from mlxdpo.platform import preload_blas

preload_blas()
