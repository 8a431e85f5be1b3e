"""Files as users, editors and strangers leave them: rights, last lines, long lines, YAML's odd numbers, logins."""

import gzip
import json
import os
import threading

import mlx.core as mx
import pytest
from tiny_models import write_model
from tiny_runs import finish, interrupted, recipe, stop_after, write_pairs
from tiny_tokenizers import chatml_tokenizer
from votes import VOTE

from mlxdpo.cli import run as cli
from mlxdpo.config import load_config
from mlxdpo.data.sources import read_rows
from mlxdpo.io import json_file
from mlxdpo.io.atomic import append_line, write_first, write_text
from mlxdpo.io.checksum import save_checksummed
from mlxdpo.io.json_file import read_lines
from mlxdpo.io.names import without_tokens
from mlxdpo.io.staging import publish_folder, publish_new, staging_folder
from mlxdpo.types import UserError
from mlxdpo_eval.judges.votes import read_ballots


@pytest.mark.parametrize(
    "mask, file_mode, folder_mode", [(0o077, 0o600, 0o700), (0o027, 0o640, 0o750), (0o002, 0o664, 0o775)]
)
def test_the_umask_decides_who_may_read(tmp_path, mask, file_mode, folder_mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "text", "x")
        write_first(tmp_path / "first", "x")
        append_line(tmp_path / "lines", {"a": 1})
        save_checksummed(tmp_path / "arrays.safetensors", {"a": mx.zeros(2)})
        with staging_folder(tmp_path, ".x-draft-") as folder:
            publish_folder(folder, tmp_path / "folder")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes.pop("folder") == folder_mode and set(modes.values()) == {file_mode}, modes


def test_a_last_line_without_a_newline_is_a_line(tmp_path):
    file = tmp_path / "votes.jsonl"
    for end, kept in ((b'{"a": 2}', 2), (b'{"a": 2', 1), (b'"a"', 1), (b"{", 1)):
        file.write_bytes(b'{"a": 1}\n' + end)
        assert len(list(read_lines(file))) == kept
        append_line(file, {"a": 3})
        assert [line["a"] for line in read_lines(file)] == [*range(1, kept + 1), 3]


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.tsv", "d.jsonl.gz"])
def test_a_line_beyond_the_bound_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_file, "LONGEST_LINE", 1 << 20)
    taken = []

    class Watched(gzip.GzipFile):
        def readline(self, size=-1):
            taken.append(size)
            return super().readline(size)

    monkeypatch.setattr(gzip, "open", lambda file, mode: Watched(file, mode))
    opened = open if not name.endswith(".gz") else gzip.GzipFile
    with opened(tmp_path / name, "wb") as file:
        for _ in range(40):
            file.write(b"x" * (1 << 20))
    with pytest.raises(UserError, match=f"{name}:1: a line of more than 1 MB"):
        list(read_rows(str(tmp_path / name)))
    assert all(0 < size <= (1 << 20) + 1 for size in taken)
    with pytest.raises(UserError, match="a line of more than 1 MB"):
        list(read_lines(tmp_path / name)) if not name.endswith(".gz") else list(read_rows(str(tmp_path / name)))


@pytest.mark.parametrize("value", ["1:30", "12:30:45", "1:30.5", "-1:00"])
def test_a_number_to_the_base_60_is_none(tmp_path, value):
    file = tmp_path / "r.yaml"
    file.write_text(f"train:\n  steps: {value}\n")
    with pytest.raises(UserError, match=f"`train.steps` is '{value}'"):
        load_config(file)
    file.write_text(f"model: {value}\ntrain: {{steps: 90, epochs: 1.5}}\noptim: {{lr: 1e-5}}\n")
    config = load_config(file)
    assert (config.model.path, config.train.steps, config.train.epochs, config.optim.lr) == (value, 90, 1.5, 1e-5)


