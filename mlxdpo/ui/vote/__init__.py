"""The Vote tab: blind votes."""
