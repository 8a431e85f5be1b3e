"""Memory, time and arithmetic of a run before it starts."""
