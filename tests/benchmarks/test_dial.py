"""The table and figure of the dial against a sweep over beta: what is read off at equal KL."""

from benchmarks.dial import draw, table


def point(beta, strength, kl, change):
    bounds = {"estimate": change, "low": change - 0.1, "high": change + 0.1, "clusters": 9}
    interval = {"estimate": kl, "low": kl / 2, "high": kl * 2, "clusters": 9}
    return {"beta": beta, "strength": strength, "mean_kl": kl, "kl": interval, "change": {"change": bounds}}


POINTS = [
    point(0.1, 1.0, 2.0, 0.4),
    point(0.1, 0.5, 1.0, 0.3),
    point(0.5, 1.0, 1.5, 0.31),
    point(0.03, 1.0, 9.0, 0.6),
]


def test_the_dial_is_read_between_its_points_and_not_beyond_them(tmp_path):
    lines = table(POINTS).splitlines()
    assert lines[2].startswith("| beta 0.1, strength 0.5 | 1.000 [0.500, 2.000] | 0.300 [0.200, 0.400] |")
    assert "| beta 0.5 | +0.310 | +0.350 | +0.040 |" in lines
    assert "| beta 0.03 | +0.600 | beyond the largest strength | - |" in lines
    draw(POINTS, tmp_path / "dial.svg")
    assert (tmp_path / "dial.svg").read_text().count("<path") > 10
