"""The benchmark against peers: the protocol with made-up processes, the turns, the figures, and our own switches."""

import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_model, write_model
from tiny_tokenizers import base_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of `benchmarks`, which no installation has

from bench_sides import JOB, tiny_entrants

from benchmarks.peers import adapter, models, report, results, workloads
from benchmarks.peers.__main__ import parse
from benchmarks.peers.environments import SWITCHES, switches_of
from benchmarks.peers.measure import Entrant, Record, measure, next_turn
from benchmarks.peers.sides.mlx_lm_lora import Turns
from benchmarks.peers.sides.protocol import Channel, Job, placed
from benchmarks.peers.worker import Gone, Worker
from mlxdpo.config import LoraConfig
from mlxdpo.model.adapters import attach_lora

FAKE = """
import itertools, os, threading
from benchmarks.peers.sides.protocol import serve

def run(job, channel):
    print("a trainer talks on standard output")
    channel.loaded([], job.switches, 1.5)
    for step in itertools.count(1):
        channel.go()
        with open(job.folder, "a") as file:
            file.write(job.model)
        if "killed" in job.switches and step == 2:
            os.kill(os.getpid(), 9)
        if "broken" in job.switches:
            raise ValueError("no such thing")
        if "slow" in job.switches:
            threading.Event().wait()
        channel.done(1 / step, 100 * step)

serve(run)
"""


@pytest.fixture
def fake(tmp_path):
    """(name, switches, sizes) -> an entrant whose process writes its name to turns.txt at every step."""

    def make(name, switches=(), sizes=(2, 2, 2), timeout=600.0):
        job = JOB | {"model": name, "switches": list(switches), "folder": str(tmp_path / "turns.txt")}
        start = lambda: Worker([sys.executable, "-c", FAKE], tmp_path / f"{name}.log", 1, timeout)  # noqa: E731
        return Entrant(start, job, list(sizes))

    return make


def test_sides_take_turns_and_the_order_rotates(fake, tmp_path):
    said = []
    records = measure({name: fake(name, ["hello"]) for name in "abc"}, said.append)
    assert (tmp_path / "turns.txt").read_text() == "abcbcacab"
    for record in records.values():
        assert record.losses == [1, 1 / 2, 1 / 3] and record.pairs == [2, 2, 2] and record.error is None
        assert record.peak_bytes == 300 and record.peak_rss_bytes > 1e6 and len(record.seconds) == 3
        assert record.reference_seconds == 1.5 and record.notes == ["hello"]
    assert "a trainer talks on standard output" in (tmp_path / "a.log").read_text()
    assert said[0] == "a: loaded; hello"


def test_a_side_that_dies_is_reported_and_the_others_go_on(fake):
    records = measure({"a": fake("a", ["killed"]), "b": fake("b"), "c": fake("c", ["broken"])}, lambda line: None)
    assert records["a"].error == "killed by the system: out of memory" and records["a"].losses == [1]
    assert records["b"].error is None and len(records["b"].losses) == 3
    assert records["c"].error == "ended with 1: ValueError: no such thing" and records["c"].losses == []


def test_a_side_that_hangs_is_ended(fake):
    """Loading may take as long as it likes; the first step gets a second, and takes for ever."""
    entrant = fake("a", ["slow"])
    worker = entrant.start()
    assert worker.ask(do="load", job=entrant.job)["ok"] == "load"
    worker.timeout = 1.0
    with pytest.raises(Gone, match="no answer within 1 s"):
        worker.ask(do="step")
    worker.close()
    assert worker.process.returncode == -9
    records = measure({"a": fake("a", ["slow"], timeout=1.0)}, lambda line: None)
    assert records["a"].error == "no answer within 1 s"


def test_a_process_takes_one_job_after_the_other(fake):
    entrant = fake("a")
    worker = entrant.start()
    for _ in range(2):
        assert worker.ask(do="load", job=entrant.job)["ok"] == "load"
        assert worker.ask(do="step")["loss"] == 1  # from the beginning again
    worker.close()
    assert worker.process.returncode == 0
    with pytest.raises(ValueError, match="closed"):
        worker.ask(do="step")


