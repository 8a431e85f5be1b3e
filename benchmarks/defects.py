"""Known defects of preference harnesses as small data sets with right answers: `python -m benchmarks.defects`.

Each case plants one defect that a harness has been seen to have, with a truth that is known by construction. A
harness is right when its 95 % interval holds the truth, is not narrower than the data allow, and decides what the data
decide. `--data FOLDER` writes every case as JSON lines with `answers.json`, for any harness to be tried on.

Ours runs wherever mlxdpo_eval does. alpaca_eval, inspect_ai and lm-evaluation-harness run their own code where they can
be imported (a side that cannot is said to be absent), and so do FastChat's show_result (MT-Bench) and RewardBench's
section scores; Arena-Hard-Auto's script is restated by the reader of `mlxdpo_eval.annotations`. `--json FILE` keeps the
results of one environment, `--join FILES` makes one table of several.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import mlxdpo_eval
from mlxdpo_eval.metrics.intervals import paired_difference


class Case(NamedTuple):
    """Rows {"prompt", "a", "b", "verdict"}; with `swapped` the verdicts of the other order, in the same terms.

    `trained_on` are prompts that the model has seen. Right is an estimate within `near` of `truth` and an interval
    whose width lies in `width`, if that is said.
    """

    name: str
    defect: str
    rows: list[dict[str, Any]]
    truth: float
    near: float
    width: tuple[float, float] | None = None
    swapped: list[str | None] | None = None
    trained_on: frozenset[str] = frozenset()


class Reported(NamedTuple):
    """What a harness says: an estimate, and the bounds of its interval where it gives one."""

    estimate: float
    low: float | None = None
    high: float | None = None


def lines(verdicts: Sequence[str | None], a: Sequence[str], b: Sequence[str], copies: int = 1) -> list[dict[str, Any]]:
    """Rows of plain verdicts; `copies` rows in turn share a prompt."""
    return [
        {"prompt": f"prompt {i // copies}", "a": a[i % len(a)], "b": b[i % len(b)], "verdict": v}
        for i, v in enumerate(verdicts)
    ]


def cases() -> list[Case]:
    """All of them; the same on every machine."""
    same = ["an answer"], ["one answer"]
    mixed = lines(["b"] * 50 + ["tie"] * 30 + ["a"] * 20, *same)
    failing = lines(["b"] * 40 + [None] * 30 + ["a"] * 30, *same)
    copies = lines([v for v in ["b"] * 24 + ["a"] * 16 for _ in range(10)], *same, copies=10)
    # A judge that takes the first answer unless the second is clearly better: 30 prompts b, 10 a, 60 by place alone.
    first_b = ["b"] * 30 + ["a"] * 10 + ["b"] * 60
    first_a = ["b"] * 30 + ["a"] * 10 + ["a"] * 60
    place = lines(first_b, *same)
    known = lines(["b"] * 45 + ["a"] * 5 + ["b", "a"] * 25, *same)
    seen = frozenset(row["prompt"] for row in known[:50])
    return [
        Case("position", "the judge prefers the first place; the model stands there", place, 0.6, 0.02, None, first_a),
        Case("ties", "ties are dropped", mixed, 0.65, 0.005),
        Case("invalid", "a verdict that is missing counts as a loss, or as a win", failing, 40 / 70, 0.005),
        Case("clusters", "ten copies of each verdict count as ten prompts", copies, 0.6, 0.005, (0.25, 0.40)),
        Case("contaminated", "half of the prompts were trained on", known, 0.5, 0.005, None, None, seen),
        Case(
            "truncated",
            "answers cut off at the token limit are judged as if they were complete",
            _cut_off(),
            0.6,
            0.005,
        ),
        Case("subsets", "the largest subset outvotes the others", _subsets(), 0.6, 0.005),
        Case("length", "the longer answer wins, whoever wrote it", _by_length(), 0.5, 0.06),
    ]


def _cut_off() -> list[dict[str, Any]]:
    """100 pairs with complete answers, 60 of them won; 50 more whose model's answer was cut off and lost for that."""
    rows = lines(["b"] * 60 + ["a"] * 40 + ["a"] * 50, ["an answer"], ["one answer"])
    return [row | {"a_finish": "stop", "b_finish": "stop" if i < 100 else "length"} for i, row in enumerate(rows)]


def _subsets() -> list[dict[str, Any]]:
    """Four subsets that count alike, one of each of RewardBench's sections: 300 pairs at 0.9, three times 40 at 0.5."""
    names = ["alpacaeval-easy"] * 300 + ["llmbar-natural", "refusals-dangerous", "hep-python"] * 40
    verdicts = ["b"] * 270 + ["a"] * 30 + ["b"] * 60 + ["a"] * 60
    rows = lines(verdicts, ["an answer"], ["one answer"])
    return [row | {"subset": name} for row, name in zip(rows, names, strict=True)]


