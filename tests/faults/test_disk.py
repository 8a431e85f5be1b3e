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
from pathlib import Path

import pytest
from stages import LAUNCH, Place, check_run, environment, numbers
from tiny_runs import adapter_bytes, finish, recipe

from mlxdpo.cli import run as cli
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
    assert (
        "No space left on device; free some space on this disk, then resume from the last checkpoint with" in lines[0]
    )
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
    assert "Read-only file system; choose a writable folder" in lines[3]
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


COMMANDS = {
    "score": "score --model llama --data pairs.jsonl --out s.jsonl",
    "eval": "eval runs/one --judge longest --prompts 4 --max-tokens 4",
    "collect": "collect runs/one --prompts pairs.jsonl --judge longest --out c.jsonl --max-tokens 8 --unfinished keep",
    "export mlx": "export runs/one --to mlx --out e",
    "export peft": "export runs/one --to peft --out e",
    "export hf": "export runs/one --to hf --out e",
    "export fused": "export runs/one --to fused --out e",
    "import": "import --peft out --model llama --out start",
    "train": "train --model llama --data pairs.jsonl --data.template plain --train.steps 1 --out runs/two",
}
ON_A_DISK = """
    mount -t tmpfs -o size={size}k tmpfs {disk}
    cp -r {base}/. {disk}
    cd {disk}
    {spoil}
    {cli} {words} 2> {own}/err
    echo "status $?"
    {mend}
    ls -A {disk}
    echo listed
    eval "{cli} $(sed -n 's/.*then run it again: mlxdpo //p' {own}/err)"
    echo "again $?"
"""
STATES = {
    "full": ("cat /dev/zero > filler 2> /dev/null; true", "rm filler"),
    "read only": ("mount -o remount,ro {disk}", "mount -o remount,rw {disk}"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its model and pairs, and what it is for PEFT; paths are relative to the folder."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder.with_name("finished-cache")))
        patch.chdir(folder)
        recipe(folder, "runs/one")
        config = recipe(Path(), "runs/one", data={"eval": "pairs.jsonl"})
        finish(config)
        assert cli(["export", "runs/one", "--to", "peft", "--out", "out"]) == 0
    return folder


@needs_a_disk
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_the_file_and_goes_on_as_it_says(finished, tmp_path, name, state):
    """Nothing half-written is left, the source is not blamed, and the command that is printed works."""
    spoil, mend = (part.format(disk=tmp_path / "disk") for part in STATES[state])
    (tmp_path / "disk").mkdir()
    size = 1500 + sum(file.stat().st_size for file in finished.rglob("*")) // 1024
    text = ON_A_DISK.format(
        size=size, disk=tmp_path / "disk", base=finished, spoil=spoil, mend=mend, own=tmp_path,
        cli=f"{sys.executable} -m mlxdpo.cli", words=COMMANDS[name],
    )  # fmt: skip
    environ = os.environ | {"MLXDPO_CACHE": str(finished.with_name("finished-cache"))}
    done = subprocess.run(
        [*OWN_MOUNTS, "sh", "-c", textwrap.dedent(text)], capture_output=True, text=True, env=environ, timeout=600
    )
    said = (tmp_path / "err").read_text()
    assert said.startswith("error: ") and said.count("\n") == 1, said
    reason = {"full": "No space left on device", "read only": "Read-only file system"}[state]
    if (name, state) == ("train", "read only"):
        assert said == f"error: runs/two: cannot make the run directory ({reason})\n" and "status 2" in done.stdout
        return
    blamed = said.removeprefix("error: ").removeprefix(f"{tmp_path / 'disk'}/").partition(f": {reason}; ")[0]
    out = {"eval": "runs/one/eval", "collect": "c.jsonl", "score": "s.jsonl", "import": "start", "train": "runs/two"}
    assert blamed.startswith(out.get(name, "e")), said
    left = set(done.stdout.partition("status 1\n")[2].partition("listed")[0].split())
    resumable = {"c.jsonl.partial", "c.jsonl.lock"} if name == "collect" else set()
    assert left - resumable == {file.name for file in finished.iterdir()}
    # The tiny model's answers make no pairs: that all prompts were answered is what collecting again has to show.
    assert ("answered 18 of 18" if name == "collect" else "again 0") in done.stdout, done.stdout + done.stderr
