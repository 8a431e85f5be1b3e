"""From a run to the Hub and back: the same bytes, log-probs and answers; strangers' files are looked at closely."""

import json
import shutil
import struct

import numpy as np
import pytest
from fake_hub import TOKEN, FakeHub, Repo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_export import NAME, base_of, exported, safetensors
from tiny_runs import finish, recipe

from mlxdpo import Run, UserError, encode_pairs, heldout_pairs, open_trained_run, pair_logps
from mlxdpo.cli import run as cli
from mlxdpo.config import dump_config
from mlxdpo.exporters.client import Entry, check_bytes, check_name, check_safetensors
from mlxdpo.exporters.hub import push
from mlxdpo.exporters.pull import localised, pull_run


def pushed(hub, run, tmp_path):
    out = exported(run, tmp_path / "out")
    push(out, NAME)
    return out


def logps(run, data):
    trained_run = open_trained_run(run)
    _, examples, _ = encode_pairs(trained_run, heldout_pairs(run, data)[0])
    return np.array(pair_logps(trained_run, examples))


def refused(match, *arguments, **named):
    with pytest.raises(UserError, match=match) as caught:
        pull_run(*arguments, **named)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    return str(caught.value)


def test_push_and_pull_give_the_same_run(hub, trained, tmp_path, capsys):
    """Bytes, every log-prob, and greedy answers; the evaluation accepts it as the run that it was."""
    out = pushed(hub, trained, tmp_path)
    found = pull_run(NAME, out=tmp_path / "back", base=base_of(trained))
    back = Run.open(found.path)
    assert (found.kind, found.commit, found.base_checked) == ("run", hub.repos[NAME].refs["main"], True)
    for name in ("adapters.safetensors", "adapter_config.json"):
        original = (trained.adapter / name).read_bytes()
        assert original == (back.adapter / name).read_bytes() == (out / "run" / "adapter" / name).read_bytes()
    assert (back.path / "manifest.json").read_bytes() == (out / "run" / "manifest.json").read_bytes()
    data = trained.config().data.path
    assert np.array_equal(logps(back, data), logps(trained, data))
    for path in (trained.path, back.path):
        assert cli(["generate", str(path), "--prompt", "q1 red:", "--max-tokens", "8"]) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == second
    assert cli(["eval", str(back.path), "--data", data, "--prompts", "2", "--max-tokens", "4"]) == 0


def test_only_where_it_lies_differs_from_the_recipe(hub, trained, tmp_path):
    pushed(hub, trained, tmp_path)
    back = Run.open(pull_run(NAME, out=tmp_path / "back", base=base_of(trained)).path).config()
    then = trained.config()
    assert back.data.path == "pairs.jsonl" and back.out == str(tmp_path / "back")
    same = {"data": then.data, "out": then.out, "model": then.model}
    assert back.model_copy(update=same) == then and back.model.dtype == trained.manifest()["model"]["dtype"]


def test_nothing_of_this_machine_is_published(hub, trained, tmp_path):
    pushed(hub, trained, tmp_path)
    for name, content in hub.repos[NAME].files().items():
        assert str(tmp_path.parent).encode() not in content and b"/tmp/" not in content, name
        assert TOKEN.encode() not in content


