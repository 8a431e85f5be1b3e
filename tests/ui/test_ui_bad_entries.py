"""One bad entry among the runs and files takes no list down; it is shown as what it is, in every list alike."""

import os
import shutil

import pytest
from tiny_desk import desk_over, finished_run

from mlxdpo.io.json_file import read_json, read_lines
from mlxdpo.types import UserError
from mlxdpo.ui import choices
from mlxdpo.ui.runs.run_list import runs_in, scan, state, summary_rows, tuned_runs_in

SPOILED = [
    "config.yaml", "manifest.json", "metrics.jsonl", "votes.jsonl", "rounds.json", "report.html",
    "adapter/adapters.safetensors", "eval/results_1.json", "job/job.json", "job/lock", "job/log.txt",
    "data/pairs.jsonl",
]  # fmt: skip
KINDS = {
    "a pipe": os.mkfifo,
    "a folder": lambda file: file.mkdir(),
    "a broken link": lambda file: file.symlink_to("nowhere"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "rubbish": lambda file: file.write_bytes(b"\xff\xfe\0[: {"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    finished_run(folder)
    return folder


def lists(place):
    """Every list of the page."""
    runs = place / "runs"
    desk = desk_over(place)
    found = [
        list(scan(runs)), summary_rows(runs), list(tuned_runs_in(runs)), list(runs_in(runs)), desk.names(),
        choices.data_files(runs, place), choices.models(runs, place), choices.adapters(runs),
        list(choices.recipes(runs, place)),
    ]  # fmt: skip
    for one in found:
        str(one).encode()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_file_takes_no_list_down(place, name, kind):
    bad = place / "runs" / "bad"
    shutil.copytree(place / "runs" / "one", bad)
    try:
        file = bad / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        KINDS[kind](file)
        scanned, rows, tuned, *_ = lists(place)
        assert set(scanned) == {"one", "bad"} and "one" in tuned and len(rows) == 2
        if name == "config.yaml":
            assert (
                state(bad) == "unreadable" and tuned == ["one"] and ["bad", "unreadable"] in [row[:2] for row in rows]
            )
        from mlxdpo.ui.runs import tab, tasks
        from mlxdpo.ui.train.tab import shown_training

        assert "bad" in shown_training(place / "runs", "bad")
        for shown in (tasks.report_frame, tab.rounds):
            assert isinstance(shown(bad), str)
        assert "bad" in tab.compared(place / "runs", "one", "bad") or "setting" in tab.compared(
            place / "runs", "one", "bad"
        )
    finally:
        shutil.rmtree(bad)


def test_names_that_are_no_text_and_links(place):
    odd = os.fsencode(place / "runs") + b"/n\xff"
    shutil.copytree(os.fsencode(place / "runs" / "one"), odd)
    (place / "runs" / "linked").symlink_to("one")
    os.mkfifo(place / "pipe.yaml")
    os.mkfifo(place / "pipe.jsonl")
    with open(os.fsencode(place) + b"/d\xff.jsonl", "w") as file:
        file.write("{}\n")
    try:
        scanned, rows, tuned, near, named, data, *_ = lists(place)
        assert set(scanned) == {"one", "n\ufffd"}
        assert tuned == list(near) == named == ["one"], "links are followed in no list"
        assert ["n\ufffd", "unreadable"] in [row[:2] for row in rows]
        assert not [name for name in data if "pipe" in name or name[0] == "d"]
    finally:
        shutil.rmtree(odd)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, lambda file: list(read_lines(file))):
        for file in (tmp_path / "pipe", tmp_path):
            with pytest.raises(UserError, match="cannot be read \\(not a file\\)"):
                read(file)
