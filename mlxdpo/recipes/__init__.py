"""Recipes of other trainers, read into ours: `rules` of single keys, a table for each tool, and what is written."""