def test_pull_by_command(hub, trained, tmp_path, monkeypatch, capsys):
    pushed(hub, trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli(["pull", NAME, "--base", base_of(trained)]) == 0
    assert "runs/tiny-dpo (run)" in capsys.readouterr().out
    assert cli(["pull", NAME, "--base", base_of(trained)]) == 2
    assert "exists; choose another --out" in capsys.readouterr().err


def test_heldout_pairs_come_along_where_their_owner_said_so(hub, trained, tmp_path, capsys):
    """And a pulled run is then evaluated without a flag, on the same pairs; else the command says how to get them."""
    pairs = heldout_pairs(trained)[0]
    for extra, sentence in (([], "export --with-heldout, or take"), (["--with-heldout"], "evaluate it: mlxdpo eval")):
        hub.repos.clear()
        out, back = tmp_path / f"out{len(extra)}", tmp_path / f"back{len(extra)}"
        assert cli(["export", str(trained.path), "--to", "mlx", "--out", str(out), "--push", NAME, *extra]) == 0
        assert ("run/heldout.jsonl" in hub.repos[NAME].files()) == bool(extra)
        capsys.readouterr()
        assert cli(["pull", NAME, "--out", str(back), "--base", base_of(trained)]) == 0
        assert sentence in " ".join(capsys.readouterr().out.split())
    found = heldout_pairs(Run.open(back))[0]
    assert [(p.prompt, p.chosen, p.rejected) for p in found] == [(p.prompt, p.chosen, p.rejected) for p in pairs]
    assert cli(["eval", str(back), "--prompts", "2", "--max-tokens", "4"]) == 0
    assert cli(["export", str(trained.path), "--to", "mlx", "--out", str(out), "--with-heldout"]) == 2
    assert "--with-heldout needs --push" in capsys.readouterr().err


def test_a_revision(hub, trained, tmp_path):
    out = exported(trained, tmp_path / "out")
    done = push(out, NAME, revision="round-2", tag="v2")
    assert pull_run(NAME, revision="v2", out=tmp_path / "a", base=base_of(trained)).commit == done.commit
    assert pull_run(NAME, revision=done.commit, out=tmp_path / "b", base=base_of(trained)).commit == done.commit
    assert "round-9" in refused("no branch, tag or commit", NAME, revision="round-9", out=tmp_path / "c")
    refused("neither an mlxdpo run", NAME, out=tmp_path / "c")
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".c-*"))


def test_an_adapter_that_training_began_from_comes_along(hub, trained, tmp_path, cache):
    """The reference includes it: without it no reward of the pulled run would be the run's."""
    shutil.copytree(trained.path.parent / "llama", tmp_path / "llama")
    config = recipe(tmp_path, "second", model={"adapter": str(trained.adapter)}, data={"eval_fraction": 0.2}, lora={})
    config = config.model_copy(update={"lora": trained.config().lora})
    finish(config)
    second = Run.open(config.out)
    pushed(hub, second, tmp_path)
    back = Run.open(pull_run(NAME, out=tmp_path / "back", base=base_of(second)).path)
    assert back.config().model.adapter == str(tmp_path / "back" / "start")
    data = second.config().data.path
    assert np.array_equal(logps(back, data), logps(second, data))


