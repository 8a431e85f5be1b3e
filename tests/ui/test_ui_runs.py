"""The Runs tab without a browser: states, curves of long and growing files, charts, reports, differences."""

import itertools
import json
import math
import re
import shutil
import threading

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_runs import finish, recipe, stop_after

from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo.ui.runs import run_list, tab, tasks
from mlxdpo.ui.runs.chart import HEIGHT, LEFT, WIDTH, Series, chart, frame_of, tick_step
from mlxdpo.ui.runs.curves import PIECE, POINTS, SAMPLES, Tail, follow_metrics, points, thinned
from mlxdpo.ui.widgets import html_table

EVIL = "<script>alert(1)</script>"


def write(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def step(n, loss=0.5):
    return {"step": n, "loss": loss, "rewards/margins": 0.1}


def held(n, loss=0.6):
    return {"step": n, "eval_loss": loss, "eval_rewards/accuracies": 0.75}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """A finished run and an interrupted one, trained once."""
    folder = tmp_path_factory.mktemp("two_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        finish(recipe(folder, "runs/done"))
        finish(recipe(folder, "runs/cut", train={"epochs": 9}), stop=stop_after(8))
    return folder / "runs"


@pytest.fixture
def runs(two_runs, tmp_path, cache):
    """A finished run, an interrupted one, and a job that failed before there was a run."""
    shutil.copytree(two_runs, tmp_path / "runs")
    (tmp_path / "runs" / "fell" / "job").mkdir(parents=True)
    (tmp_path / "runs" / "fell" / "job" / "job.json").write_text("{}")
    (tmp_path / "runs" / "no-run").mkdir()
    return tmp_path / "runs"


def test_the_list_says_what_each_run_is(runs):
    found = {row[0]: row for row in run_list.summary_rows(runs)}
    assert found.keys() == {"done", "cut", "fell"}
    assert [found[name][1] for name in ("done", "cut", "fell")] == ["finished", "interrupted", "failed"]
    metrics = Run.open(runs / "done").metrics()
    last = [line for line in metrics if "loss" in line][-1]
    assert found["done"][2:6] == ["llama", "pairs.jsonl", "5", f"{last['loss']:.4f}"]
    with Run.open(runs / "cut").exclusive():
        assert run_list.state(runs / "cut") == "training"
    assert run_list.state(runs / "cut") == "interrupted"


@pytest.mark.parametrize("name", ["../runs/done", "..", "/etc", "done/../cut", "no-run", "", None, "done/adapter"])
def test_only_what_was_found_can_be_chosen(runs, name):
    with pytest.raises(UserError, match="there is no run"):
        run_list.choose(runs, name)


def test_a_page_that_looks_does_not_keep_a_training_from_its_lock(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert not run.held()
    stop = threading.Event()

    def look():
        while not stop.is_set():
            run.held()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(200):
            with run.exclusive():
                pass
    finally:
        stop.set()
        thread.join()


def test_win_rate_and_accuracy_come_from_the_files(runs):
    write(runs / "done" / "metrics.jsonl", [held(5)])
    (runs / "done" / "eval").mkdir()
    (runs / "done" / "eval" / "results_1.json").write_text(json.dumps({"winrates": [{"rate": 0.25}]}))
    (runs / "done" / "eval" / "results_2.json").write_text(json.dumps({"winrates": [{"rate": 0.625}, {"rate": 0.1}]}))
    assert run_list.summary("done", runs / "done")[6:] == ["75.0%", "62.5%"]


def test_newest_finds_the_last_lines_of_a_long_file(tmp_path):
    file = tmp_path / "metrics.jsonl"
    write(file, [held(0), *(step(n) for n in range(1, 20_000)), held(19_999, 0.125)])
    file.open("a").write('{"step": 20000, "lo')
    last, evaluated = run_list.newest(file)
    assert last["step"] == 19_999 and evaluated["eval_loss"] == 0.125
    assert run_list.newest(tmp_path / "none") == ({}, {})


def test_following_a_file_gives_what_reading_it_gives(tmp_path):
    run, tail = Run(tmp_path), Tail(tmp_path / "metrics.jsonl")
    assert not follow_metrics(tail)
    write(tail.file, [held(0), step(1), step(2), held(2), step(3)])
    assert follow_metrics(tail) and not follow_metrics(tail)
    with tail.file.open("a") as out:
        out.write('{"step": 4, "loss"')  # a step being written is not a step yet
        out.flush()
        assert not follow_metrics(tail) and tail.steps[-1]["step"] == 3
        out.write(": 0.5}\n")
    assert follow_metrics(tail) and tail.steps[-1]["step"] == 4
    write(tail.file, [{"resumed_from": 2}, step(3, 0.25)])
    assert follow_metrics(tail)
    assert tail.steps + tail.evals == sorted(run.metrics(), key=lambda line: "eval_loss" in line)
    write(tail.file, [{"resumed_from": 0}, held(0), step(1)])
    follow_metrics(tail)
    assert [line["step"] for line in tail.steps + tail.evals] == [1, 0] == [1, run.metrics()[0]["step"]]


def test_another_file_under_the_same_name_begins_again(tmp_path):
    tail = Tail(tmp_path / "metrics.jsonl")
    write(tail.file, [step(1), step(2)])
    follow_metrics(tail)
    write(tmp_path / "new", [step(1, 0.125)])
    (tmp_path / "new").replace(tail.file)
    assert follow_metrics(tail) and tail.steps == [step(1, 0.125)]


def test_a_million_lines_open_at_once(tmp_path):
    file, count = tmp_path / "metrics.jsonl", 1_000_000
    rest = ', "loss": 0.5, "rewards/chosen": 0.25, "rewards/rejected": -0.25, "rewards/margins": 0.5}\n'
    with file.open("w") as out:
        for n in range(1, count + 1):
            out.write(f'{{"step": {n}{rest}')
            if n % 1000 == 0:
                out.write(json.dumps(held(n)) + "\n")
    tail = Tail(file)
    assert follow_metrics(tail)
    curve = points(tail.steps, "loss")
    assert 0.9 * POINTS <= len(curve) <= POINTS and curve[0][0] == 1 and curve[-1][0] == count
    assert all(a[0] < b[0] for a, b in itertools.pairwise(curve))
    assert tail.sampled and tail.evals and tail.evals[-1]["step"] == count
    assert tail.read <= (SAMPLES + 2) * PIECE < file.stat().st_size / 10
    read = tail.read
    write(file, [step(count + 1)])
    assert follow_metrics(tail) and tail.read - read < 200 and tail.steps[-1]["step"] == count + 1


def test_curves_stay_thin_while_they_grow(tmp_path):
    tail = Tail(tmp_path / "metrics.jsonl")
    for start in range(1, 10_001, 500):
        write(tail.file, [step(n) for n in range(start, start + 500)])
        follow_metrics(tail)
        assert len(tail.steps) <= 2 * POINTS and tail.steps[-1]["step"] == start + 499
    assert thinned(list(range(5)), 3) == [0, 2, 4]


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, 0.2), (0, 10, 2), (0.55, 0.75, 0.05), (-0.6, 0.4, 0.2), (0, 27, 10)]
)
def test_ticks_are_round(low, high, expected):
    assert math.isclose(tick_step(low, high), expected)


