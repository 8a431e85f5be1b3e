"""What Python calls first: `tune`, `evaluate`, `generate`, `open_run`, own objectives. `import mlxdpo` offers them."""
