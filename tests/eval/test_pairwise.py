"""`mlxdpo_eval.winrate`: files of other harnesses, what stands beside their numbers, and a machine without MLX."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import mlxdpo_eval
from mlxdpo import UserError
from mlxdpo_eval.annotations import FORMATS, read_annotations
from mlxdpo_eval.metrics.intervals import clustered_share
from mlxdpo_eval.metrics.length import length_controlled

winrate = mlxdpo_eval.winrate

# Rows in the shape of each harness's own files, written here.
ALPACA = [
    {"instruction": f"q{i}", "output_1": "x" * 9, "output_2": "y" * (5 + i % 7), "generator_1": "base",
     "generator_2": "m", "annotator": "a", "preference": p}
    for i, p in enumerate([1.0, 2.0, 1.5, 0, 1.9, None, 1.2, 2.0, 1.0, 1.7])
]  # fmt: skip
ARENA = [
    {"uid": f"u{i}", "model": "m", "judge": "j", "category": "hard_prompt",
     "games": [None if a is None else {"score": a, "judgment": {}}, {"score": b, "judgment": {}}]}
    for i, (a, b) in enumerate([("A>B", "A>>B"), ("B>>A", "A>B"), ("A=B", "B>A"), (None, "A>B"), ("A<<B", "A<B")])
]  # fmt: skip
MT_BENCH = [
    {"question_id": 81 + i // 2, "model_1": "m", "model_2": "base", "g1_winner": one, "g2_winner": two,
     "judge": ["gpt-4", "pair-v2"], "turn": 1 + i % 2}
    for i, (one, two) in enumerate(
        [("model_1", "model_1"), ("model_1", "model_2"), ("tie", "tie"), ("model_2", "model_2"), ("error", "model_1"),
         ("model_1", "model_1")]
    )
]  # fmt: skip
REWARDBENCH = [
    {"id": str(i), "subset": "Math", "scores": s, "num_correct": 1}
    for i, s in enumerate([[2.0, 1, 0, 0], [1.0, 1, 0, 0], [[0.0], [3.0], [0.0], [1.0]], [5.0, 1, 2, 3]])
]
INSPECT = {
    "version": 2,
    "samples": [
        {"id": i // 2, "epoch": 1 + i % 2, "input": "q", "scores": {"match": {"value": v}}}
        for i, v in enumerate(["C", "I", "C", "C", "N", "P", 1, 0])
    ],
}
LINES = [
    {"prompt": f"q{i // 2}", "a": "one", "b": "three", "verdict": v} for i, v in enumerate(["a", "b", "tie", None, "b"])
]
SHAPES = {
    "alpaca_eval": ALPACA, "arena_hard": ARENA, "mt_bench": MT_BENCH, "rewardbench_2": REWARDBENCH,
    "inspect": [INSPECT], "lines": LINES,
}  # fmt: skip


def read(name, **given):
    return winrate(SHAPES[name], **({"model": "m"} if name == "mt_bench" else {}), **given)


def test_every_format_has_a_shape_here_and_is_detected():
    assert SHAPES.keys() == FORMATS.keys()
    assert {name: read(name).format for name in SHAPES} == {name: name for name in SHAPES}


@pytest.mark.parametrize(
    ("name", "rate", "wins", "ties", "losses", "invalid"),
    [
        ("alpaca_eval", (0 + 1 + 0.5 + 0.5 + 0.9 + 0.2 + 1 + 0 + 0.7) / 9, 4, 2, 3, {"no verdict": 1}),
        # u0: loses, wins thrice; u1: wins thrice, wins; u2: ties, loses; u4: wins thrice, loses
        ("arena_hard", (3 + 4 + 0.5 + 3) / (4 + 4 + 2 + 4), 10, 1, 3, {"no verdict": 1}),
        ("mt_bench", (1 + 0.5 + 0.5 + 0 + 1) / 5, 2, 2, 1, {"error": 1}),
        ("rewardbench_2", (1 + 0.5 + 0 + 1) / 4, 2, 1, 1, {}),
        ("inspect", (1 + 0 + 1 + 1 + 0.5 + 1 + 0) / 7, 4, 1, 2, {"no answer": 1}),
        ("lines", (0 + 1 + 0.5 + 1) / 4, 2, 1, 1, {"no verdict": 1}),
    ],
)
def test_rates_by_hand_and_invalid_is_no_loss(name, rate, wins, ties, losses, invalid):
    found = read(name)
    assert found.rate == pytest.approx(rate) and found.invalid == invalid
    assert (found.wins, found.ties, found.losses) == (wins, ties, losses)
    failed, valid = sum(invalid.values()), wins + ties + losses
    assert found.worst == pytest.approx(rate * valid / (valid + failed))
    assert found.best == pytest.approx((rate * valid + failed) / (valid + failed))


def test_intervals_are_ours_on_the_same_rows():
    found = read("alpaca_eval")
    won = np.array([0, 1, 0.5, 0.5, 0.9, 0.2, 1, 0, 0.7])
    longer = np.array([i % 7 - 4 for i in range(10) if i != 5], float)
    assert found.interval == clustered_share(won, np.arange(9))
    assert found.controlled.rate == pytest.approx(length_controlled(won, longer, np.arange(9)).rate)
    assert found.theirs.estimate == pytest.approx(found.rate)
    assert found.theirs.high - found.theirs.low == pytest.approx(2 * 1.959964 * won.std(ddof=1) / 3)


def test_both_orders_make_a_report_card():
    found = read("mt_bench")
    assert found.position.n == 5 and found.position.consistent == pytest.approx(4 / 5)
    other = winrate(MT_BENCH, model="base")
    assert other.rate == pytest.approx(1 - found.rate) and other.position.bias == pytest.approx(found.position.bias)
    assert read("arena_hard").position.n == 4 and read("alpaca_eval").position is None


def test_epochs_and_turns_are_clusters():
    assert read("inspect").interval.clusters == 4 and read("mt_bench").prompts == 3


def test_people_correct_the_judge():
    rng = np.random.default_rng(0)
    truth, judged = rng.random(300) < 0.6, rng.random(300) < 0.75
    rows = [{"prompt": str(i), "verdict": "b" if v else "a"} for i, v in enumerate(judged)]
    found = winrate(rows, humans={str(i): float(truth[i]) for i in range(80)})
    assert found.corrected.human == pytest.approx(truth[:80].mean()) and found.corrected.estimate.low < 0.6
    assert winrate(rows).corrected is None


def test_prompts_seen_in_training_are_left_out_and_counted():
    found = winrate(LINES, trained_on={"q0", "never asked"})
    assert found.left_out == 2 and found.rows == 3 and found.prompts == 2 and found.rate == pytest.approx(0.75)


def test_files_are_read_as_they_lie(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LINES))
    with zipfile.ZipFile(tmp_path / "log.eval", "w") as archive:
        for i, sample in enumerate(INSPECT["samples"]):
            archive.writestr(f"samples/{i}.json", json.dumps(sample))
        archive.writestr("header.json", "{}")
    for file, name in (("a.json", "alpaca_eval"), ("l.jsonl", "lines"), ("log.eval", "inspect")):
        assert winrate(tmp_path / file) == read(name)


@pytest.mark.parametrize(
    ("rows", "given", "words"),
    [
        ([], {}, "no rows"),
        ([3], {}, "entry 1 is not an object"),
        ([{"question": 1}], {}, "the formats of verdicts are alpaca_eval"),
        (LINES, {"format": "csv"}, "unknown format 'csv'"),
        (LINES, {"model": "c"}, "name one of the two"),
        (MT_BENCH, {}, "the file has base, m"),
        ([*ALPACA, ALPACA[0] | {"generator_2": "n"}], {}, "the file has m, n"),
        ([{"prompt": "q", "verdict": "a"}, {"prompt": "q"}], {}, "does not have the shape of lines"),
    ],
)
def test_what_cannot_be_read_is_said(rows, given, words):
    with pytest.raises(UserError, match=words):
        winrate(rows, **given)


def test_a_file_that_is_no_json_names_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "verdict": "a"}\nno\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2"):
        read_annotations(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_annotations(tmp_path / "none.json")


HIDDEN = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        own = top in ("numpy", "scipy", "mlxdpo", "mlxdpo_eval") or top.startswith("_")
        if not own and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
sys.meta_path.insert(0, Hide())
import mlxdpo_eval
rows = [{"prompt": str(i), "a": "x", "b": "xy" * (i % 3), "verdict": "ab"[i % 2]} for i in range(20)]
print(mlxdpo_eval.winrate(rows).rate)
"""


def test_it_needs_numpy_and_scipy_alone():
    """MLX, mlx-lm, transformers, pydantic and all else hidden, as after `pip install --no-deps`."""
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=False)
    assert done.stdout == "0.5\n", done.stderr


def test_the_front_door_lists_its_names():
    with pytest.raises(AttributeError, match="it has PairwiseResult, winrate"):
        mlxdpo_eval.__getattr__("win_rates")
