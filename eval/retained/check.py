"""One check of the retained set."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class RetainedCheck(NamedTuple):
    """One item. It has four `options`, the first `right` of them right, or `passes`, which reads a written answer.

    An item with one option is a passage: its likelihood is measured.
    """

    area: str
    prompt: str
    options: tuple[str, ...] = ()
    passes: Callable[[str], bool] | None = None
    right: int = 1
