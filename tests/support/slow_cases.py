"""Which cases of a test run every time, and which in CI alone."""

import pytest


def rest_slow(cases, always):
    """The cases as parameters; those not in `always` are marked slow. A case of several arguments is a tuple.

    Cases are compared by what they print as: a dict has no hash.
    """
    quick = {str(case) for case in always}
    assert quick <= {str(case) for case in cases}
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [[] if str(case) in quick else pytest.mark.slow for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]