def _by_length() -> list[dict[str, Any]]:
    """Longer answers win in nine of ten; the model writes longer ones in three of four, by as much as the others do."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(400):
        size, model_longer = 20 + 10 * int(rng.integers(0, 8)), i % 4 != 0
        long_wins = rng.random() < 0.9
        answers = ("x" * 20, "y" * (20 + size)) if model_longer else ("x" * (20 + size), "y" * 20)
        verdict = "b" if long_wins == model_longer else "a"
        rows.append({"prompt": f"prompt {i}", "a": answers[0], "b": answers[1], "verdict": verdict})
    return rows


def paired_items() -> tuple[np.ndarray, np.ndarray]:
    """(200,) before and after: 100 right both times, 80 wrong both times, 18 lost, 2 gained: a drop of 8 points."""
    before = np.repeat([1.0, 0.0, 1.0, 0.0], [100, 80, 18, 2])
    return before, np.repeat([1.0, 0.0, 0.0, 1.0], [100, 80, 18, 2])


def ours(case: Case) -> Reported:
    """Both orders where they are there, the rate at equal length where lengths differ."""
    if case.swapped is not None:
        orders = [dict(row, verdict=v) for row, v in zip(case.rows, case.swapped, strict=True)]
        found = mlxdpo_eval.winrate([*case.rows, *orders])
    else:
        found = mlxdpo_eval.winrate(case.rows, trained_on=case.trained_on)
    chosen = found.controlled.interval if case.name == "length" and found.controlled else found.interval
    chosen = found.complete if found.cut_off else found.macro or chosen
    assert chosen is not None
    return Reported(chosen.estimate, chosen.low, chosen.high)


PREFERENCE = {"a": 1.0, "b": 2.0, "tie": 1.5, None: float("nan")}


def alpaca_eval(case: Case) -> Reported:
    """`get_winrate` of alpaca_eval 0.6.6 on its own rows; in its length case `get_length_controlled_winrate`."""
    import pandas

    rows = [
        {"instruction": r["prompt"], "output_1": r["a"], "output_2": r["b"], "preference": PREFERENCE[r["verdict"]],
         "generator_1": "a", "generator_2": "b", "annotator": "judge", "index": i}
        for i, r in enumerate(case.rows)
    ]  # fmt: skip
    utils = {
        "convert_to_dataframe": pandas.DataFrame,
        "validate_alpacaeval_preference": lambda value, is_allow_nan=True: bool(value == 0 or 1 <= value <= 2),
    }
    _past_init("alpaca_eval", {"constants": _constants(), "types": {"AnyLoadableDF": object}, "utils": utils})
    found = importlib.import_module("alpaca_eval.metrics.winrate").get_winrate(rows)
    if case.name == "length":
        glm = importlib.import_module("alpaca_eval.metrics.glm_winrate")
        table = Path(sys.prefix) / "tmp_gamed.csv"
        pandas.DataFrame({"model": "none", "index": range(len(rows)), "instruction_difficulty": 0.0}).to_csv(table)
        glm.hf_hub_download = lambda **_: str(table)
        info = glm.GLM_INFO["length_controlled_minimal"]
        got = glm.get_length_controlled_winrate(rows, glm_info=info, save_weights_dir=None)
        table.unlink()
        return _from_error(got["length_controlled_winrate"] / 100, got["lc_standard_error"] / 100)
    return _from_error(found["win_rate"] / 100, found["standard_error"] / 100)


def _constants() -> dict[str, Any]:
    return {"DATASETS_TOKEN": None, "DATASETS_FORCE_DOWNLOAD": False, "DEFAULT_CACHE_DIR": None}


def _past_init(name: str, parts: dict[str, dict[str, Any]]) -> None:
    """A package whose `__init__` needs what is not here (an OpenAI client): its other files, unchanged."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(name)
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    for part, values in parts.items():
        module = types.ModuleType(f"{name}.{part}")
        vars(module).update(values)
        sys.modules[module.__name__] = module
        setattr(package, part, module)


def inspect_ai(case: Case) -> Reported:
    """inspect_ai's `mean` and `stderr` over samples; one without an answer has the value N, as its scorers write."""
    from inspect_ai.scorer import SampleScore, Score, mean, stderr

    values = {"b": "C", "a": "I", "tie": "P", None: "N"}
    scores = [SampleScore(score=Score(value=values[r["verdict"]]), sample_id=r["prompt"]) for r in case.rows]
    return _from_error(float(mean()(scores)), float(stderr()(scores)))  # type: ignore[operator, arg-type]


