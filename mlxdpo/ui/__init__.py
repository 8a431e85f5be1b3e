"""The app: see a model before and after tuning, judge it blind, teach the next round.

`server.py` composes the page of tabs and opens it; a tab module has `build(runs, guard)`. Only `engine.py`
touches MLX, in one thread of its own. What a tab says is computed by functions that need no browser.
"""