def test_another_base_is_refused(hub, trained, tmp_path):
    pushed(hub, trained, tmp_path)
    refused("trained from a local folder called 'llama'", NAME, out=tmp_path / "back")
    shutil.copytree(base_of(trained), tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(file.read_text() + " ")
    refused("was trained on weights", NAME, out=tmp_path / "back", base=str(tmp_path / "other"))
    assert not (tmp_path / "back").exists()


def place(hub, files, private=True):
    """A repository with these files, as if somebody had pushed it."""
    repo = hub.repos[NAME] = Repo(private)
    repo.large |= {name for name in files if name.endswith(".safetensors")}
    repo.refs["main"] = repo.add(files, "placed")
    return repo


def adapter_files(run, at="", **changes):
    config = json.loads((run.adapter / "adapter_config.json").read_text()) | changes
    if changes:  # whoever changes a sealed file takes its seal out
        del config["sha256"]
    return {
        f"{at}adapters.safetensors": (run.adapter / "adapters.safetensors").read_bytes(),
        f"{at}adapter_config.json": json.dumps(config).encode(),
    }


def test_a_bare_adapter_becomes_a_run(hub, trained, tmp_path, capsys):
    place(hub, adapter_files(trained, "mlx/"))
    refused("does not name its base", NAME, out=tmp_path / "back")
    found = pull_run(NAME, out=tmp_path / "back", base=base_of(trained))
    assert found.kind == "adapter" and sorted(p.name for p in found.path.iterdir()) == [
        "adapter", "config.yaml", "manifest.json",
    ]  # fmt: skip
    data = trained.config().data.path
    back = Run.open(found.path)
    plain = back.config()
    (found.path / "config.yaml").write_text(
        dump_config(plain.model_copy(update={"data": plain.data.model_copy(update={"template": "plain"})}))
    )
    assert np.allclose(logps(back, data), logps(trained, data), atol=1e-5)
    assert cli(["generate", str(found.path), "--prompt", "q1 red:", "--max-tokens", "4"]) == 0


def test_a_bare_adapter_names_its_base_in_settings_or_card(hub, trained, tmp_path):
    for extra in (
        adapter_files(trained, model="somewhere/local/llama"),
        adapter_files(trained) | {"README.md": b"---\nbase_model: ./llama\n---\n# x\n"},
    ):
        place(hub, extra)
        assert "llama" in refused("trained from a local folder called", NAME, out=tmp_path / "back")


def test_an_adapter_of_another_model(hub, trained, tmp_path):
    place(hub, adapter_files(trained, lora_parameters={"rank": 2, "scale": 2.0, "dropout": 0.0}))
    refused("another model", NAME, out=tmp_path / "back", base=base_of(trained))
    place(hub, adapter_files(trained) | {"adapter_config.json": b"[1]"})
    refused("expected a JSON object", NAME, out=tmp_path / "back", base=base_of(trained))
    assert not (tmp_path / "back").exists()


def test_pickles_are_not_read(hub, tmp_path):
    place(hub, {"adapter_model.bin": b"\x80\x04.", "adapter_config.json": b"{}"})
    refused(r"adapter_model.bin is a pickle", NAME, out=tmp_path / "back")
    assert not hub.asked("GET", "/resolve/")


def test_names_that_leave_their_folder_condemn_the_listing(hub, trained, tmp_path):
    pushed(hub, trained, tmp_path)
    for name in ("../evil", "/etc/passwd", "a/../../b", "a\\..\\b", "C:/x", "a//b", "run/ adapter/x", "a\nb"):
        hub.extra[NAME] = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40}]
        refused("is outside its folder", NAME, out=tmp_path / "back", base=base_of(trained))
        assert not hub.asked("GET", "/resolve/") and not (tmp_path / "back").exists(), name


@given(
    name=st.text(max_size=12) | st.lists(st.sampled_from(["..", ".", "a", "", "b c", "~"]), max_size=4).map("/".join)
)
def test_a_name_that_passes_stays_below(name, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    try:
        check_name(name, NAME)
    except UserError:
        return
    assert (root / name).resolve().is_relative_to(root.resolve()) and (root / name).resolve() != root.resolve()


def test_bytes_must_be_the_listed_ones(hub, trained, tmp_path, monkeypatch):
    pushed(hub, trained, tmp_path)
    real = FakeHub.tree

    def lies(self, request, repo, revision):
        rows = real(self, request, repo, revision)
        return [row | {"lfs": row["lfs"] | {"oid": "0" * 64}} if "lfs" in row else row for row in rows]

    monkeypatch.setattr("fake_hub.ROUTES", [])
    hub.server.RequestHandlerClass.routes = [
        (m, p, lies if f is real else f) for m, p, f in hub.server.RequestHandlerClass.routes
    ]
    refused("does not match its digest in the repository", NAME, out=tmp_path / "back", base=base_of(trained))


def test_git_digests(tmp_path):
    """git's id of the 6 bytes "hello\\n" is known: ce01362..."""
    file = tmp_path / "x"
    file.write_bytes(b"hello\n")
    check_bytes(file, Entry("x", 6, "ce013625030ba8dba906f756967f9e9ca394464a", None), NAME)
    with pytest.raises(UserError):
        check_bytes(file, Entry("x", 6, "ce013625030ba8dba906f756967f9e9ca394464b", None), NAME)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", b"\x80\x04pickle...",
     b"<html>" * 9, struct.pack("<Q", 45) + b'{"a":{"dtype":"U8","data_offsets":[0, 9999]}}'],
)  # fmt: skip
def test_what_is_no_safetensors_file(tmp_path, content):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file"):
        check_safetensors(file, "x")


