"""Parity with outside implementations: collected only with `-m parity`, so that the default suite needs no torch.

mlxdpo comes before torch: it puts a BLAS in the global scope, and torch has to give right numbers beside it.
"""

import os

import mlxdpo  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_ignore_collect(collection_path, config):
    asked = config.option.markexpr
    return True if "parity" not in asked or "not parity" in asked else None