def test_a_warm_up_counts_for_nothing(fake, tmp_path):
    entrant = fake("a")
    entrant.warm = entrant.job | {"model": "w"}
    record = measure({"a": entrant}, lambda line: None)["a"]
    assert (tmp_path / "turns.txt").read_text() == "waaa" and record.losses == [1, 1 / 2, 1 / 3]
    assert record.peak_bytes == 300
    broken = fake("b", ["broken"])
    broken.warm = broken.job
    assert measure({"b": broken}, lambda line: None)["b"].error == "ended with 1: ValueError: no such thing"


def test_a_process_that_cannot_start_says_why(tmp_path):
    worker = Worker([sys.executable, "-c", "raise SystemExit('no torch here')"], tmp_path / "log", 1, 600)
    with pytest.raises(Gone, match="ended with 1: no torch here"):
        worker.ask(do="load", job={})
    worker.close()


def test_the_turn_goes_to_the_side_that_is_behind():
    sizes = {"a": [4, 4, 1], "b": [3, 3, 3]}
    records, order = {name: Record() for name in sizes}, ""
    while turn := next_turn(records, sizes):
        order += turn
        records[turn].pairs.append(sizes[turn][len(records[turn].pairs)])
    # pairs done before each turn: a0 b0, a4 b0, a4 b3, a4 b6, a8 b6, then a8 b9
    assert order == "abbaba" and [sum(r.pairs) for r in records.values()] == [9, 9]


def side(seconds, losses, pairs=2, **more):
    record = Record(seconds=seconds, losses=losses, pairs=[pairs] * len(seconds), peak_bytes=2 * 10**9)
    return record.as_dict() | more


def entry(same=True, **sides):
    about = {"what": "W", "shape": "2 pairs", "same": same, "machine": "here", "date": "2026-01-01"}
    return about | {"sides": {name.replace("_", "-"): record for name, record in sides.items()}}


LN2 = math.log(2)


def test_medians_and_ratios_by_hand():
    """Warm-up 9 and 50 s do not count. Ours 1, 2, 4: median 2. Theirs 4, 4, 5: median 4, so half as fast.

    Round by round ours / theirs is 1/4, 2/4, 4/5. Two pairs in 2 s are 1 pair a second, in 4 s half a pair.
    """
    ours, theirs = side([9, 1, 2, 4], [LN2, 0.6, 0.5, 0.4]), side([50, 4, 4, 5], [LN2, 0.6, 0.5, 0.4])
    mine, other = results.rows(entry(mlxdpo=ours, trl=theirs))
    assert mine == ("mlxdpo", 2, 1, 4, 1, 1, 1, 1, 2, None, "")
    assert other == ("trl", 4, 4, 5, 0.5, 0.25, 0.8, 0.5, 2, None, "")


def test_an_epoch_is_one_figure_with_its_reference():
    """Ours 3 s of reference and 2 + 1 s of steps: 6 s for 4 pairs. Theirs 12 s: half as fast."""
    ours = side([2, 1], [LN2, 0.6], reference_seconds=3.0)
    mine, other = results.rows(entry(same=False, mlxdpo=ours, trl=side([8, 4], [LN2, 0.2])))
    assert (mine.seconds, mine.low, mine.ratio, mine.pairs_per_second) == (6, None, 1, 4 / 6)
    assert (other.seconds, other.ratio, other.ratio_low) == (12, 0.5, None)


def test_an_unfinished_epoch_has_no_figure():
    mine, other = results.rows(entry(same=False, mlxdpo=side([2], [LN2]), trl=side([8], [LN2], error="killed")))
    assert mine.seconds == 2 and (other.seconds, other.trouble) == (None, "killed")


def test_sides_that_disagree_make_a_workload_void():
    fair = entry(mlxdpo=side([1, 1], [LN2, 0.5]), trl=side([1, 1], [LN2, 0.5004]))
    assert results.disagreement(fair) is None and results.gaps(fair) == ("mlxdpo", {"trl": pytest.approx(8e-4)})
    unfair = entry(mlxdpo=side([1, 1], [LN2, 0.5]), trl=side([1, 1], [LN2, 0.5006]))
    assert results.disagreement(unfair) == "loss of step 2: trl 0.500600, mlxdpo 0.500000"
    assert all(row.seconds is None and row.trouble.startswith("void: loss of step 2") for row in results.rows(unfair))
    assert "VOID" in report.table({"workloads": {"hh": unfair}})
    assert results.disagreement(entry(mlxdpo=side([1], [math.nan]), trl=side([1], [LN2])))
    assert results.disagreement(entry(trl=side([], [], error="killed"))) == "no side finished a step"


