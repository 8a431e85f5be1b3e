"""What this machine is, and what MLX needs to be fast and safe on it."""
