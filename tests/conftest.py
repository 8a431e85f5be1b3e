"""mlxdpo first: on Linux it puts the fast BLAS in front before anything imports mlx. Caches go to a private folder."""

import pytest

import mlxdpo  # noqa: F401


@pytest.fixture(autouse=True)
def streams_here(monkeypatch):
    """Batches are computed whole, as on a Mac, whatever cores are here; called with a number, in so many streams."""

    def count(number):
        """From now on in this test."""
        monkeypatch.setattr("mlxdpo.machine.openblas.stream_count", lambda: number)

    count(1)
    return count


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A private cache folder."""
    monkeypatch.setenv("MLXDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine that the client is logged in to; no waiting between its attempts."""
    from fake_hub import connected

    yield from connected(tmp_path, monkeypatch)