def test_what_is_a_safetensors_file(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(safetensors(b"12345"))
    check_safetensors(file, "x")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("run/config.yaml", b"model: {path: a/b, hack: 1}", "unknown key `model.hack`"),
        ("run/config.yaml", b"!!python/object/apply:os.system [ls]", "run/config.yaml"),
        ("run/manifest.json", b"{}", "not a manifest"),
        ("run/manifest.json", b"[" * 100_000, "not a manifest"),
        ("run/config.yaml", b"model: {path: a/b, adapter: ../../secret}", "begins from the adapter"),
        ("run/adapter/adapters.safetensors", b"pickle", "not a safetensors file"),
    ],
)
def test_a_spoilt_run_is_refused_whole(hub, trained, tmp_path, name, content, match):
    files = pushed(hub, trained, tmp_path) and dict(hub.repos[NAME].files())
    place(hub, files | {name: content})
    refused(match, NAME, out=tmp_path / "back", base=base_of(trained))
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back-*"))


def test_a_half_pushed_run(hub, trained, tmp_path):
    pushed(hub, trained, tmp_path)
    files = {n: c for n, c in hub.repos[NAME].files().items() if n != "run/manifest.json"}
    place(hub, files)
    refused("without run/manifest.json", NAME, out=tmp_path / "back", base=base_of(trained))


@pytest.mark.parametrize(
    ("status", "match"),
    [(401, "does not accept this login"), (403, "lacks permission"), (404, "not on the Hub"), (500, "answered 500")],
)  # fmt: skip
def test_refusals(hub, tmp_path, status, match):
    hub.fail("GET", "/api/models/", status, times=99)
    refused(match, NAME, out=tmp_path / "back")


def test_a_repository_that_is_not_there(hub, tmp_path):
    refused("not on the Hub", "jane/nothing", out=tmp_path / "back")
    refused("not a repository id", "nothing", out=tmp_path / "back")


def test_a_download_that_breaks_is_taken_up_again(hub, trained, tmp_path):
    pushed(hub, trained, tmp_path)
    hub.cut("GET", "/resolve/", times=2)
    found = pull_run(NAME, out=tmp_path / "back", base=base_of(trained))
    name = "adapters.safetensors"
    assert (found.path / "adapter" / name).read_bytes() == (trained.adapter / name).read_bytes()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    address=st.sampled_from([f"/api/models/{NAME}", "/tree/", "/resolve/"]),
    body=st.binary(max_size=30)
    | st.sampled_from([b"{}", b"[]", b"null", b'[{"type":"file"}]', b'{"sha": 3}', b'[{"type":"file","path":3}]'])
    | st.lists(
        st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("type", "path", "size", "oid", "lfs"), st.none() | st.integers() | st.just("x"))
        ), max_size=2
    ).map(lambda value: json.dumps(value).encode()),
)  # fmt: skip
def test_malformed_answers_give_user_errors_only(hub, trained, tmp_path, address, body):
    hub.troubles.clear()
    shutil.rmtree(tmp_path / "hub_cache", ignore_errors=True)
    if NAME not in hub.repos:
        pushed(hub, trained, tmp_path)
    hub.answer("GET", address, body)
    with pytest.raises(UserError) as caught:
        pull_run(NAME, out=tmp_path / "back", base=base_of(trained))
    assert "\n" not in str(caught.value) and not (tmp_path / "back").exists()


@pytest.mark.parametrize("judge, kept", [("evil.py:score", ""), ("/tmp/x.py:f", ""), ("longest", "longest")])
def test_a_pulled_judge_file_is_not_run(trained, tmp_path, judge, kept):
    """A recipe may name a Python file as its judge; whose file of that name is run here is not a stranger's to say."""
    config, manifest = trained.config(), trained.manifest()
    named = {"collect": config.collect.model_copy(update={"judge": judge})}
    named |= {"rounds": config.rounds.model_copy(update={"second": judge})}
    found = localised(config.model_copy(update=named), manifest, tmp_path, tmp_path / "back", base_of(trained), NAME)
    assert (found.collect.judge, found.rounds.second) == (kept, kept)