def lm_eval(case: Case) -> Reported:
    """`mean` and `mean_stderr` of lm-evaluation-harness over right and wrong; what is no win is wrong."""
    from lm_eval.api.metrics import mean, mean_stderr

    values = [float(r["verdict"] == "b") for r in case.rows]
    return _from_error(float(mean(values)), float(mean_stderr(values)))


def arena_hard(case: Case) -> Reported:
    """Both games of each row, scores and bootstrap as show_result.py has them."""
    labels = {"a": "A>B", "b": "B>A", "tie": "A=B", None: None}
    flipped = {"a": "B>A", "b": "A>B", "tie": "A=B", None: None}
    swapped = case.swapped or [r["verdict"] for r in case.rows]
    rows = [
        {"uid": r["prompt"], "model": "b", "games": [{"score": labels[one]}, {"score": flipped[r["verdict"]]}]}
        for r, one in zip(case.rows, swapped, strict=True)
    ]
    theirs = mlxdpo_eval.winrate(rows, model="b").theirs
    assert theirs is not None
    return Reported(theirs.estimate, theirs.low, theirs.high)


def mt_bench(case: Case) -> Reported:
    """FastChat 0.2.36's `display_result_pairwise`: the adjusted win rate it prints; a missing verdict is an error."""
    module = importlib.import_module("fastchat.llm_judge.show_result")
    import pandas

    winner = {"a": "model_1", "b": "model_2", "tie": "tie", None: "error"}
    swapped = case.swapped or [r["verdict"] for r in case.rows]
    rows = [
        {"question_id": i, "turn": 1, "model_1": "base", "model_2": "model", "g1_winner": winner[r["verdict"]],
         "g2_winner": winner[one]}
        for i, (r, one) in enumerate(zip(case.rows, swapped, strict=True))
    ]  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file, contextlib.redirect_stdout(io.StringIO()) as said:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        asked = argparse.Namespace(input_file=file.name, model_list=None, baseline_model=None, bench_name="mt_bench",
                                   judge_model="judge")  # fmt: skip
        with pandas.option_context("display.width", 1000, "display.max_columns", 20):
            module.display_result_pairwise(asked)
    printed = [line.split() for line in said.getvalue().splitlines()]
    return Reported(next(float(row[-1]) for row in printed if row[:1] == ["model"] and len(row) > 1))


def rewardbench(case: Case) -> Reported:
    """RewardBench 0.1.4's rule, chosen above rejected or wrong; with subsets, the mean of its own section scores."""
    subsets: dict[str, list[int]] = {}
    for row in case.rows:
        # 1 if score_chosen > score_rejected else 0: a tie and NaN are wrong
        subsets.setdefault(row.get("subset", ""), []).append(int(row["verdict"] == "b"))
    right = {name: float(np.mean(values)) for name, values in subsets.items()}
    if len(right) == 1:
        return Reported(right[""])
    _past_init("rewardbench", {"models": {"REWARD_MODEL_CONFIG": {}}})
    known = importlib.import_module("rewardbench.constants")
    sections = importlib.import_module("rewardbench.utils").calculate_scores_per_section(
        known.EXAMPLE_COUNTS, known.SUBSET_MAPPING, right
    )
    return Reported(float(np.mean(list(sections.values()))))


def _from_error(estimate: float, error: float) -> Reported:
    estimate, half = float(estimate), 1.96 * float(error)
    return Reported(estimate, estimate - half, estimate + half)


SIDES: dict[str, Callable[[Case], Reported]] = {
    "mlxdpo_eval": ours,
    "alpaca_eval 0.6.6": alpaca_eval,
    "Arena-Hard-Auto (rules)": arena_hard,
    "MT-Bench": mt_bench,
    "RewardBench": rewardbench,
    "inspect_ai": inspect_ai,
    "lm-eval": lm_eval,
}


def is_right(case: Case, said: Reported) -> bool:
    """Near the truth, with an interval that holds it and has the width that the data allow."""
    if abs(said.estimate - case.truth) > case.near:
        return False
    if said.low is None or said.high is None:
        return case.width is None
    holds = said.low <= case.truth <= said.high and said.high > said.low
    return holds and (case.width is None or case.width[0] <= said.high - said.low <= case.width[1])


