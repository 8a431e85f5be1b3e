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


def test_where_items_end_together_late_the_share_of_the_work_counts():
    said, at = [], iter([0.0, 12.0, 24.0, 36.0])
    done = iter([0.4, 0.9])
    assert list(time_left("abc", 30, "answers", said.append, lambda: next(at), lambda: next(done, 0.9))) == list("abc")
    # Of the first of 30 items 18 s are left, not 5:48; once more items are done than the share says, they count.
    assert said[0] == "answers: 1 of 30, about 0:18 left"
    assert said[1] == "answers: 2 of 30, about 0:03 left" and len(said) == 3
