"""A disk that fills up, a folder that cannot be written: one sentence, exit status 1, and the run goes on afterwards.

The disk is a real one of a few hundred kilobytes (a tmpfs in a mount namespace of the test's own), where the system
allows that; a limit on the size of a file stands in for it everywhere.
"""

import functools
import os
import resource
import shutil
import subprocess
import sys
import textwrap

import pytest
from stages import LAUNCH, Place, check_run, environment, numbers
from tiny_runs import adapter_bytes, finish, recipe

from mlxdpo.config import dump_config
from mlxdpo.io.atomic import append_line, write_atomic, write_first
from mlxdpo.io.json_file import read_lines

pytestmark = pytest.mark.processes
SECTIONS = {"train": {"epochs": 2, "save_every": 1, "keep_checkpoints": 9}, "data": {"eval_fraction": 0.2}}
OWN_MOUNTS = ["unshare", "--mount", "--user", "--map-root-user"]


@functools.cache
def can_mount() -> bool:
    """Whether a process may mount a file system that only it sees."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run([*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


needs_a_disk = pytest.mark.skipif(not can_mount(), reason="this system lets no test mount a small disk")


@pytest.fixture
def place(tmp_path, cache):
    """The straight run, and the recipe of another."""
    finish(recipe(tmp_path, "straight", **SECTIONS))
    (tmp_path / "disk").mkdir()
    config = recipe(tmp_path, "disk/run", **SECTIONS)
    (tmp_path / "recipe.yaml").write_text(dump_config(config))
    return Place(tmp_path, tmp_path)


def script(place: Place, text: str) -> subprocess.CompletedProcess:
    """A shell script in its own mount namespace; `train` and `resume` stand for the command line."""
    python, disk = f"{sys.executable} {LAUNCH} cli train", place.own / "disk"
    names = f"""
        DISK={disk}
        train() {{ {python} {place.own}/recipe.yaml; }}
        resume() {{ {python} --resume $DISK/run; }}
    """
    return subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", textwrap.dedent(names + text)],
        capture_output=True, text=True, env=environment(place), cwd=place.own, timeout=600,
    )  # fmt: skip


def check_arrived(place: Place, run) -> None:
    assert adapter_bytes(run) == adapter_bytes(place.own / "straight")
    assert numbers(run) == numbers(place.own / "straight")
    check_run(run)


@needs_a_disk
def test_a_full_disk_is_one_sentence_and_with_room_it_goes_on(place):
    done = script(place, """
        mount -t tmpfs -o size=420k tmpfs $DISK
        train; echo "train $?" >&2
        cp -r $DISK/run kept
        mount -o remount,size=64m $DISK
        resume; echo "resume $?" >&2
        cp -r $DISK/run arrived
    """)  # fmt: skip
    lines = done.stderr.splitlines()
    assert lines[-2:] == ["train 1", "resume 0"] and len(lines) == 3, done.stderr
    assert "No space left on device; free some space on this disk, then go on" in lines[0]
    assert lines[0].endswith(f"mlxdpo train --resume {place.own / 'disk' / 'run'}")
    assert 1 <= check_run(place.own / "kept") < 6
    check_arrived(place, place.own / "arrived")


@needs_a_disk
def test_a_disk_that_becomes_read_only(place):
    done = script(place, """
        mount -t tmpfs -o size=64m tmpfs $DISK
        mount -o remount,ro $DISK
        train; echo "train $?" >&2
        mount -o remount,rw $DISK
        train; echo "train $?" >&2
        rm -r $DISK/run/adapter $DISK/run/checkpoints/step-00000[3-9]
        mount -o remount,ro $DISK
        resume; echo "resume $?" >&2
        mount -o remount,rw $DISK
        resume; echo "resume $?" >&2
        cp -r $DISK/run arrived
    """)  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 6, done.stderr
    assert lines[0] == f"error: {place.own}/disk/run: cannot make the run directory (Read-only file system)"
    assert (lines[1], lines[2], lines[4], lines[5]) == ("train 2", "train 0", "resume 1", "resume 0")
    assert "Read-only file system; choose a folder that can be written" in lines[3]
    check_arrived(place, place.own / "arrived")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; a read-only disk is tested instead")
def test_a_folder_without_permission(place):
    (place.own / "disk").chmod(0o555)
    process = subprocess.run(
        [sys.executable, str(LAUNCH), "cli", "train", str(place.own / "recipe.yaml")],
        capture_output=True, text=True, env=environment(place),
    )  # fmt: skip
    assert process.returncode == 2 and process.stderr.startswith(f"error: {place.own}/disk/run: cannot make")


def test_a_file_may_grow_no_further(place):
    """The same on any system: no file above 30 kB can be written, and an optimizer's state is larger."""
    again = [sys.executable, str(LAUNCH), "cli", "train", "--resume"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731
    process = subprocess.run(
        [sys.executable, str(LAUNCH), "cli", "train", str(place.own / "recipe.yaml")],
        capture_output=True, text=True, env=environment(place), preexec_fn=limit, timeout=600,
    )  # fmt: skip
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    said = process.stderr.splitlines()[-1]  # a fast BLAS of megabytes cannot be copied either, which is said before
    assert said.startswith("error: ") and "File too large; raise the limit of a file's size (ulimit -f), then" in said
    assert subprocess.run([*again, str(place.own / "disk" / "run")], env=environment(place)).returncode == 0
    check_arrived(place, place.own / "disk" / "run")


def test_half_a_line_is_no_line(tmp_path):
    """A line that did not fit is an error, and the next one takes its place."""
    script = f"""
        import resource, signal
        from pathlib import Path
        from mlxdpo.runs import append_line
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
        for number in range(9):
            append_line(Path({str(tmp_path / "lines.jsonl")!r}), {{"n": number, "text": "x" * 300}})
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert process.returncode == 1 and "File too large" in process.stderr
    file = tmp_path / "lines.jsonl"
    assert file.stat().st_size == 1000 and [line["n"] for line in read_lines(file)] == [0, 1, 2]
    append_line(file, {"n": 3})
    assert [line["n"] for line in read_lines(file)] == [0, 1, 2, 3]


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    (tmp_path / "a.json").write_text("before")

    def fails(draft):
        draft.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"a\.json"):
        write_atomic(tmp_path / "a.json", fails)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "before"


@pytest.mark.parametrize("links", [True, False])
def test_who_comes_second_does_not_replace_the_first(tmp_path, monkeypatch, links):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    write_first(tmp_path / "a", "first")
    with pytest.raises(FileExistsError):
        write_first(tmp_path / "a", "second")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "first"