def against_exact(scored, *, same=True, **losses):
    """Sides with these losses of two steps, beside exact ones of ln 2 and 0.3; beta 0.1."""
    sides = {name: side([9, 1], [LN2, loss]) for name, loss in losses.items()} | {"exact": side([90, 80], [LN2, 0.3])}
    return entry(same=same, **sides) | {"scored": scored, "beta": 0.1}


def test_what_float32_rounds_in_thousands_of_tokens_is_allowed_against_float64():
    """6,000 tokens 1e-5 nats off, times a beta of 0.1: 0.006. With 100 tokens one part in a thousand is more."""
    assert results.disagreement(against_exact(6000, mlxdpo=0.3001, trl=0.3059)) is None
    off = "loss of step 2: trl 0.305900, exact 0.300000"
    assert results.disagreement(against_exact(5800, mlxdpo=0.3001, trl=0.3059)) == off
    assert results.disagreement(against_exact(100, mlxdpo=0.3001, trl=0.3059)) == off
    assert results.disagreement(against_exact(100, mlxdpo=0.3001, trl=0.3002)) is None


def test_without_float64_it_is_not_known_to_be_rounding():
    """Neither between trainers nor in an epoch, nor where the exact side came to nothing."""
    found = against_exact(6000, mlxdpo=0.3001, trl=0.3059)
    found["sides"]["exact"]["losses"] = []
    assert results.disagreement(found) == "loss of step 2: trl 0.305900, mlxdpo 0.300100"
    epoch = against_exact(6000, same=False, trl=0.3)
    epoch["sides"]["trl"]["losses"][0] = 0.695
    assert results.disagreement(epoch) == "loss of step 1: trl 0.695000, ln 2 0.693147"


def test_the_exact_side_has_no_row_and_no_bar():
    found = against_exact(6000, mlxdpo=0.3003, trl=0.303)
    assert [row.side for row in results.rows(found)] == [row.side for row in report.bars(found)] == ["mlxdpo", "trl"]
    assert "losses against float64: mlxdpo 1e-03, trl 1e-02; fastest peer: trl" in report.title("long", found)


def test_losses_far_from_the_start_are_not_compared():
    late = [0.5] * results.FIRST_STEPS
    assert results.disagreement(entry(mlxdpo=side([1] * 6, [*late, 0.1]), trl=side([1] * 6, [*late, 0.2]))) is None


def test_an_epoch_must_start_at_ln_2():
    assert results.disagreement(entry(same=False, mlxdpo=side([1], [LN2]), trl=side([1], [LN2 * 1.0005]))) is None
    off = results.disagreement(entry(same=False, mlxdpo=side([1], [LN2]), trl=side([1], [0.7])))
    assert off == "loss of step 1: trl 0.700000, ln 2 0.693147"


MIXED = {
    "workloads": {
        "hh": entry(
            mlxdpo=side([9, 2, 2], [LN2, 0.5, 0.4], versions={"mlx": "0.32.4"}),
            mlx_lm_lora=side([9, 4, 4], [LN2, 0.5, 0.4], notes=["not compiled"]),
            trl=side([9], [LN2], error="killed by the system: out of memory"),
        )
    }
}


def test_a_table_from_a_file(tmp_path, capsys, monkeypatch):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(MIXED))
    monkeypatch.setattr(sys, "argv", ["peers", "--from", str(file)])
    from benchmarks.peers.__main__ import main

    main()
    title, head, ours, peer, dead = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert title == "hh: W, 2 pairs; losses agree to 0e+00; fastest peer: mlx-lm-lora"
    assert head.split()[:3] == ["side", "seconds", "pairs/s"]
    assert ours.split() == ["mlxdpo", "2.00", "(2.00-2.00)", "1", "1.00x", "(1.00-1.00)", "2", "-"]
    assert peer.split() == ["mlx-lm-lora", "4.00", "(4.00-4.00)", "0.5", "0.50x", "(0.50-0.50)", "2", "-"]
    assert dead.split() == ["trl", "-", "-", "-", "2", "-", "killed", "by", "the", "system:", "out", "of", "memory"]


