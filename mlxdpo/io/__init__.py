"""Files: written whole or not at all, checked, digested, read with line numbers."""