@pytest.mark.parametrize("key", ["model.path", "data.path", "out", "lora.keys", "data.columns"])
def test_a_nul_in_a_field_is_a_sentence(tmp_path, key, capsys):
    section, _, name = key.partition(".")
    odd = {"lora.keys": ["a", "a\0b"], "data.columns": {"prompt": "a\0b"}}.get(key, "a\0b")
    file = tmp_path / "r.yaml"
    base = {"model": {"path": "m"}, "data": {"path": "d"}}
    base[section] = base.get(section, {}) | {name: odd} if name else odd
    file.write_text(json.dumps(base))
    assert cli(["train", str(file)]) == 2
    assert (
        f"`{key}" in (said := capsys.readouterr().err) and "contains a NUL character" in said and said.count("\n") == 1
    )


def test_aliases_that_stand_for_themselves_are_looked_at_once(tmp_path):
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (tmp_path / "r.yaml").write_text("l0: &l0 [x]\n" + levels)
    with pytest.raises(UserError, match="unknown key"):
        load_config(tmp_path / "r.yaml")


def test_half_characters_in_votes_are_counted(tmp_path):
    file = tmp_path / "votes.jsonl"
    odd = [dict(VOTE, **{name: "\ud83d"}) for name in ("a", "b", "prompt")]
    odd.append(dict(VOTE, prompt=[{"role": "user", "content": "x\udc00"}]))
    file.write_text("".join(json.dumps(vote) + "\n" for vote in [VOTE, *odd]))
    found = read_ballots(file)
    assert len(found.votes) == 1 and found.left_out == {"a vote whose text has half a character": 4}
    json.dumps([vote.a + vote.b + vote.prompt for vote in found.votes], ensure_ascii=False).encode()


LOGINS = [
    "hf_" + "a1B2" * 8, "sk-" + "a1B2" * 8, "sk-proj-" + "a1_B" * 10, "sk-ant-api03-" + "a1B2" * 12,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 10, "glpat-" + "a1B2" * 5, "xoxb-1234567890-" + "a1B2" * 4, "AKIA" + "A1B2" * 4,
    "AIza" + "a1B2c" * 7, "gsk_" + "a1B2" * 10, "r8_" + "a1B2" * 9, "nvapi-" + "a1B2" * 8, "npm_" + "a1B2" * 9,
    "eyJhbGciOiJIUzI1" + "." + "eyJzdWIiOiIxMjM0" + "." + "a1B2" * 6,
]  # fmt: skip


@pytest.mark.parametrize("login", LOGINS)
def test_logins_are_struck_out(login):
    for text in (login, f"key={login}.", f"'{login}'", f"Authorization: Bearer {login}"):
        assert login[6:] not in without_tokens(text) and "***" in without_tokens(text)
    plain = "sk-learn, ghp_x, task-force-one, hf_hub, disk-images-of-long-names; 0123456789abcdef"
    assert without_tokens(plain) == plain


def test_of_two_that_publish_at_once_one_is_refused(tmp_path):
    target, said = tmp_path / "out", []
    together = threading.Barrier(2)

    def publish(number):
        with staging_folder(tmp_path, f".out-draft{number}-") as folder:
            (folder / "whose").write_text(str(number))
            together.wait()
            try:
                publish_new(folder, target)
            except UserError as error:
                said.append(str(error))

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(said) == 1 and "was just created by another process; choose another --out" in said[0]
    assert (target / "whose").read_text() in "01" and len(list(tmp_path.iterdir())) == 1


def test_shortened_metrics_are_noticed(tmp_path, cache):
    write_model(tmp_path / "llama", chatml_tokenizer())
    write_pairs(tmp_path / "pairs.jsonl")
    config = recipe(tmp_path, train={"save_every": 1})
    run, at = interrupted(config, stop_after(16))
    assert at > 1
    file, whole = run.path / "metrics.jsonl", (run.path / "metrics.jsonl").read_text()
    file.write_text("".join(line + "\n" for line in whole.splitlines()[:1]))
    notes = [event.values["text"] for event in finish(config, resume=run) if event.kind == "note"]
    assert [note for note in notes if f"metrics.jsonl: ends at step 1, the checkpoint is of step {at};" in note], notes
