"""Is the tuned model really preferred? Import name: mlxdpo_eval."""
