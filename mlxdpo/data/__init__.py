"""Rows: from where a user keeps them to batches of token ids. Nothing here knows a model or an objective."""
