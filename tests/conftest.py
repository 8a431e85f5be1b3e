"""mlxdpo first: on Linux it puts the fast BLAS in front before anything imports mlx. Caches go to a private folder.

Beside other workers of pytest-xdist a process takes one thread of OpenBLAS, which reads the variable when it is loaded:
two workers with two threads each on two cores wait for one another. No test depends on the clock, so hypothesis has no
deadline and does not mind slow data.
"""

import contextlib
import gc
import itertools
import os
import time

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's
    if "MLXDPO_TESTS_BATCH" in os.environ and hasattr(os, "SCHED_BATCH"):
        # MLX hands each operation to a thread. Where every core has a worker, Linux would let that thread interrupt the
        # one that hands over, 60,000 times a second: an eighth of the time of the tests. Not where tests start further
        # processes: each hand-over would wait until those have used up their turn.
        with contextlib.suppress(OSError):  # a container that forbids it is slower, nothing else
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

import mlxdpo  # noqa: F401

settings.register_profile("mlxdpo", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("mac", settings.get_profile("mlxdpo"), max_examples=20)
settings.load_profile("mlxdpo")

# Folders of tests that no machine changes: they do not run a second time on the Mac that the tests make up.
ANYWHERE = {"benchmarks", "house", "io"}


def pytest_addoption(parser):
    parser.addoption("--mac", action="store_true", help="run on a Mac that the tests make up (support/fake_mac.py)")


def pytest_configure(config):
    if config.getoption("mac"):
        import fake_mac

        fake_mac.install()
        settings.load_profile("mac")


def pytest_ignore_collect(collection_path, config):
    """With `--mac`, whether a folder is one of `ANYWHERE`."""
    return True if config.getoption("mac") and collection_path.name in ANYWHERE and collection_path.is_dir() else None


def pytest_collection_modifyitems(config, items):
    """On the made-up Mac, what is listed as different there is expected to fail, for the reason it is listed with."""
    if config.getoption("mac"):
        from mac_differences import DIFFERENT, ROUNDED

        for item in items:
            for listed, strict in ((DIFFERENT, True), (ROUNDED, False)):
                for name, reason in listed.items():
                    if item.nodeid.startswith(f"tests/{name}"):
                        item.add_marker(pytest.mark.xfail(reason=reason, strict=strict))


@pytest.fixture
def fake_mac(monkeypatch, request):
    """This process's machine is a Mac for one test; gives the counts of what was called."""
    import fake_mac

    if not request.config.getoption("mac"):
        fake_mac.install(monkeypatch.setattr)
    fake_mac.calls.clear()
    return fake_mac.calls


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection():
    """What is imported by now is left out of later collections: each training run begins with one (0.3 s otherwise)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def tokenizers_of_friends():
    """The tiny tokenizers do no harm, and a process for each of them would take long; `test_trial` undoes this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxdpo.model.policy.try_tokenizer", lambda folder, name: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_power_cuts():
    """Nothing is flushed to the disk: a tiny run does it 40 times, milliseconds each, and no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def figures_as_they_fall():
    """No figure's parts are moved until nothing overlaps: half of its time. `laid_out` undoes this."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        set_layout = Figure.set_layout_engine
        patch.setattr(Figure, "set_layout_engine", lambda self, layout=None, **options: None)
        yield set_layout


@pytest.fixture
def laid_out(figures_as_they_fall, monkeypatch):
    """Figures are laid out in this test, as users see them."""
    monkeypatch.setattr("matplotlib.figure.Figure.set_layout_engine", figures_as_they_fall)


@pytest.fixture(autouse=True)
def streams_here(monkeypatch):
    """Batches are computed whole, as on a Mac, whatever cores are here; called with a number, in so many streams."""

    def count(number):
        """From now on in this test."""
        monkeypatch.setattr("mlxdpo.machine.openblas.stream_count", lambda: number)

    count(1)
    return count


@pytest.fixture(autouse=True, scope="session")
def kept_runs(tmp_path_factory):
    """Where `tiny_runs.trained_once` keeps runs: a folder of this session that the workers of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_TESTS_KEPT_RUNS", str(shared / "kept_runs"))
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A private cache folder."""
    monkeypatch.setenv("MLXDPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def ticking(monkeypatch):
    """A stopwatch that goes on by 20 ms whenever it is read, however busy the machine is."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, 0.02).__next__)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny run with held-out pairs, trained once; nobody changes it."""
    from tiny_runs import recipe, trained_once

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        return trained_once(folder, recipe(folder, data={"eval_fraction": 0.2}))


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """A tiny llama with its tokenizer; nobody changes it."""
    from tiny_models import write_model
    from tiny_tokenizers import chatml_tokenizer

    return write_model(tmp_path_factory.mktemp("model"), chatml_tokenizer())


@pytest.fixture
def own(tiny_model_folder, tmp_path):
    """A copy of the tiny model to change."""
    for file in tiny_model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine that the client is logged in to; no waiting between its attempts."""
    from fake_hub import connected

    yield from connected(tmp_path, monkeypatch)
