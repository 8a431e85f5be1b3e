"""What is said of a long loop: now and then, with the time left at the pace so far."""

from mlxdpo.io.progress import EVERY, time_left


def test_the_time_left_is_the_rest_at_the_pace_so_far():
    said, at = [], iter(range(0, 1000, 4))  # four seconds an item
    assert list(time_left("abcdefgh", 8, "answers", said.append, lambda: next(at))) == list("abcdefgh")
    assert EVERY == 10 and said == ["answers: 3 of 8, about 0:20 left", "answers: 6 of 8, about 0:08 left"]


def test_nothing_is_said_of_a_short_loop_or_at_its_end():
    said, at = [], iter([0, 1, 2, 60])
    assert list(time_left("abc", 3, "answers", said.append, lambda: next(at))) == list("abc")
    assert not said
