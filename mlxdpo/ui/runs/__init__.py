"""The Runs tab: what was trained, and how it went."""
