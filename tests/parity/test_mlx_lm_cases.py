"""The cases of docs/evidence are still what mlx-lm computes otherwise than transformers, or cannot load."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FILE = Path(__file__).parents[2] / "docs" / "evidence" / "mlx_lm_cases.py"
SPECIFICATION = importlib.util.spec_from_file_location("mlx_lm_cases", FILE)
cases = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(cases)

NOT_LOADED = {"rope_parameters, no default", "defaults of a text config"}


@pytest.mark.parametrize("case", cases.CASES)
def test_still_another_model(case):
    if case in NOT_LOADED or case.startswith("names"):
        with pytest.raises((TypeError, ValueError), match=r"missing 1 required|Expected shape|not in model"):
            cases.difference(*cases.CASES[case])
    else:
        assert cases.difference(*cases.CASES[case]) > 5e-4, f"mlx-lm has mended it: update {FILE.parent}/mlx-lm.md"
