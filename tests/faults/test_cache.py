"""What is kept to save time, and damaged since: it is made again, or refused; no other number, no traceback."""

import hashlib
import os
import random
import sys

import pytest
from mutating import mutate_bytes
from planted_judges import Planted
from tiny_runs import finish, recipe, stop_after

from mlxdpo.cli import run as cli
from mlxdpo.io.digest import file_digest
from mlxdpo.machine import openblas
from mlxdpo.model import builtin
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo_eval.judges.both import AnswerPair, ask_both
from mlxdpo_eval.judges.kept import cache_file
from mlxdpo_eval.judges.protocol import Verdict


def aged(file):
    """A file that was last changed long ago: its digest is remembered."""
    os.utime(file, (1, 1))
    return file


def settled(monkeypatch):
    monkeypatch.setattr("mlxdpo.io.digest.SETTLED_NS", -(10**18))


def hub_blob(folder, content):
    """A file as the Hub's client keeps it: named by its digest, linked from a snapshot."""
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    return blob


def test_the_name_of_a_blob_is_not_believed(tmp_path, cache, monkeypatch):
    settled(monkeypatch)
    blob = hub_blob(tmp_path, b"the weights")
    assert file_digest(blob) == blob.name and len(list((cache / "digests").iterdir())) == 1
    blob.write_bytes(b"the weighs!")
    for _ in range(2):
        with pytest.raises(UserError, match="corrupted \\(its bytes differ from the Hub's\\); delete it"):
            file_digest(blob)


def test_a_damaged_base_in_the_hubs_cache_is_not_trained_on(tmp_path, cache, capsys):
    """One bit of the base is flipped between a run's start and its resumption."""
    config = recipe(tmp_path, train={"save_every": 1})
    weights = tmp_path / "llama" / "model.safetensors"
    blob = hub_blob(tmp_path / "hub", weights.read_bytes())
    weights.unlink()
    weights.symlink_to(blob)
    finish(config, stop=stop_after(16))
    assert not (Run.open(config.out).adapter / "adapters.safetensors").exists()
    raw = bytearray(blob.read_bytes())
    raw[-10] ^= 1
    blob.write_bytes(raw)
    assert cli(["train", "--resume", config.out]) == 2
    assert "corrupted (its bytes differ from the Hub's)" in capsys.readouterr().err


def test_a_damaged_note_is_made_again(tmp_path, cache, monkeypatch):
    settled(monkeypatch)
    file = tmp_path / "f"
    file.write_bytes(b"content")
    expected = file_digest(file)
    (note,) = (cache / "digests").iterdir()
    whole = note.read_bytes()
    rng = random.Random(0)
    damaged = [b"", b"{}", b"null", b"[", b'{"stamp": 3}', b"[" * 100_000, whole.replace(expected.encode(), b"0" * 64)]
    for raw in [*damaged, *(mutate_bytes(rng, whole) for _ in range(200))]:
        note.write_bytes(raw)
        assert file_digest(file) == expected
    note.unlink()
    note.mkdir()
    assert file_digest(file) == expected, "a note that cannot be written costs time and nothing else"


@pytest.mark.skipif(sys.platform != "linux", reason="the copy is for Linux")
@pytest.mark.parametrize("damage", [lambda raw: raw[:4096], lambda raw: raw[:-1] + b"x", lambda raw: b""])
def test_a_damaged_library_is_made_again(cache, damage, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(openblas.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino) or fsync(handle))
    library = openblas._renamed_openblas()
    assert library.stat().st_ino in synced
    whole = library.read_bytes()
    library.unlink()
    library.write_bytes(damage(whole))
    assert openblas._renamed_openblas().read_bytes() == whole


def test_a_damaged_built_in_model_is_made_again(tmp_path, cache, monkeypatch):
    source, made = tmp_path / "model.gguf", []
    source.write_bytes(b"GGUF")

    def convert(_, folder):
        made.append(1)
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(builtin, "_gguf_file", lambda: source)
    monkeypatch.setattr(builtin, "_convert", convert)
    folder = builtin.smollm2_folder()
    assert builtin.smollm2_folder() == folder and len(made) == 1
    for damage in (b"weighs!", None):
        file = folder / "model.safetensors"
        file.unlink() if damage is None else file.write_bytes(damage)
        assert (builtin.smollm2_folder() / "model.safetensors").read_bytes() == b"weights"
    assert len(made) == 3


def test_a_damaged_verdict_is_asked_again(cache):
    judge = Planted(lambda question: Verdict(1.5 if question.first == "a" else -1.0), cached=True)
    pair = [AnswerPair("p", "b", "a")]
    expected = ask_both(judge, pair)
    file, rng = cache_file(judge.identity), random.Random(0)
    whole = file.read_bytes()
    assert ask_both(judge, pair) == expected and len(judge.asked) == 2
    for raw in (whole.replace(b"1.5", b"2.5"), b"{}\n[]\n", *(mutate_bytes(rng, whole) for _ in range(100))):
        file.write_bytes(raw)
        assert ask_both(judge, pair) == expected
