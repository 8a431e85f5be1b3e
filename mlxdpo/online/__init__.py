"""Pairs from the policy itself: collected, judged, trained on, again."""
