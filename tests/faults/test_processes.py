"""Signals, a closed terminal, a second run, a killed one's lock, memory, the clock: what a whole process does then."""

import contextlib
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from stages import LAUNCH, Place, check_run, environment, numbers, start
from tiny_runs import adapter_bytes, finish, recipe

from mlxdpo.commands.interrupt import stop_flag
from mlxdpo.config import dump_config
from mlxdpo.exporters import run
from mlxdpo.io.json_file import read_lines
from mlxdpo.machine.errors import error_message
from mlxdpo.machine.memory_guard import has_room
from mlxdpo.runs import HOLDER, Run
from mlxdpo.types import UserError

processes = pytest.mark.processes
SECTIONS = {"train": {"epochs": 8, "save_every": 1, "keep_checkpoints": 2}, "data": {"eval_fraction": 0.4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The straight run."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        finish(recipe(folder, "straight", **SECTIONS))
        yield folder


@pytest.fixture
def place(base, request):
    """A recipe of another run of the same."""
    own = base / request.node.name.replace("[", "-").rstrip("]")
    own.mkdir()
    (own / "cache").symlink_to(base / "cache")
    (own / "recipe.yaml").write_text(dump_config(recipe(base, f"{own.name}/run", **SECTIONS)))
    return Place(base, own)


def train(place: Place) -> list[str]:
    return ["slow", "train", str(place.own / "recipe.yaml")]


def resume(place: Place) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(LAUNCH), "cli", "train", "--resume", str(place.own / "run")],
        capture_output=True, text=True, env=environment(place), timeout=600,
    )  # fmt: skip


def arrived(place: Place) -> None:
    """The rest of the run is the straight run's."""
    done = resume(place)
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(place.own / "run") == adapter_bytes(place.base / "straight")
    assert numbers(place.own / "run") == numbers(place.base / "straight")
    check_run(place.own / "run")


def wait_for_step(place: Place, step: int, alive) -> None:
    file, until = place.own / "run" / "metrics.jsonl", time.monotonic() + 600
    while max((line.get("step", 0) for line in read_lines(file)), default=0) < step:
        assert alive() and time.monotonic() < until
        time.sleep(0.005)


@processes
def test_the_terminal_is_closed(place):
    """SIGHUP to a process whose terminal is gone: it saves, though it can say nothing any more."""
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests run under `nohup`, it would stay ignored
        os.execve(sys.executable, [sys.executable, str(LAUNCH), *train(place)], environment(place))
    os.set_blocking(terminal, False)
    wait_for_step(place, 3, lambda: _drained(terminal))
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    last = check_run(place.own / "run")
    assert 3 <= last < 24 and Run.open(place.own / "run").metrics()[-1]["step"] == last  # the last whole step is saved
    arrived(place)


def _drained(terminal: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        os.read(terminal, 100_000)
    return True


@processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_interrupted_it_saves_says_how_to_go_on_and_does(place, number):
    process = start(place, train(place))
    wait_for_step(place, 4, lambda: process.poll() is None)
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    run = place.own / "run"
    assert process.returncode == 130 and "Traceback" not in said
    assert said.rstrip().endswith(f"stopped; resume with: mlxdpo train --resume {run}")
    last = check_run(run)
    assert 4 <= last < 24 and Run.open(run).metrics()[-1]["step"] == last  # the last whole step is saved
    assert not (run / "adapter").exists()
    arrived(place)


@processes
def test_killed_again_and_again_it_still_arrives(place):
    for step in (2, 7, 13, 19):
        again = ["slow", "train", "--resume", str(place.own / "run")]
        process = start(place, again if step > 2 else train(place))
        wait_for_step(place, step, lambda process=process: process.poll() is None)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        check_run(place.own / "run")
    arrived(place)


@processes
def test_refusals_exit_2_with_one_sentence(place):
    done = resume(place)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {place.own}/run: no config.yaml in it; expected a run directory such as runs/NAME\n"
    )
    straight = place.base / "straight"
    (place.own / "recipe.yaml").write_text(dump_config(recipe(place.base, "straight", **SECTIONS)))
    process = start(place, train(place))
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and said.endswith(
        f"error: {straight} already holds a run; choose another --out or continue it with --resume {straight}\n"
    )


@processes
def test_ctrl_c_twice_stops_at_once_and_the_last_checkpoint_is_whole(place):
    process = start(place, train(place))
    wait_for_step(place, 3, lambda: process.poll() is None)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.001)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert any(line.startswith(("interrupted", "stopped; resume with")) for line in said.splitlines()), said
    assert check_run(place.own / "run") >= 2
    arrived(place)


