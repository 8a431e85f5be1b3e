"""A vote as the app writes it."""

VOTE = {
    "schema": 1, "id": "v1", "time": "2026-01-01T00:00:00.000+00:00", "prompt": [{"role": "user", "content": "Hi?"}],
    "a": "one", "b": "two", "winner": "a", "tuned": "b", "blind": True, "source": "heldout",
    "adapter": {"before": None, "after": "d" * 64}, "seconds": 1.5,
}  # fmt: skip
