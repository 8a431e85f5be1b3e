"""How far along a long loop is, and how long the rest will take, said now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Say = Callable[[str], None]
EVERY = 10.0  # seconds between two lines


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def time_left(
    items: Iterable[Item],
    total: int,
    doing: str,
    say: Say,
    now: Callable[[], float] = time.monotonic,
    share: Callable[[], float] = lambda: 0.0,
) -> Iterator[Item]:
    """Hand on `items`, of which there are `total`, and say "DOING: 40 of 240, about 1:10 left" every `EVERY` seconds.

    The time left is what the rest takes at the pace so far. Nothing is said of a loop that is done sooner. Where items
    end together, late, `share` says how much of the work is done at least, from 0 to 1.
    """
    started = said = now()
    for done, item in enumerate(items, 1):
        yield item
        here = now()
        if done < total and here - said >= EVERY:
            said = here
            part = max(done / total, share())
            say(f"{doing}: {done} of {total}, about {clock((here - started) / part * (1 - part))} left")


def saying_left(doing: str, say: Say) -> Callable[[Sequence[Item]], Iterator[Item]]:
    """`time_left` for the steps of a loop that somebody else runs over: a sequence to the same items, one by one."""
    return lambda items: time_left(items, len(items), doing, say)
