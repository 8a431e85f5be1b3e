"""Run directories with one file changed: everything that opens a run, the app's pages among it, stays on its feet."""

import json
import random
import shutil
import struct

import pytest
import yaml
from counting import case, fuzzed
from mutating import ODD_TEXTS, SEEDS, dumped, mutate_bytes, mutate_value
from tiny_runs import finish, recipe
from votes import VOTE

from mlxdpo.cli import run as cli
from mlxdpo.exporters.record import read_record
from mlxdpo.exporters.run import export
from mlxdpo.exporters.sections import read_card_numbers
from mlxdpo.inference.trained_run import open_trained_run
from mlxdpo.model.adapters import read_settings
from mlxdpo.online.votes_to_pairs import export_votes
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.run import train
from mlxdpo.ui import choices
from mlxdpo.ui.runs.curves import Tail, follow_metrics
from mlxdpo.ui.runs.run_list import scan, summary_rows
from mlxdpo.ui.runs.tab import charts, checkpoints, difference, headline, measured, rounds
from mlxdpo.ui.runs.tasks import report_frame as report_view
from mlxdpo.ui.train.process import watch
from mlxdpo.ui.vote.tab import standing_html, votes_of
from mlxdpo_eval.compare import compare_runs
from mlxdpo_eval.judges.votes import problem_with
from mlxdpo_eval.report.rounds import write_rounds
from mlxdpo_eval.report.write import write_report

pytestmark = pytest.mark.fuzz

# No value that asks for work without end, or for more memory than there is: what it does is not in question here.
MILD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    [],
    {},
    [[]],
    {"a": 1},
    "x",
    "",
    "\0",
    "../x",
    "/etc/passwd",
    "nan",
    *ODD_TEXTS[:8],
]
STEP = "checkpoints/step-000004"
READ = ["config.yaml", "manifest.json", "metrics.jsonl", "adapter/adapter_config.json", f"{STEP}/state.json",
        "votes.jsonl", "eval/results", "eval/eval_pairs.jsonl", "eval/eval_samples.jsonl", "report.html",
        "../rounds.json",
        "job/job.json", "export.json"]  # fmt: skip
