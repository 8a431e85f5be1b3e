"""TensorBoard, W&B offline and Trackio with their real libraries: a run's curves are found again in their own files."""

import json
import struct
from collections import defaultdict

import pytest
from tiny_runs import recipe, stop_after

from mlxdpo.commands.trackers import tracked
from mlxdpo.runs import Run
from mlxdpo.training.run import train

pytestmark = pytest.mark.processes  # wandb starts its service

EVERY = ("tensorboard", "wandb", "trackio")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run that was interrupted and resumed, with all three trackers, nothing of it sent anywhere."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    for module in ("tensorboardX", "wandb", "trackio"):
        pytest.importorskip(module, reason="needs the trackers: pip install 'mlxdpo[track]'")
    config = recipe(tmp_path, log={"trackers": list(EVERY)}, train={"eval_every": 2}, data={"eval_fraction": 0.2})
    first = list(tracked(train(config, should_stop=stop_after(2)), config))
    assert first[-1].kind == "interrupted"
    last = list(tracked(train(config, resume=Run.open(config.out)), config))
    assert last[-1].kind == "done"
    return Run.open(config.out)


def test_the_curves_of_a_resumed_run_are_found_in_the_files_of_each_tracker(run, tmp_path):
    wanted = expected(run)
    assert len({step for step, _ in wanted["loss"]}) >= 4 and "eval_loss" in wanted
    found = {name: READERS[name](run, tmp_path) for name in EVERY}
    for name in EVERY:
        assert found[name].keys() == wanted.keys(), name
        for metric, curve in wanted.items():
            assert [step for step, _ in found[name][metric]] == [step for step, _ in curve], (name, metric)
            assert [value for _, value in found[name][metric]] == pytest.approx([v for _, v in curve], rel=1e-6), name


def expected(run):
    """{metric: [(step, value)]} of metrics.jsonl."""
    curves = defaultdict(list)
    for line in run.metrics():
        for name, value in line.items():
            if name != "step":
                curves[name].append((line["step"], value))
    return dict(curves)


def of_tensorboard(run, folder):
    """The scalars of all event files, in the order of steps."""
    from tensorboardX.proto.event_pb2 import Event

    curves = defaultdict(list)
    for file in sorted((run.path / "tensorboard").glob("events*")):
        rest = file.read_bytes()
        while rest:  # TFRecord: length, its checksum, the message, its checksum
            (size,) = struct.unpack("<Q", rest[:8])
            event = Event.FromString(rest[12 : 12 + size])
            for value in event.summary.value:
                curves[value.tag].append((event.step, value.simple_value))
            rest = rest[16 + size :]
    return {name: sorted(curve) for name, curve in curves.items()}


def of_wandb(run, folder):
    """The history of the offline files, which `wandb sync` sends: both have one id, so they become one run."""
    from wandb.proto.wandb_internal_pb2 import Record

    curves, ids = defaultdict(list), set()
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        for body in leveldb_records(file.read_bytes()[7:], offset=7):
            record = Record.FromString(body)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for name in values.keys() - {"_step", "_runtime", "_timestamp"}:
                    curves[name].append((values["_step"], values[name]))
    assert ids == {(run.path / "wandb_run_id.txt").read_text().strip()}
    return {name: sorted(curve) for name, curve in curves.items()}


def leveldb_records(data, offset):
    """The messages of a LevelDB log: blocks of 32 KiB, in them checksum, length, and whether a message is whole."""
    block, message = 32768, b""
    while len(data) >= 7:
        left = block - offset % block
        if left < 7:
            data, offset = data[left:], offset + left
            continue
        size, kind = struct.unpack("<HB", data[4:7])
        message += data[7 : 7 + size]
        data, offset = data[7 + size :], offset + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def of_trackio(run, folder):
    """The database, through Trackio's own reader."""
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_runs("mlxdpo") == [str(run.path)]  # one curve, also after it was resumed
    curves = defaultdict(list)
    for line in SQLiteStorage.get_logs("mlxdpo", str(run.path)):
        for name in line.keys() - {"step", "timestamp"}:
            curves[name].append((line["step"], line[name]))
    return {name: sorted(curve) for name, curve in curves.items()}


READERS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "trackio": of_trackio}
