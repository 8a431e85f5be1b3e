"""The Compare tab: before and after side by side."""