LOADED = ["config.yaml", "manifest.json", "adapter/adapter_config.json", "adapter/adapters.safetensors"]
RESUMED = ["config.yaml", "manifest.json", "metrics.jsonl", f"{STEP}/state.json", f"{STEP}/adapter_config.json",
           f"{STEP}/adapters.safetensors", f"{STEP}/optimizer.safetensors"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with votes, an evaluation and rounds around it; stopped at step 4 it can go on."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        config = recipe(folder, "runs/one", data={"eval_fraction": 0.3}, lora={"scale": 20.0}, train={"save_every": 2})
        finish(config)
        found = Run.open(config.out)
        assert (
            cli(["eval", config.out, "--judge", "longest", "--prompts", "3", "--samples", "1", "--max-tokens", "4"])
            == 0
        )
        (found.path / "votes.jsonl").write_bytes(
            dumped(VOTE) + b"\n" + dumped(dict(VOTE, id="v2", winner="b", prompt="Q")) + b"\n"
        )
        (found.path.parent / "rounds.json").write_bytes(dumped(rounds_json()))
        answers = {"answers": [{"prompt_id": "a", "prompt": "Hi?", "text": "yes", "scores": {"longest": 3.0}}]}
        for name in ("start.json", "one/eval/round.json"):
            (found.path.parent / name).write_bytes(dumped(answers))
        (found.path / "job").mkdir()
        (found.path / "job" / "job.json").write_text(
            '{"pid": 2147480000, "command": ["mlxdpo", "train"], "started": "x"}'
        )
        (found.path / "job" / "log.txt").write_text("step 3/5\n")
        exported = export(found, ["mlx"], folder / "out", pairs=2)
        shutil.copyfile(exported.out / "export.json", found.path / "export.json")
        yield found


def rounds_json():
    interval = {"estimate": 0.1, "low": 0.0, "high": 0.2}
    judge = {"name": "longest", "mean": 1.0, "interval": interval, "from_start": interval}
    row = {"round": 1, "run": "one", "parent": None, "kl": 0.1, "kl_per_token": 0.01, "kl_interval": interval,
           "judges": [judge], "texts": {"length": 3.0},
           "collected": {"rows": 2, "answers": 8, "answers_left_out": {}, "prompts_without_pair": {},
                         "mean_score": 1.0}}  # fmt: skip
    start = row | {"round": 0, "run": None}
    return {"format": 1, "judge": "longest", "second": None, "reference": "first", "every": None, "asked_for": 1,
            "stopped": None, "kept": 1, "rounds": [start, row]}  # fmt: skip


def file_of(run, name):
    if name == "eval/results":
        return sorted((run.path / "eval").glob("results_*.json"))[-1]
    return run.path / name


def changed(rng, file, odd=MILD):
    """The contents of a file, changed by its kind: values, lines, the header of an array file, or plain bytes."""
    raw = file.read_bytes()
    if rng.random() < 0.4 or file.suffix == ".html":
        return mutate_bytes(rng, raw)
    if file.suffix == ".yaml":
        return yaml.safe_dump(mutate_value(rng, yaml.safe_load(raw), odd=odd)).encode()
    if file.suffix == ".jsonl":
        rows = raw.splitlines(keepends=True)
        at = rng.randrange(len(rows))
        rows[at] = dumped(mutate_value(rng, json.loads(rows[at]))) + b"\n"
        return b"".join(rows)
    if file.suffix == ".safetensors":
        size = struct.unpack("<Q", raw[:8])[0]
        header = dumped(mutate_value(rng, json.loads(raw[8 : 8 + size])))
        return struct.pack("<Q", len(header)) + header + raw[8 + size :]
    return dumped(mutate_value(rng, json.loads(raw)))


def with_change(run, rng, names, look, odd=MILD):
    """Change one of the files, look, and put it back."""
    file = file_of(run, rng.choice(names))
    before = file.read_bytes()
    file.write_bytes(changed(rng, file, odd))
    try:
        look()
    finally:
        file.write_bytes(before)


@pytest.mark.filterwarnings("default::RuntimeWarning")  # figures of 1e308 overflow on the way to a plot
@fuzzed(20, 300, seed=SEEDS)
def test_readers(run, seed):
    rng, runs = random.Random(seed), run.path.parent

    def look():
        case("run: config", run.config)
        case("run: manifest", run.manifest)
        case("run: metrics", run.metrics)
        case("run: adapter settings", lambda: read_settings(run.adapter))
        case("run: progress", lambda: checkpoint.read_progress(run.path / STEP))
        case("run: votes", lambda: votes_of(run))
        case("run: findings", lambda: read_card_numbers(run))
        case("run: export record", lambda: read_record(run.path))
        case("run: report", lambda: write_report(run))
        case("run: compare", lambda: compare_runs(run, run))
        case("run: rounds report", lambda: write_rounds(runs))

    with_change(run, rng, READ, look)


def page_of(run):
    """Every part of the app that shows a run; it may say what is wrong, and must not break."""
    runs = run.path.parent
    assert summary_rows(runs) and "one" in scan(runs)
    tail = Tail(run.path / "metrics.jsonl")
    follow_metrics(tail)
    charts(tail, measured(run.path))
    checkpoints(run.path, tail)
    for view in (report_view, headline, rounds):
        view(run.path)
    difference(run.path, run.path)
    watch(run.path)
    choices.data_files(runs, runs)
    choices.models(runs, runs)
    choices.adapters(runs)
    choices.recipes(runs, runs)


@fuzzed(40, 700, seed=SEEDS)
def test_pages(run, seed):
    def look():
        case("run: app's pages", lambda: page_of(run))
        case("run: app's votes", lambda: standing_html(run.path / "votes.jsonl"))
        case("run: app's next round", lambda: export_votes(run, problem_with))

    with_change(run, random.Random(seed), READ, look)


@fuzzed(8, 150, seed=SEEDS)
def test_opening(run, seed):
    with_change(run, random.Random(seed), LOADED, lambda: case("run: reopen", lambda: open_trained_run(run)))


@fuzzed(5, 100, seed=SEEDS)
def test_exporting(run, tmp_path, seed):
    look = lambda: case("run: export", lambda: export(run, ["mlx"], tmp_path / str(seed), pairs=1))  # noqa: E731
    with_change(run, random.Random(seed), [*LOADED, "metrics.jsonl", "eval/results"], look)


@fuzzed(5, 150, seed=SEEDS)
def test_resuming(run, seed):
    """From the checkpoint of step 4, for a step: the file that was changed is refused, or does not matter."""
    rng = random.Random(seed)
    kept = {file: file.read_bytes() for file in sorted(run.path.rglob("*")) if file.is_file()}
    shutil.rmtree(run.path / "checkpoints" / "step-000005", ignore_errors=True)

    def resume():
        left = iter(range(3))
        for _ in train(run.config(), resume=run, should_stop=lambda: next(left, None) is None):
            pass

    try:
        with_change(run, rng, RESUMED, lambda: case("run: resume", resume))
    finally:
        for file, raw in kept.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(raw)
