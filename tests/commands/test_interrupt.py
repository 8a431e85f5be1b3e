"""A terminal that is gone does not end a job: on any write to it the system answers with an input/output error."""

import errno
import os
import pty

import pytest

from mlxdpo.commands.interrupt import outliving_the_terminal


@pytest.fixture
def outputs(tmp_path):
    """Descriptors 1 and 2 in files of their own, and as they were afterwards."""
    kept = [os.dup(number) for number in (1, 2)]
    with (tmp_path / "out").open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    yield
    for number, own in zip((1, 2), kept, strict=True):
        os.dup2(own, number)
        os.close(own)


def test_a_line_to_a_closed_terminal_is_lost_and_the_next_ones_too(outputs):
    ours, theirs = pty.openpty()
    os.dup2(theirs, 1)
    os.close(theirs)
    os.close(ours)
    with pytest.raises(OSError, match=rf"\[Errno {errno.EIO}\]"):
        os.write(1, b"nobody reads this")
    with outliving_the_terminal():
        os.write(1, b"nor this")
    assert os.write(1, b"and this goes nowhere") == 21
    assert os.fstat(1).st_rdev == os.stat(os.devnull).st_rdev


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_written_is_no_terminal(outputs, number):
    with pytest.raises(OSError, match=rf"\[Errno {number}\]"), outliving_the_terminal():
        raise OSError(number, os.strerror(number))
