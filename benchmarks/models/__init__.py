"""Every architecture that transformers and mlx-lm share, held against torch: `python -m benchmarks.models`."""