def test_the_page_is_written_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_page(MIXED, page)
    once = page.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert "| mlx-lm-lora | 4.00 (4.00-4.00) | 0.5 | 0.50x (0.50-0.50) | 2 | - |  |" in once
    assert "here; mlx 0.32.4; 2026-01-01. mlx-lm-lora: not compiled." in once
    report.write_page(MIXED, page)
    assert page.read_text() == once
    page.write_text("no markers")
    with pytest.raises(ValueError, match="expected one"):
        report.write_page(MIXED, page)


def test_the_docs_page_has_its_markers_and_names_every_workload():
    evidence = report.PAGE.read_text("utf-8")
    assert evidence.count(report.BEGIN) == evidence.count(report.END) == 1
    for workload in workloads.WORKLOADS.values():
        assert f"| `{workload.name}` |" in evidence
        if workload.prompt_tokens:
            assert f"{workload.prompt_tokens} + {workload.completion_tokens}" in evidence
    assert [s for s in SWITCHES["mlxdpo"] if f"`{s}`" not in evidence and f"`:{s}`" not in evidence] == []


def test_the_plot_has_a_bar_for_each_trainer(tmp_path):
    pytest.importorskip("matplotlib")
    assert [row.side for row in report.bars(MIXED["workloads"]["hh"])] == ["mlxdpo", "mlx-lm-lora", "trl"]
    report.write_plot(MIXED, tmp_path / "plot.svg")
    assert report.memory(results.rows(MIXED["workloads"]["hh"])[0]) == 2  # peak 2 GB, no figure of the process
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_checkpointed_rows_stand_in_where_only_they_ran():
    long = entry(mlxdpo=side([1, 1], [LN2, 0.5]), trl=side([], [], error="killed"))
    long["sides"]["trl:checkpoint"] = side([1, 3], [LN2, 0.5])
    assert [row.side for row in report.bars(long)] == ["mlxdpo", "trl:checkpoint"]


def test_shapes_are_made_of_real_text_in_order():
    shape = workloads.WORKLOADS["ranked"]
    plan = workloads.shape_plan(shape, list(range(100_000)), 0.25, 3)
    assert len(plan.pairs) == 6 and plan.batch_size == 6 and plan.same
    assert {(len(p["prompt"]), len(p["chosen"]), len(p["rejected"])) for p in plan.pairs} == {(48, 80, 80)}
    assert plan.pairs[0]["prompt"] + plan.pairs[0]["chosen"] == list(range(128))
    completions = Counter(p["chosen"][0] for p in plan.pairs) + Counter(p["rejected"][0] for p in plan.pairs)
    assert sorted(completions.values()) == [3, 3, 3, 3]
    assert plan.steps["trl"] == plan.steps["mlxdpo"] == [[0, 1, 2, 3, 4, 5]] * 3