@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(-1e9, 1e9)), min_size=1, max_size=30))
@example([(0, 5e-324)])
def test_every_point_lies_inside_the_chart(found):
    frame = frame_of([Series("a", found, "line", 0)])
    for x, y in (frame.place(*point) for point in found):
        assert LEFT - 0.01 <= x <= WIDTH and -0.01 <= y <= HEIGHT


def test_a_chart_says_its_numbers_and_escapes_its_words():
    one = chart(EVIL, [Series("loss", [(1, 0.5), (2, 0.25)], "line", 0), Series("x, held out", [(2, 0.75)], "dots", 1)])
    assert EVIL not in one and "&lt;script&gt;" in one
    assert "loss 0.25 at step 2" in one and "<title>step 2\nloss 0.25\nx, held out 0.75</title>" in one
    assert one.count("<circle") == 1 and one.count("<polyline") == 1
    assert "Nothing measured yet." in chart("t", [Series("loss", [(1, math.nan)], "line", 0)])


def test_charts_show_a_real_run(runs):
    tail = Tail(runs / "done" / "metrics.jsonl")
    follow_metrics(tail)
    shown = tab.charts(tail, {"drift": {"kl": 2.5}})
    assert [title for title, _ in tab.CHARTS] == re.findall(r"<figcaption>(.*?)</figcaption>", shown)
    assert "evaluated at the end 2.5 at step 5" in shown
    assert "No step yet" in tab.charts(Tail(runs / "none"), {})
    rows = tab.checkpoints(runs / "done", tail)
    assert [row[0] for row in rows] == ["step-000005", "step-000004", "step-000002"]
    assert rows[0][-1].startswith("newest") and rows[1][2] == f"{tail.steps[3]['loss']:.4f}"


def test_a_report_is_framed_and_inert(tmp_path):
    assert "mlxdpo eval" in tasks.report_frame(tmp_path)
    (tmp_path / "report.html").write_text(f'<p class="a">{EVIL}</p>')
    framed = tasks.report_frame(tmp_path)
    assert 'sandbox=""' in framed and EVIL not in framed
    assert 'srcdoc="&lt;p class=&quot;a&quot;&gt;&lt;script&gt;' in framed


def test_only_settings_that_differ_are_listed(tmp_path):
    for name, text in (("a", "lora: {rank: 8, keys: [q]}\nout: x\n"), ("b", "lora: {rank: 16, keys: [q]}\nout: y\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text + ("stage: sft\n" if name == "b" else ""))
    assert tab.difference(tmp_path / "a", tmp_path / "b") == [
        ["lora.rank", "8", "16"],
        ["stage", "(not set)", "sft"],
    ]
    assert tab.difference(tmp_path / "a", tmp_path / "a") == []


def test_tables_escape_every_cell():
    html = html_table(EVIL, [EVIL], [[EVIL, EVIL]], EVIL)
    assert EVIL not in html and html.count("&lt;script&gt;") == 4 and html.count('class="chosen"') == 1
