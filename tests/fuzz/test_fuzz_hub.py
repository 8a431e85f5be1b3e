"""A Hub that answers nonsense, cuts off, or serves other bytes than it lists: a sentence, and never the login."""

import random
from types import SimpleNamespace

import pytest
from counting import case, fuzzed
from fake_hub import TOKEN, connected
from hub_http import Problem, Trouble
from hypothesis import strategies as st
from mutating import ODD_NAMES, ODD_VALUES, SEEDS, dumped, mutate_bytes, mutate_value
from small_export import NAME, base_of, exported

from mlxdpo.exporters.client import check_name, check_repo_id
from mlxdpo.exporters.hub import push
from mlxdpo.exporters.pull import pull_run
from mlxdpo.io.names import is_plain_name
from mlxdpo.runs import Run
from mlxdpo.types import UserError

pytestmark = pytest.mark.fuzz

# Where a reply can go wrong: method, part of the address, and what is there when all is well.
ASKED = {
    "whoami": ("GET", "/api/whoami-v2", {"name": "jane", "type": "user", "orgs": []}),
    "info": ("GET", f"/api/models/{NAME}", {"id": NAME, "_id": "0", "sha": "a" * 40, "private": True, "siblings": []}),
    "tree": ("GET", "/tree/", [{"type": "file", "path": "run/config.yaml", "size": 3, "oid": "b" * 40}]),
    "refs": (
        "GET",
        "/refs",
        {"branches": [], "tags": [{"name": "v1", "ref": "r", "targetCommit": "a"}], "converts": []},
    ),
    "create": ("POST", "/api/repos/create", {"url": f"http://x/{NAME}", "name": NAME, "id": NAME}),
    "preupload": (
        "POST",
        "/preupload/",
        {"files": [{"path": "README.md", "uploadMode": "regular", "shouldIgnore": False}]},
    ),
    "batch": ("POST", "/objects/batch", {"transfer": "basic", "objects": [{"oid": "a" * 64, "size": 3}]}),
    "commit": ("POST", "/commit/", {"success": True, "commitOid": "a" * 40, "commitUrl": "http://x", "hookOutput": ""}),
    "file": ("GET", "/resolve/", None),
}
STATUSES = [400, 401, 403, 404, 408, 409, 412, 413, 416, 418, 422, 429, 451, 500, 502, 503]


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """The fake Hub with a pushed run, and the export it was pushed from."""
    for hub in connected(tmp_path, monkeypatch):
        out = exported(trained, tmp_path / "out")
        push(out, NAME)
        kept = {name: repo.files() for name, repo in hub.repos.items()}
        yield SimpleNamespace(hub=hub, out=out, base=base_of(trained), kept=kept, folder=tmp_path)


def trouble(rng, name):
    """Something that goes wrong with a kind of request, once or always."""
    method, path, value = ASKED[name]
    times = rng.choice([1, 2, 10**9])
    act = rng.random()
    if act < 0.2:
        headers = rng.choice([(), (("Retry-After", rng.choice(["1", "-5", "x", "9" * 30, "1e9"])),)])
        return Trouble(
            method,
            path,
            times,
            Problem(rng.choice(STATUSES), rng.choice(["no", "", TOKEN, "\n", "<b>"]), None, headers),
        )
    if act < 0.35:
        return Trouble(method, path, times, rng.choice([0, 1, 100, 5_000]))
    if value is None or act < 0.6:
        raw = dumped(value) if value is not None else b"{}"
        return Trouble(method, path, times, mutate_bytes(rng, raw))
    odd = [*ODD_VALUES, TOKEN, "http://evil.example/x"]
    return Trouble(method, path, times, dumped(mutate_value(rng, value, odd=odd)))


def quietly(call):
    """A call that has a sentence for whatever happens, in which the login is not."""
    said = []
    try:
        return call(said.append)
    except UserError as error:
        said.append(str(error))
        raise
    finally:
        assert TOKEN not in " ".join(said)


@fuzzed(15, 250, seed=SEEDS, name=st.sampled_from(["info", "tree", "file"]))
def test_pull(place, seed, name):
    rng, hub = random.Random(seed), place.hub
    back = place.folder / f"back-{seed}-{name}"
    hub.troubles[:] = [trouble(rng, name)]
    found = case("hub: pull", lambda: quietly(lambda say: pull_run(NAME, out=back, base=place.base, say=say)))
    assert (found is not None) == back.exists() and not list(place.folder.glob(f".{back.name}*"))
    if found is not None:
        Run.open(back).config()


@fuzzed(15, 250, seed=SEEDS)
def test_pull_of_changed_files(place, seed):
    """The Hub lists what it holds, and what it holds is not what we wrote."""
    rng, hub = random.Random(seed), place.hub
    back, repo = place.folder / f"other-{seed}", hub.repos[NAME]
    files = dict(place.kept[NAME])
    target = rng.choice([name for name in files if name.startswith("run/")])
    files[target] = mutate_bytes(rng, files[target])
    if rng.random() < 0.3:
        files[rng.choice([name for name in ODD_NAMES if name.isprintable()])] = b"x"
    hub.troubles.clear()
    head = repo.refs["main"]
    repo.refs["main"] = repo.add(files, str(seed))
    try:
        found = case(
            "hub: changed files", lambda: quietly(lambda say: pull_run(NAME, out=back, base=place.base, say=say))
        )
    finally:
        repo.refs["main"] = head
    if found is not None:
        case("hub: changed files, opened", lambda: (Run.open(back).config(), Run.open(back).manifest()))


@fuzzed(15, 250, seed=SEEDS, name=st.sampled_from(list(ASKED)))
def test_push(place, seed, name):
    rng, hub = random.Random(seed), place.hub
    hub.troubles[:] = [trouble(rng, name)]
    tag = rng.choice([None, "v1"])
    case("hub: push", lambda: quietly(lambda say: push(place.out, NAME, tag=tag, say=say)))


@fuzzed(
    40,
    400,
    name=st.sampled_from(ODD_NAMES)
    | st.text(max_size=20)
    | st.lists(st.sampled_from(ODD_NAMES), max_size=3).map("/".join),
)
def test_names_from_the_hub(tmp_path, name):
    """A name that passes stays below its folder."""
    case("hub: repository ids", lambda: check_repo_id(name))
    if case("hub: names of files", lambda: (check_name(name, "a/b"), True)) is not None:
        assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve()) and name
        assert all(map(is_plain_name, name.split("/")))
