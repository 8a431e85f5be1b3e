"""Several processes are one: the same pairs a step, the same numbers, one run directory; and they end together."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import finish, recipe
from together import command, ended, simulated, start_group

from mlxdpo import cli
from mlxdpo.config import dump_config
from mlxdpo.data.planning import Outline, plan_epoch
from mlxdpo.distributed.group import ALONE, deal, recut
from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.distributed import concatenate_pairs, gather_pairs, gather_table, split_table
from mlxdpo.training.metrics import Scored
from mlxdpo.training.step import NonFiniteError, check_finite
from mlxdpo.types import Example, Pairs, UserError

SIZES = [1, 2, 3, 8]
TIMES = {"tokens_per_second", "seconds_left", "peak_memory_gb", "active_memory_gb", "cache_memory_gb"}
costs = st.lists(st.integers(1, 500).map(float), max_size=40)


@given(costs, st.integers(1, 9))
def test_every_batch_is_some_process_s_and_none_goes_empty_while_there_are_batches(pieces, size):
    owners = deal(pieces, size)
    assert len(owners) == len(pieces) and set(owners) <= set(range(size))
    assert len(set(owners)) == min(size, len(pieces))
    loads = [sum(c for c, owner in zip(pieces, owners, strict=True) if owner == rank) for rank in range(size)]
    # List scheduling (Graham 1966): no process has more than the mean of the others before its last piece, and that.
    assert max(loads) <= sum(pieces) / size + (1 - 1 / size) * max(pieces, default=0) + 1e-9


def test_the_costliest_batches_are_dealt_first():
    assert deal([1.0, 5.0, 3.0, 4.0], 2) == [0, 0, 1, 1]  # 5 | 4, 3 to the 4's, 1 to the 5's


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 9))
def test_a_step_cut_for_several_processes_holds_the_same_pairs(batch_size, accumulate, size):
    batch, count = recut(batch_size, accumulate, size)
    assert batch * count == batch_size * accumulate and batch <= batch_size
    assert count >= min(size, batch_size * accumulate)
    pairs = Outline(np.arange(50) % 7 + 3, np.arange(100).reshape(50, 2), np.arange(50) // 2)
    before, after = plan_epoch(pairs, batch_size, accumulate, 3, 1), plan_epoch(pairs, batch, count, 3, 1)
    sets = lambda plan: [sorted(i for indices in window for i in indices) for window in plan.windows]  # noqa: E731
    assert sets(before) == sets(after)


def test_what_needs_no_smaller_batches_keeps_them():
    assert (
        recut(4, 1, 2) == (2, 2) and recut(4, 4, 3) == (4, 4) and recut(3, 1, 2) == (1, 3) and recut(1, 1, 4) == (1, 1)
    )


@pytest.mark.parametrize("size", SIZES)
def test_sums_shares_and_answers_reach_every_process(size, monkeypatch):
    monkeypatch.setattr("mlxdpo.distributed.group.CHUNK", 64)  # several buffers
    draw = np.random.default_rng(0)
    trees = [
        {
            "a": [draw.normal(size=(3, 5)).astype(np.float32), draw.normal(size=40).astype(np.float32)],
            "n": np.array([r]),
        }
        for r in range(size)
    ]

    def work(peers):
        own = trees[peers.rank]
        tree = {"a": [mx.array(a) for a in own["a"]], "n": mx.array(own["n"])}
        total = peers.sum(tree)
        return (
            {"a": [np.array(a) for a in total["a"]], "n": np.array(total["n"])},  # a stream belongs to its thread
            peers.share(b"\x00\xffrecipe" * 30 if peers.first else b"other"),
            peers.each(bytes([peers.rank, 7])),
            (peers.agree(peers.rank == size - 1), peers.agree(False)),
        )

    for total, shared, each, answers in simulated(size, work):
        for at in range(2):
            assert total["a"][at] == pytest.approx(sum(t["a"][at] for t in trees), rel=1e-6, abs=1e-6)
        assert total["a"][0].shape == (3, 5) and total["n"].tolist() == [sum(range(size))]
        assert shared == b"\x00\xffrecipe" * 30 and each == [bytes([rank, 7]) for rank in range(size)]
        assert answers == (True, False)


def test_alone_nothing_is_touched():
    tree = {"a": mx.ones(3)}
    assert ALONE.sum(tree) is tree and ALONE.share(b"x") == b"x" and ALONE.agree(True) and not ALONE.agree(False)
    assert ALONE.mine([3.0, 1.0]) == [True, True]


def numbers(count, seed, shared):
    draw = np.random.default_rng(seed)
    column = lambda *shape: mx.array(draw.normal(size=(*shape, count)).astype(np.float32))  # noqa: E731
    two = {name: column(2) for name in ("shared", "ref_shared", "squares")} if shared else {}
    return Pairs(*(column() for _ in range(6)), weight=column(), **two)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shared", [False, True])
def test_pairs_come_together_in_the_order_of_the_plan_to_the_bit(size, shared):
    counts = [3, 1, 2, 3, 2]
    parts = [numbers(count, n, shared) for n, count in enumerate(counts)]
    parts[2] = parts[2]._replace(chosen=mx.array([float("nan"), float("inf")]))
    whole = concatenate_pairs(parts)

    def work(peers):
        mine = peers.mine([float(c) for c in counts])
        found = gather_pairs(peers, [p if own else None for p, own in zip(parts, mine, strict=True)], counts)
        return Pairs(*(None if a is None else np.array(a) for a in found))

    for found in simulated(size, work):
        for name, values in whole._asdict().items():
            got = getattr(found, name)
            assert (values is None) == (got is None), name
            assert values is None or np.array_equal(np.array(values), got, equal_nan=True)


def test_a_batch_that_two_computed_or_none_is_noticed():
    parts = [numbers(2, 0, False), numbers(1, 1, False)]
    once = gather_table(Pairs, parts, [2, 1])
    assert np.array_equal(split_table(mx.array(once))[0], np.concatenate([np.array(p.chosen) for p in parts]))
    for wrong in (gather_table(Pairs, [parts[0], None], [2, 1]), once + gather_table(Pairs, [parts[0], None], [2, 1])):
        with pytest.raises(RuntimeError, match="computed twice or not at all"):
            split_table(mx.array(wrong))


def test_a_pair_that_is_not_finite_in_another_process_is_named_in_all():
    good = [np.ones(2, np.float64)] * 7
    bad = [np.array([1.0, np.nan]), *[np.ones(2, np.float64)] * 6]
    part = type("Part", (), {"examples": [Example(*[np.zeros(1)] * 3, f"pairs.jsonl:{i}") for i in range(4)]})
    batches = [(3, 0), (1, 2)]

    def work(peers):
        own = [Scored(*good), None] if peers.first else [None, Scored(*bad)]
        summed = split_table(peers.sum(mx.array(gather_table(Scored, own, [2, 2]))))
        with pytest.raises(NonFiniteError, match=r"at pairs\.jsonl:2; the weights"):
            check_finite(part, batches, Scored(*summed))
        return True

    assert simulated(2, work) == [True, True]


def test_what_is_for_one_process_is_refused(monkeypatch, tmp_path, capsys):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"], ["127.0.0.1:2"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    monkeypatch.setenv("MLX_RANK", "0")
    assert cli.run(["iterate", "recipe.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: mlx.launch started 2 processes, and `mlxdpo iterate` is for one;")
    monkeypatch.setenv("MLX_RANK", "1")
    with pytest.raises(SystemExit) as status:  # one sentence for all
        cli.run(["eval", "runs/x"])
    assert status.value.code == 2 and capsys.readouterr().err == ""


def test_a_run_of_ppo_is_refused(monkeypatch, tmp_path):
    from mlxdpo.baselines.online import tune_on_samples
    from mlxdpo.config import Config

    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(UserError, match="stage ppo runs in one process; start it without"):
        next(tune_on_samples(Config(stage="ppo"), lambda *_: []))


# Whole processes from here on.

LONG = {
    "data": {"eval_fraction": 0.3},
    "train": {"epochs": 50, "steps": 50, "eval_every": 10, "save_every": 10, "keep_checkpoints": 9},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the model, the pairs, a cache, and the run of one process."""
    folder, patch = tmp_path_factory.mktemp("together"), pytest.MonkeyPatch()
    patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
    finish(recipe(folder, "one", **LONG))
    shutil.rmtree(folder / "cache")  # the others score the reference themselves
    yield folder
    patch.undo()


