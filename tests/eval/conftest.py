"""A trained run to evaluate."""

import pytest
from tiny_runs import copied, trained


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder of a tiny run with its model and pairs."""
    folder = tmp_path_factory.mktemp("trained_once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder.with_name("trained_once-cache")))
        trained(folder)
    return folder


@pytest.fixture
def run(trained_once, tmp_path, cache):
    """A copy of it that is the test's own."""
    return copied(trained_once, tmp_path)
