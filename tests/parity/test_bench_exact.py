"""The float64 side of the benchmark and ours take the same steps: what it says of long rows can be believed."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of `benchmarks`, which no installation has

from bench_sides import tiny_entrants

from benchmarks.peers.measure import measure

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("shape", ["ranked", "hh"])
def test_losses_of_four_steps(shape, tmp_path):
    entrants = tiny_entrants(tmp_path, shape, 4, {"exact": ("exact", []), "mlxdpo": ("mlxdpo", [])})
    exact, ours = measure(entrants, print).values()
    assert exact.error is ours.error is None and exact.losses[0] == pytest.approx(math.log(2), abs=1e-12)
    assert exact.losses[3] < math.log(2) - 0.01  # it learns, or agreement would say nothing
    assert ours.losses == pytest.approx(exact.losses, abs=1e-5)
