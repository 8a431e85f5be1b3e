"""What did the tune cost elsewhere? A bundled set of small checks with exact answers, before and after."""
