"""Which cases of a test run every time, and which in CI alone."""

import pytest


def rest_slow(cases, always):
    """The cases as parameters; those not in `always` are marked slow. A case of several arguments is a tuple."""
    assert set(map(str, always)) <= set(map(str, cases))
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[] if str(case) in set(map(str, always)) else pytest.mark.slow,
        )
        for case in cases
    ]