def written(folder, out, **sections):
    file = folder / f"{out}.yaml"
    file.write_text(dump_config(recipe(folder, out, **(sections or LONG))))
    return file


def check_equal(one, two, tolerance=1e-5):
    """The same lines of metrics but for times and memory, the same adapter."""
    lines = [Run(path).metrics() for path in (one, two)]
    assert len(lines[0]) == len(lines[1]) > 3
    for left, right in zip(*lines, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - TIMES:
            assert right[name] == pytest.approx(left[name], rel=tolerance, abs=tolerance), (name, left["step"])
    left, right = (mx.load(str(path / "adapter" / "adapters.safetensors")) for path in (one, two))
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert mx.abs(array - right[name]).max().item() <= tolerance, name


def wait_for_step(path, step, processes):
    until = time.monotonic() + 600
    while max((line.get("step", 0) for line in read_lines(path / "metrics.jsonl")), default=0) < step:
        assert time.monotonic() < until and all(p.poll() is None for p in processes), ended(processes)
        time.sleep(0.005)


@pytest.mark.processes
def test_fifty_steps_of_two_processes_are_those_of_one(place):
    launch = Path(sys.executable).with_name("mlx.launch")
    code = command("train", written(place, "two"))
    (place / "two.py").write_text(code)
    words = [launch, "-n", "2", "--starting-port", "41320", "--env", "OPENBLAS_NUM_THREADS=1", "--"]
    said = subprocess.run([*words, sys.executable, "two.py"], cwd=place, capture_output=True, text=True, timeout=600)
    assert said.stdout.count("step 50/50") == 2 and said.stdout.count("done: ") == 1, said  # a step, an evaluation
    assert [path.name for path in checkpoint.steps(place / "two/checkpoints")][-1] == "step-000050"
    check_equal(place / "one", place / "two")
    assert len(list((place / "cache" / "reference").glob("*.safetensors"))) == 1


OTHERS = {
    "recut": {"train": {"batch_size": 4, "gradient_accumulation": 1}, "data": {"eval_fraction": 0.3}},
    "uneven": {"train": {"batch_size": 1, "gradient_accumulation": 5}},
    "bco": {"loss": {"name": "bco_pair"}},
    "aot": {"loss": {"name": "aot"}},
    "dropout": {"lora": {"dropout": 0.2}},
    "moving": {"reference": {"sync_every": 2, "sync_alpha": 0.5}, "loss": {"ld_alpha": 0.5}},
    "sft": {"stage": "sft"},
    "reward": {"stage": "reward", "data": {"eval_fraction": 0.3}},
}
# A cache for each: rows scored in batches of another shape are a rounding off, and a tie is one no more.
RUN_ALL = """
import os, sys, mlxdpo
from pathlib import Path
from mlxdpo.config import load_config
from mlxdpo.distributed.group import joined
from mlxdpo.training.run import train
with joined() as peers:
    for file in {files!r}:
        os.environ["MLXDPO_CACHE"] = file + ".cache"
        for event in train(load_config(Path(file)), group=peers):
            pass
"""


@pytest.mark.processes
def test_other_objectives_stages_and_cuts_are_the_same_too(place, monkeypatch):
    files = [str(written(place, f"two-{name}", **sections)) for name, sections in OTHERS.items()]
    processes = start_group(place, 2, RUN_ALL.format(files=files))
    assert [status for status, _, _ in ended(processes)] == [0, 0]
    for name, sections in OTHERS.items():
        monkeypatch.setenv("MLXDPO_CACHE", str(place / f"cache-{name}"))
        finish(recipe(place, f"one-{name}", **sections))
        check_equal(place / f"one-{name}", place / f"two-{name}", tolerance=2e-5)


@pytest.mark.processes
def test_a_killed_process_ends_all_and_the_run_goes_on_with_another_number_of_them(place):
    path = place / "killed"
    processes = start_group(place, 3, command("train", written(place, "killed")))
    wait_for_step(path, 13, processes)
    processes[1].kill()
    found = ended(processes)
    assert [status for status, _, _ in found] == [1, -9, 1]
    last = checkpoint.read_progress(checkpoint.steps(path / "checkpoints")[-1]).step
    assert last >= 13 and found[2][2] == []  # the last whole step, not the last multiple of save_every
    assert len(found[0][2]) == 1
    assert found[0][2][0].startswith("error: lost connection to process 1 of 3 (") and found[0][2][0].endswith(
        f"; resume from the last checkpoint with: mlxdpo train --resume {path}"
    )
    run = Run.open(path)
    finish(run.config(), run)
    check_equal(place / "one", path)


@pytest.mark.processes
def test_when_process_0_is_killed_another_one_says_so(place):
    path = place / "headless"
    processes = start_group(place, 2, command("train", written(place, "headless")))
    wait_for_step(path, 12, processes)
    processes[0].kill()
    found = ended(processes)
    assert [status for status, _, _ in found] == [-9, 1]
    assert found[1][2] == [
        "error: lost connection to process 0 of 2 (127.0.0.1); resume from the last checkpoint with: "
        f"mlxdpo train --resume {path}"
    ]
    assert checkpoint.read_progress(checkpoint.steps(path / "checkpoints")[-1]).step >= 10


@pytest.mark.processes
def test_a_process_that_falls_silent_ends_all(place):
    path, patch = place / "silent", "from mlxdpo.distributed import heartbeat as h; h.SILENCE, h.BEAT = 10, 1"
    processes = start_group(place, 2, command("train", written(place, "silent"), patch=patch))
    wait_for_step(path, 11, processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        ((status, _, errors),) = ended(processes[:1])
    finally:
        processes[1].kill()
        processes[1].communicate()
    assert status == 1 and ": no heartbeat for 10 seconds; resume" in errors[-1]
    assert checkpoint.read_progress(checkpoint.steps(path / "checkpoints")[-1]).step >= 11


@pytest.mark.processes
@pytest.mark.parametrize("asked", [0, 1])
def test_asked_to_stop_one_all_stop_at_the_same_step_and_go_on_as_others(place, asked):
    path = place / f"stopped-{asked}"
    if asked:  # 2 -> 1
        processes = start_group(place, 2, command("train", written(place, path.name)))
    else:  # 1 -> 2
        processes = start_group(place, 1, command("train", written(place, path.name)))
    wait_for_step(path, 7, processes)
    processes[asked].send_signal(signal.SIGINT)
    found = ended(processes)
    assert {status for status, _, _ in found} == {130} and all(errors == [] for _, _, errors in found)
    assert f"stopped; resume with: mlxdpo train --resume {path}" in found[0][1]
    again = ended(start_group(place, 1 if asked else 2, command("train", "--resume", path)))
    assert {status for status, _, _ in again} == {0}, again
    check_equal(place / "one", path)


@pytest.mark.processes
def test_another_machine_s_trouble_is_told_once(place, tmp_path):
    there, other = tmp_path / "there", tmp_path / "other"
    for folder in (there, other):
        folder.mkdir()
    config = recipe(place, "elsewhere", **LONG).model_dump(mode="json")
    config["data"]["path"] = "own.jsonl"
    (place / "elsewhere.yaml").write_text(json.dumps(config))
    rows = (place / "pairs.jsonl").read_text()
    (there / "own.jsonl").write_text(rows)
    code = command("train", place / "elsewhere.yaml")
    missing = ended(start_group(place, 2, code, {0: there, 1: other}))
    assert [status for status, _, _ in missing] == [2, 2]
    assert missing[0][2][-1].startswith("error: process 1 of 2 (") and "own.jsonl" in missing[0][2][-1]
    (other / "own.jsonl").write_text(rows.replace("red", "rad"))
    differs = ended(start_group(place, 2, code, {0: there, 1: other}))
    assert [status for status, _, _ in differs] == [2, 2] and differs[1][2] == []
    assert "process 1 of 2 has a different data from process 0" in differs[0][2][-1]
    assert not (place / "elsewhere").exists()
