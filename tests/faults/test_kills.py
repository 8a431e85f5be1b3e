"""`kill -9` at random moments of every stage: every file reads, and going on ends in the straight run's bytes."""

import contextlib
import io
import itertools
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from stages import STAGES, Place, Stage, start
from tiny_runs import finish, recipe
from tiny_words import WORDS, write_words

from mlxdpo.cli import run as cli
from mlxdpo.io.atomic import append_line
from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run

pytestmark = pytest.mark.usefixtures("laid_out")  # pictures too are compared with those of other processes
RECORD = Path(__file__).parents[2] / ".bench" / "faults.jsonl"
SEED = 20
# 100 kills, by how many different things each stage writes.
MANY = {"train": 28, "reference": 14, "encode": 14, "export": 14, "collect": 14}
VOTES = 16
FEW = {"train": 3, "votes": 2}  # of the others one


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the model, the pairs and a finished run."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "straight").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "straight" / "cache"))
        finish(recipe(folder, "straight/run", data={"eval_fraction": 0.4}))
        write_words(folder / "words" / "llama")  # a model whose answers are words
        rows = [{"prompt": f"the {a}", "chosen": " runs", "rejected": f" {a} sleeps"} for a in WORDS[:8]]
        (folder / "words" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        finish(recipe(folder / "words"))
    return folder


def place_in(base: Path, name: str) -> Place:
    (base / name).mkdir()
    return Place(base, base / name)


def straight(stage: Stage, place: Place) -> tuple[dict, float]:
    """What a stage ends in when nobody kills it, and for how many seconds it is at work."""
    process = start(place, stage.command(place))
    begun = until_at_work(stage, place, process)
    while stage.at_work(place) and process.poll() is None:
        time.sleep(0.001)
    lasts = time.monotonic() - begun
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return dict(stage.result(place)), lasts


def until_at_work(stage: Stage, place: Place, process) -> float:
    while not stage.at_work(place) and process.poll() is None:
        time.sleep(0.001)
    return time.monotonic()


def killed(stage: Stage, place: Place, seconds: float) -> bool:
    """Start the stage and kill it `seconds` after it was seen at work; whether it was alive then."""
    process = start(place, stage.command(place))
    until_at_work(stage, place, process)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode in (-signal.SIGKILL, 0), said
    return process.returncode != 0


def go_on(stage: Stage, place: Place) -> None:
    """The same command again, to its end."""
    arguments = stage.command(place)[1:]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setenv("MLXDPO_CACHE", str(place.cache))
        patch.chdir(place.own)
        assert cli(arguments) == 0, said.getvalue()


def kills(base: Path, name: str, count: int, record: bool) -> None:
    """Kill `count` processes of a stage, at moments spread at random over the time it is at work."""
    stage, draw = STAGES[name], random.Random(f"{SEED} {name}")
    whole = place_in(base, f"{name}-{count}-straight")  # the count: few and many kills have one base in `make faults`
    expected, lasts = straight(stage, whole)
    number, done = itertools.count(), 0
    while done < count:
        place = place_in(base, f"{name}-{count}-{next(number)}")
        if name == "export" and draw.random() < 0.5:  # over an earlier export, which stays until the new one is whole
            shutil.copytree(whole.own / "out", place.own / "out")
        share = draw.random()
        if not killed(stage, place, share * lasts) or not stage.at_work(place):
            shutil.rmtree(place.own)  # it was done before
            continue
        done += 1
        left = stage.left(place)
        go_on(stage, place)
        found = stage.result(place)
        wrong = [part for part in expected.keys() | found.keys() if found.get(part) != expected.get(part)]
        print(f"{name} {done}: killed at {share:.0%}: {left}")
        if record:
            append_line(RECORD, {"stage": name, "at": round(share, 3), "left": left, "wrong": wrong})
        assert not wrong, f"{place.own}: {wrong}"
        shutil.rmtree(place.own)


def vote_kills(base: Path, count: int, record: bool) -> None:
    """Kill processes that vote without a pause, one after the other, into one file."""
    draw, place, seen = random.Random(SEED), place_in(base, f"votes-{count}"), 0
    finish(recipe(base, f"votes-{count}/run", train={"steps": 1}))
    run = Run.open(place.own / "run")
    for number in range(count):
        process = start(place, ["votes", str(run.path), str(seen)])
        assert process.stdout is not None
        told = [process.stdout.readline()]  # it is at work
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        told += process.communicate(timeout=600)[0].splitlines()
        on_disk = [int(line["id"]) for line in read_lines(run.path / "votes.jsonl")]
        last = max(int(line) for line in told if line.strip())
        lost, again = last + 1 > len(on_disk), on_disk != list(range(len(on_disk)))
        print(f"votes {number + 1}: {last + 1} told, {len(on_disk)} on the disk")
        if record:
            left = f"{len(on_disk)} votes on the disk, {last + 1} told"
            append_line(
                RECORD, {"stage": "votes", "at": None, "left": left, "wrong": ["lost"] * lost + ["order"] * again}
            )
        assert not lost and not again
        seen = len(on_disk)


@pytest.mark.processes
@pytest.mark.parametrize("name", STAGES)
def test_killed_at_a_random_moment_it_goes_on_to_the_same_bytes(base, name):
    kills(base, name, FEW.get(name, 1), record=False)


@pytest.mark.processes
def test_no_vote_that_was_told_is_lost(base, cache):
    vote_kills(base, FEW["votes"], record=False)


@pytest.mark.faults
@pytest.mark.parametrize("name", STAGES)
def test_a_hundred_kills(base, name):
    kills(base, name, MANY[name], record=True)


@pytest.mark.faults
def test_a_hundred_kills_votes(base, cache):
    assert VOTES + sum(MANY.values()) == 100
    vote_kills(base, VOTES, record=True)