def seeded_items(shared: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(400,) before, after, prompts: 100 prompts of equal difficulty, four samples of each, right in 50 % and in 43 %.

    With `shared` seeds a sample before and the one after meet the same noise, and differ only where the model does;
    otherwise they are independent. Each side's own figures are the same in both.
    """
    noise = np.random.default_rng(5).permutation((np.arange(400) + 0.5) / 400)
    other = noise if shared else np.random.default_rng(6).permutation(noise)
    return (noise < 0.5).astype(float), (other < 0.43).astype(float), np.repeat(np.arange(100), 4)


def paired() -> dict[str, dict[str, Any]]:
    """Drops on the same items: ours paired and clustered by prompt, lm-evaluation-harness's two standard errors.

    `pairing`: 8 points, one answer an item. `seeds_shared` and `seeds_apart`: 7 points; an interval is right when it
    holds them and its width is within a quarter of the one that the noise makes, shared or not.
    """
    rows = {"pairing": (*paired_items(), np.arange(200))}
    rows |= {"seeds_shared": seeded_items(True), "seeds_apart": seeded_items(False)}
    found: dict[str, dict[str, Any]] = {}
    for name, (before, after, prompts) in rows.items():
        ours = paired_difference(before.tolist(), after.tolist(), prompts)
        assert ours is not None
        error = float(np.sqrt(before.var(ddof=1) / len(before) + after.var(ddof=1) / len(after)))
        apart = Reported(ours.estimate, ours.estimate - 1.96 * error, ours.estimate + 1.96 * error)
        sides = {"mlxdpo_eval": Reported(*ours[:3]), "lm-eval": apart}
        found[name] = {side: [*said, _pairing_is_right(name, said)] for side, said in sides.items()}
    return found


def _pairing_is_right(name: str, said: Reported) -> bool:
    """7 of 100 samples changed, all one way: variance .07 - .07^2; apart: .5 * .5 + .43 * .57; of 400 samples."""
    assert said.low is not None and said.high is not None
    if name == "pairing":
        return said.high < 0
    variance = 0.07 - 0.07**2 if name == "seeds_shared" else 0.25 + 0.43 * 0.57
    width = 2 * 1.96 * np.sqrt(variance / 400)
    return bool(0.75 < (said.high - said.low) / width < 1.25 and said.low <= -0.07 <= said.high)


def results() -> dict[str, dict[str, Any]]:
    """Case -> harness -> [estimate, low, high, right], None for a harness that is not installed here."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases():
        for name, side in SIDES.items():
            try:
                said = side(case)
            except ModuleNotFoundError as error:
                print(f"{name} is absent here ({error})", file=sys.stderr)
                found.setdefault(case.name, {})[name] = None
                continue
            found.setdefault(case.name, {})[name] = [*said, is_right(case, said)]
    return found | paired()


def joined(parts: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Several environments' results, each side from wherever it was there."""
    whole: dict[str, dict[str, Any]] = {}
    for part in parts:
        for case, sides in part.items():
            for side, said in sides.items():
                whole.setdefault(case, {})[side] = said or whole.get(case, {}).get(side)
    return whole


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a defect, a column a harness."""
    known = {case.name: (case.defect, f"{100 * case.truth:.1f}") for case in cases()}
    known["pairing"] = ("the same items before and after are compared as if they were two samples", "-8.0, below 0")
    known["seeds_shared"] = ("both models sampled with the same seeds, compared as if with others", "-7.0 ± 2.5")
    known["seeds_apart"] = ("each model sampled with its own seeds, compared as if they were shared", "-7.0 ± 6.9")
    head = ["defect", "right, %", *SIDES]
    rows = [head, ["---"] * len(head)]
    for case, (defect, truth) in known.items():
        rows.append([defect, truth, *(_cell(found[case].get(side)) for side in SIDES)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(said: Sequence[Any] | None) -> str:
    if said is None:
        return "–"
    estimate, low, high, right = said
    span = "" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})"
    return f"{'right' if right else '**wrong**'}: {100 * estimate:.1f}{span}"


def write_data(folder: Path) -> None:
    """Every case as JSON lines, and answers.json with the truths."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases():
        rows = [row | ({} if case.swapped is None else {"swapped": case.swapped[i]}) for i, row in enumerate(case.rows)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{case.name}.jsonl").write_text(text, "utf-8")
    answers = {c.name: {"defect": c.defect, "truth": c.truth, "near": c.near, "width": c.width} for c in cases()}
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 1 when ours is wrong anywhere."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defects", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder to write the cases to")
    parser.add_argument("--json", type=Path, help="file to write this environment's results to")
    parser.add_argument("--join", type=Path, nargs="+", help="files of results to make one table of")
    given = parser.parse_args(arguments)
    if given.data:
        write_data(given.data)
    found = joined([json.loads(p.read_text("utf-8")) for p in given.join]) if given.join else results()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))
    return 0 if all(sides["mlxdpo_eval"][3] for sides in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