def test_an_epoch_shows_every_side_the_same_pairs(tmp_path, cache):
    folder = write_model(tmp_path / "model", base_tokenizer(), "llama", seed=3)
    lines = [
        json.dumps({"prompt": f"user {i // 2}: blue", "chosen": f" red {i}", "rejected": " ok." * (i % 5 + 1)})
        for i in range(26)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    plan = workloads.epoch_plan(tmp_path / "pairs.jsonl", folder, 0.5, 512)
    seen = {name: sorted(itertools.chain(*steps)) for name, steps in plan.steps.items()}
    assert seen["mlxdpo"] == seen["mlx-lm-lora"] == seen["trl"] and not plan.same
    assert 8 < len(set(seen["trl"])) == len(seen["trl"]) < 20 < len(plan.pairs)
    assert set(seen["soup-cli"]) <= set(seen["trl"]) and len(seen["trl"]) - len(seen["soup-cli"]) < 4
    for name in ("mlx-lm-lora", "trl"):
        sizes = [len(step) for step in plan.steps[name]]
        assert sorted(sizes, reverse=True)[:-1] == [4] * (len(sizes) - 1)
    assert len(plan.steps["trl"][0]) == 4  # its short batch comes last


def test_the_adapter_stands_where_the_weights_are(tmp_path, cache):
    folder = write_model(tmp_path / "model", base_tokenizer(), "llama", seed=3)
    keys = ("self_attn.q_proj", "mlp.down_proj", "linear_attn.out_proj")
    adapter.write_adapter(folder, tmp_path / "adapter.safetensors", keys)
    arrays = mx.load(str(tmp_path / "adapter.safetensors"))
    assert len(arrays) == 3 * 2 * 2 and arrays["model.layers.2.mlp.down_proj.lora_a"].shape == (64, adapter.RANK)
    model = tiny_model("llama")
    attach_lora(model, LoraConfig(rank=adapter.RANK, keys=list(keys[:2])))
    assert {name for name, _ in placed(arrays, model)} == set(arrays)
    inside = {name.removeprefix("model."): a for name, a in arrays.items()}
    assert {name for name, _ in placed(inside, model)} == set(arrays)
    with pytest.raises(RuntimeError, match=r"the model and the adapter differ, e.g. by model\.layers\.2"):
        placed(dict(list(arrays.items())[4:]), model)


def test_other_models_have_what_their_adapters_are_for():
    for kind in models.KINDS.values():
        assert len(kind.keys) == len(set(kind.keys)) >= 2 and kind.sizes["num_hidden_layers"] <= 4
    assert parse(["--models", "all"]).models == ["smollm2", *models.KINDS]


def test_a_peer_gets_each_step_as_a_data_set(tmp_path, monkeypatch):
    """Length waits for the command once a step; a short last batch is announced before it is asked for."""
    (tmp_path / "pairs.json").write_text(
        json.dumps([{"prompt": [1, 2], "chosen": [i], "rejected": [7, i]} for i in range(3)])
    )
    job = Job(**JOB | {"pairs": str(tmp_path / "pairs.json"), "batches": [[2, 0], [1]]})
    log = []
    monkeypatch.setattr(Channel, "__init__", lambda self: None)
    monkeypatch.setattr(Channel, "go", lambda self: log.append("go"))
    monkeypatch.setattr(Channel, "done", lambda self, loss, peak: log.append(loss))
    turns = Turns(job, Channel())
    turns.args = type("Args", (), {"batch_size": 2})()
    assert (len(turns), len(turns), turns[0]["chosen"], turns[1]["rejected"]) == (2, 2, [1, 2, 2], [1, 2, 7, 0])
    assert turns[0]["chosen_prompt_length"] == turns[0]["rejected_prompt_length"] == 2 and job.longest() == 4
    turns.on_train_loss_report({"train_loss": 0.5})
    assert turns.args.batch_size == 1 and len(turns) == 1 and turns[0]["chosen"] == [1, 2, 1]
    assert log == ["go", 0.5, "go"]


ALL_SWITCHES = ["no-packing", "chunked-head", "ungrouped", "mlx-attention", "mlx-swiglu", "checkpoint", "no-lanes"]


@pytest.mark.processes
def test_our_side_computes_the_same_whatever_is_switched_off(tmp_path):
    """Three real processes over a tiny model: as it is, plain, and everything else off at once."""
    switched = {"mlxdpo": [], "plain": ["plain"], "all": ALL_SWITCHES}
    sides = {name: ("mlxdpo", switches) for name, switches in switched.items()}
    records = measure(tiny_entrants(tmp_path, "ranked", 3, sides), print)
    assert [record.error for record in records.values()] == [None] * 3
    losses = np.array([record.losses for record in records.values()])
    assert losses[:, 0] == pytest.approx(LN2, abs=1e-5)
    assert losses[0, 2] < LN2 - 0.01  # it learns, or agreement would say nothing
    assert np.ptp(losses, axis=0).max() < 1e-5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workloads", "epoch"], "needs --data"),
        (["--python", "torch=/x"], "expected SIDE=PATH"),
        (["--sides", "unsloth"], "unknown; known: mlxdpo"),
        (["--sides", "trl:plain"], "no switch plain; known: checkpoint"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert message in capsys.readouterr().err


def test_switches_of_the_default_sides_exist():
    for workload in [*workloads.WORKLOADS.values(), workloads.EPOCH]:
        assert [switches_of(name)[0] for name in workload.sides]
    assert {*ALL_SWITCHES, "plain"} == SWITCHES["mlxdpo"]