def test_a_second_signal_does_not_wait():
    """Whatever the job does then."""
    with pytest.raises(KeyboardInterrupt), stop_flag() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGTERM)


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_flag() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


@processes
def test_a_second_run_in_the_same_directory_is_refused_by_number_and_a_dead_ones_lock_is_taken(place):
    process = start(place, train(place))
    wait_for_step(place, 2, lambda: process.poll() is None)
    process.send_signal(signal.SIGSTOP)  # it holds the directory as long as we like
    second = resume(place)
    assert second.returncode == 2 and second.stderr == (
        f"error: {place.own}/run: process {process.pid} is training this run; stop it first, or wait\n"
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (place.own / "run" / HOLDER).read_text() == f"{process.pid}\n"  # its note is still there and holds nothing
    arrived(place)
    assert not (place.own / "run" / HOLDER).exists()


def _create(config, barrier, answers) -> None:
    barrier.wait()
    try:
        Run.create(config)
    except UserError as error:
        answers.put(str(error))
    else:
        answers.put("made")


@processes
def test_of_two_that_begin_at_once_one_is_refused(tmp_path):
    """Both saw no run there; the one that writes second must not take the other's directory."""
    there = multiprocessing.get_context("spawn")
    barrier, answers = there.Barrier(2), there.Queue()
    configs = [recipe(tmp_path, train={"seed": seed}) for seed in (1, 2)]
    both = [there.Process(target=_create, args=(config, barrier, answers)) for config in configs]
    for process in both:
        process.start()
    for process in both:
        process.join(600)
    found = sorted(answers.get(timeout=600) for _ in both)
    assert found[1] == "made" or found[0] == "made"
    assert sum(answer == "made" for answer in found) == 1


@processes
@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
def test_memory_runs_out_between_two_steps(place):
    process = start(place, ["tight", "10", *train(place)[1:]])
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and "Traceback" not in said, said
    line = said.rstrip().splitlines()[-1]
    assert (
        "the next step may need" in line and "MB more memory than is available; close some programs, or lower" in line
    )
    assert line.endswith(f"then resume from the last checkpoint with: mlxdpo train --resume {place.own / 'run'}")
    assert check_run(place.own / "run") == 2  # nothing is lost
    arrived(place)


def test_room_is_asked_for_and_not_taken():
    before = mx.get_active_memory()
    assert has_room(1_000_000) and not has_room(1 << 60)
    assert mx.get_active_memory() == before


@pytest.mark.parametrize(
    ("error", "begins"),
    [
        (
            RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than ..."),
            "not enough memory (",
        ),
        (RuntimeError("[malloc] Unable to allocate 99 bytes."), "not enough memory ([malloc] Unable"),
        (MemoryError(), "not enough memory (Python could not allocate)"),
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device; free some space"),
        (OSError(5, "Input/output error"), "standard output: Input/output error; check the disk"),
    ],
)
def test_what_the_machine_says_is_one_sentence(error, begins):
    sentence = error_message(error)
    assert sentence is not None and sentence.startswith(begins) and "\n" not in sentence


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(2, "No such file", "a"), OSError("odd")])
def test_a_bug_stays_a_traceback(error):
    assert error_message(error) is None


def test_mlxs_memory_limit_changes_no_number(tmp_path, cache):
    """MLX takes it as advice: it waits for work to finish, and goes on."""
    finish(recipe(tmp_path, "a", train={"steps": 2}))
    before = mx.set_memory_limit(1_000)
    try:
        finish(recipe(tmp_path, "b", train={"steps": 2}))
    finally:
        mx.set_memory_limit(before)
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")


@processes
@pytest.mark.parametrize("jump", [-86_400.0, 3.2e8], ids=["a day back", "ten years on"])
def test_the_clock_jumps(tmp_path, cache, monkeypatch, jump):
    """In the middle of a run: the same bytes, and a time left that makes sense."""
    finish(recipe(tmp_path, "straight", **SECTIONS))
    real, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (jump if next(calls) % 2 else 0.0))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    events = finish(recipe(tmp_path, "run", **SECTIONS))
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "straight")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "straight")
    left = [event.values["seconds_left"] for event in events if event.kind == "step"]
    assert all(0 <= seconds < 600 for seconds in left) and left[-1] == 0
    assert all(event.values["tokens_per_second"] > 0 for event in events if event.kind == "step")


def test_an_earlier_export_comes_back_when_its_successor_was_killed(tmp_path):
    """Between the two renames: the earlier export lies in a hidden folder that nobody locks."""
    hidden = tmp_path / ".out-draft-01234567"
    (hidden / run.WAS).mkdir(parents=True)
    (hidden / run.WAS / "export.json").write_text("{}")
    with run.staged_export(tmp_path / "out"):
        pass
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["out", "out/export.json"]
