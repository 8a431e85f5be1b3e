"""The MLX thread: everything on one thread, tasks in turn, errors to whoever asked, nothing left running."""

import threading
import time

import pytest

from mlxdpo.ui.engine import Engine


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
    order, both = [], threading.Barrier(2)

    def task(name):
        def steps():
            for _ in range(20):
                order.append(name)
                time.sleep(0.002)
                yield name

        return steps

    def user(name):
        both.wait()
        list(engine.stream(task(name)))

    users = [threading.Thread(target=user, args=(name,)) for name in "ab"]
    [thread.start() for thread in users]
    [thread.join() for thread in users]
    inside = "".join(order).strip("a").strip("b")
    assert "ab" * 5 in inside or "ba" * 5 in inside, order


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
    assert closed.wait(5)


def test_latest_drops_what_is_outdated_but_never_the_last(engine):
    def fast():
        for i in range(200):
            time.sleep(0.001)
            yield i

    seen = list(engine.latest(fast, 0.05))
    assert seen[-1] == 199 and 2 <= len(seen) < 30 and seen == sorted(set(seen))


def test_latest_raises_what_the_task_raised(engine):
    def broken():
        yield 1
        raise ValueError("late")

    with pytest.raises(ValueError, match="late"):
        list(engine.latest(broken, 0.01))
