"""What every export target must bring, whoever wrote it. The tests walk the registry, so a target without it fails."""

from pathlib import Path

import pytest
from tiny_exports import known_tokenizer, trained_run
from tiny_models import write_model

from mlxdpo.exporters import EXPORTERS, export
from mlxdpo.exporters.record import OF_TARGETS
from mlxdpo.exporters.source import Choices
from mlxdpo.exporters.usage import USAGE

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")


def test_every_target_says_how_it_is_loaded():
    assert set(USAGE) == set(EXPORTERS)


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_target_has_a_row_in_the_documentation(name):
    assert f"\n| `{name}` |" in PAGE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that every target takes: layers that packing divides, a tokenizer that llama.cpp knows."""
    folder = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        write_model(folder / "llama", known_tokenizer(), hidden_size=64, head_dim=16, vocab_size=320)
        yield trained_run(folder, data={"template": "auto"})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.processes if name == "server" else ()) for name in EXPORTERS]
)
def test_every_target_is_an_export_by_itself(name, run, tmp_path):
    """Written, loaded again, measured; its card says how to load it. In 4 bits the tiny run is lost: 8.

    A file of a kind that the rules of uploads do not know would be missing on the Hub.
    """
    if name in ("gguf", "gguf-lora", "ollama"):
        pytest.importorskip("gguf", reason="the optional gguf package is not installed")
    done = export(run, [name], tmp_path / "out", choices=Choices(bits=8))
    target = done.targets[name]
    assert target.kept and target.files and done.relation == target.relation
    assert target.fidelity.passed and (target.asked is not None) == (name == "server")
    assert [file for file in target.files if not OF_TARGETS.fullmatch(file.rpartition("/")[2])] == []
    assert USAGE[name](done, target) in (tmp_path / "out" / "README.md").read_text()
