"""The benchmark of pairs without a judge: held-out functions are in no pair, and its judge reads their descriptions."""

import json

from benchmarks.delta_pairs import HELDOUT, PROMPTS, page, write_prompts
from mlxdpo.io.json_file import read_lines


def test_held_out_functions_are_asked_of_no_pair_and_their_judge_knows_them(tmp_path):
    heldout = write_prompts(tmp_path)
    asked = [row["prompt"] for row in read_lines(tmp_path / "prompts.jsonl")]
    assert len(set(asked)) == PROMPTS >= 1_000 and len(set(heldout)) == HELDOUT
    assert not set(asked) & set(heldout)
    space: dict = {"__file__": str(tmp_path / "judge.py")}
    exec((tmp_path / "judge.py").read_text(), space)
    for name, text in json.loads((tmp_path / "descriptions.json").read_text()).items():
        assert space["overlap"](f"What does Python's {name} do?", text) == 1
        assert space["overlap"](f"What does Python's {name} do?", "") == 0


def test_the_page_says_what_was_lost_and_whether_a_judge_saw_a_difference():
    found = {"n": 100, "rate": 0.6, "interval": [0.52, 0.68]}
    text = page(
        {
            "kills": {"saved": 2298, "lost": 0, "kills": 20},
            "report": {"prompts": 1150, "rows": 1149},
            "judged": {"tuned against untuned": found},
        }
    )
    assert "2,298 answers of two servers to 1,150 prompts, killed 20 times: 0 answers lost; 1,149 pairs." in text
    assert text.splitlines()[-1] == "| tuned against untuned | 100 | 60.0% | 52.0% to 68.0% | better |"
