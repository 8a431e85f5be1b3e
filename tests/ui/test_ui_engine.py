"""The MLX thread: everything on one thread, tasks in turn, errors to whoever asked, nothing left running."""

import queue
import threading
import time
from collections import deque

import pytest

from mlxdpo.ui.engine import Engine, _latest

LONG = 600  # seconds: only a hang takes them


@pytest.fixture(scope="module")
def engine():
    return Engine()


def test_values_come_in_order_and_from_one_thread(engine):
    def task():
        for i in range(5):
            yield i, threading.get_ident()

    first, second = list(engine.stream(task)), list(engine.stream(task))
    assert [i for i, _ in first] == [0, 1, 2, 3, 4]
    assert {thread for _, thread in first + second} == {first[0][1]} and first[0][1] != threading.get_ident()


def test_two_tasks_take_turns(engine):
    """The thread is held up until both are in its inbox; from then on they alternate, without exception."""
    order, begun, ready = [], threading.Event(), threading.Event()

    def held():
        begun.set()
        yield ready.wait(LONG)

    def task(name):
        def steps():
            for _ in range(20):
                order.append(name)
                yield name

        return steps

    engine.begin(held)
    assert begun.wait(LONG)
    engine.begin(task("a"))
    last = threading.Thread(target=lambda: list(engine.stream(task("b"))))
    last.start()
    while engine._inbox.qsize() < 2:
        time.sleep(0.001)
    ready.set()
    last.join()
    assert "".join(order) == "ab" * 20


def test_an_error_reaches_who_asked_and_the_thread_lives_on(engine):
    def broken():
        yield 1
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        list(engine.stream(broken))
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 // 0)
    assert engine.call(lambda: 7) == 7


def test_leaving_early_ends_the_task(engine):
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    stream = engine.stream(endless)
    assert next(stream) == 1
    stream.close()
    assert closed.wait(LONG)


class Arrivals:
    """Values 0 to 199, one every millisecond of a clock that only waiting moves; then the end."""

    def __init__(self):
        self.now, self.values = 1.0, deque((1 + i / 1000, ("value", i)) for i in range(200))
        self.values.append((1.2, ("end", None)))

    def get(self, timeout):
        due, found = self.values[0]
        if timeout is not None and due > self.now + timeout:
            self.now += timeout
            raise queue.Empty
        self.now = max(self.now, due)
        return self.values.popleft() and found


def test_latest_shows_the_newest_of_every_fifty_milliseconds(monkeypatch):
    arrivals = Arrivals()
    monkeypatch.setattr(time, "monotonic", lambda: arrivals.now)
    assert list(_latest(arrivals, 0.05)) == [0, 50, 100, 150, 199]


def test_latest_never_drops_the_last(engine):
    seen = list(engine.latest(lambda: iter(range(200)), 0.05))
    assert seen[-1] == 199 and seen == sorted(set(seen))


def test_latest_raises_what_the_task_raised(engine):
    def broken():
        yield 1
        raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        list(engine.latest(broken, 0.01))
