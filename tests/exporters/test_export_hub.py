"""Pushing to a Hub on this machine: private, listed files only, after the gate, patient within bounds, no token."""

import hashlib
import logging
import re

import pytest
from fake_hub import TOKEN
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_export import CARD, PASSED, record, safetensors, small_export

from mlxdpo.exporters.card import BEGIN, END, OFFER
from mlxdpo.exporters.client import check_endpoint, check_repo_id, redact, retry_after
from mlxdpo.exporters.hub import dry_run, propose, push
from mlxdpo.types import UserError

LEAVES = ["README.md", "export.json", "mlx/adapter_config.json", "mlx/adapters.safetensors"]
NAME = "jane/tiny-dpo"


@pytest.fixture
def out(tmp_path):
    return small_export(tmp_path / "out")


def uploads(hub):
    """Bodies that arrived whole."""
    return [r for r in hub.asked("PUT", "/lfs/") if r.status == 200]


def refused(match, call, *arguments, **named):
    with pytest.raises(UserError, match=match) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text and len(text) < 420
    return text


def test_dry_run_lists_files_with_sizes_and_says_what_stays(out):
    going, left = dry_run(out)
    assert [file.name for file in going] == LEAVES
    assert [file.size for file in going] == [(out / name).stat().st_size for name in LEAVES]
    assert {item.name for item in left} == {".env", "votes.jsonl", "metrics.jsonl", "mlx/optimizer.safetensors"}


def test_a_named_file_of_another_kind_stays_too(out):
    """`export.json` names everything in mlx/, the optimizer's state too: the list of kinds has the last word."""
    assert "mlx/optimizer.safetensors" in [f"mlx/{f}" for f in record(out, {"mlx": "mlx"}).targets["mlx"].files]
    (out / "mlx" / "link.gguf").symlink_to(out / ".env")
    record(out, {"mlx": "mlx"})
    going, left = dry_run(out)
    assert [file.name for file in going] == LEAVES
    assert ("mlx/link.gguf", "a symbolic link") in [tuple(item) for item in left]


def test_pushed_bytes_are_the_files_and_the_repository_is_private(hub, out):
    said = []
    done = push(out, NAME, say=said.append)
    repo = hub.repos[NAME]
    assert repo.private and done.commit == repo.refs["main"] and done.revision == "main"
    assert {name: content for name, content in repo.files().items() if name != ".gitattributes"} == {
        name: (out / name).read_bytes() for name in LEAVES
    }
    assert any("votes.jsonl" in line for line in said) and done.url == f"{hub.url}/{NAME}"


def test_public_only_when_asked(hub, out):
    push(out, NAME, visibility="public")
    assert hub.repos[NAME].private is False


def test_a_repository_that_exists_keeps_its_visibility(hub, out):
    push(out, NAME, visibility="public")
    count = len(uploads(hub))
    refused("exists and is public", push, out, NAME)
    refused("exists and is public", propose, out, NAME)
    push(out, "jane/other")
    refused("exists and is private", push, out, "jane/other", visibility="public")
    assert len(uploads(hub)) == count  # jane/other's weights were in the store already


def test_pushing_again_sends_nothing_and_makes_no_commit(hub, out):
    first = push(out, NAME)
    count = len(uploads(hub))
    assert push(out, NAME).commit == first.commit and len(uploads(hub)) == count


def test_branch_and_tag(hub, out):
    done = push(out, NAME, revision="round-2", tag="v2")
    repo = hub.repos[NAME]
    assert repo.refs["round-2"] == repo.tags["v2"] == done.commit != repo.refs["main"]
    assert "README.md" not in repo.files("main")
    assert push(out, NAME, revision="round-2", tag="v2").commit == done.commit  # an earlier, cut run's tag
    (out / "README.md").write_text(CARD + "more\n")
    refused("already has a tag v2", push, out, NAME, revision="round-2", tag="v2")


def test_pull_request_leaves_main_alone(hub, out):
    push(out, NAME)
    before = hub.repos[NAME].refs["main"]
    (out / "README.md").write_text(CARD + "more\n")
    done = propose(out, NAME)
    repo = hub.repos[NAME]
    assert repo.refs["main"] == before and done.commit == repo.refs["refs/pr/1"]
    assert repo.files("refs/pr/1")["README.md"] == (out / "README.md").read_bytes()
    assert repo.pulls[1]["status"] == "open" and done.pull_request.endswith("/discussions/1")
    (out / "README.md").write_text(CARD + "still more\n")
    assert push(out, NAME, revision="refs/pr/1").commit == repo.refs["refs/pr/1"] and len(repo.pulls) == 1


def test_a_pull_request_needs_a_repository(hub, out):
    refused("not on the Hub", propose, out, NAME)


def test_the_gate_stands_before_the_hub(hub, tmp_path):
    failed = PASSED._replace(passed=False, reason="slope 0.31, at least 0.9 expected.", forced=True)
    out = small_export(tmp_path / "out", failed)
    text = refused("did not pass the fidelity gate", push, out, NAME)
    assert "slope 0.31" in text and hub.requests == []


def test_no_card_no_record_no_push(hub, out):
    (out / "README.md").unlink()
    refused("without a card", push, out, NAME)
    (out / "export.json").unlink()
    refused("no export.json", push, out, NAME)
    assert hub.requests == []


def test_a_token_in_a_text_is_never_sent(hub, out):
    (out / "README.md").write_text(CARD + TOKEN)
    text = refused("looks like a token", push, out, NAME)
    assert TOKEN not in text and hub.requests == []


def test_another_exports_weights_are_not_mixed_with(hub, out):
    push(out, NAME)
    hub.repos[NAME].files()["model.safetensors"] = b"old"
    refused("holds model.safetensors, which this export does not have", push, out, NAME)
    hub.repos[NAME].files().pop("model.safetensors")
    hub.repos[NAME].files()["photo.png"] = b"the user's own"
    push(out, NAME)


def test_words_written_on_the_hub_are_not_lost(hub, out):
    """An untouched card does not replace one that was edited there; a card with words of its own does."""
    mine = f"{BEGIN}\n\nfor limericks\n\n{END}\n"
    untouched = CARD + f"{BEGIN}\n\n{OFFER}\n\n{END}\n"
    (out / "README.md").write_text(untouched)
    push(out, NAME)
    push(out, NAME)
    repo = hub.repos[NAME]
    before = repo.refs["main"] = repo.add(repo.files() | {"README.md": (CARD + mine).encode()}, "edited on the Hub")
    refused("has words of yours between its marks", push, out, NAME)
    refused("has words of yours between its marks", propose, out, NAME)
    assert hub.repos[NAME].refs["main"] == before and hub.repos[NAME].pulls == {}
    (out / "README.md").write_text(CARD + mine.replace("limericks", "odes"))
    push(out, NAME)
    assert b"odes" in hub.repos[NAME].files()["README.md"]


def test_someone_else_pushed_meanwhile(hub, out):
    push(out, NAME)
    (out / "README.md").write_text(CARD + "more\n")
    hub.fail("POST", "/commit/", 412, message="A commit has happened since")
    refused("was changed by someone else", push, out, NAME)
    hub.fail("POST", "/commit/", 409)
    refused("conflicts with existing content", push, out, NAME)


@pytest.mark.parametrize(
    ("method", "path", "status", "match"),
    [
        ("GET", "whoami", 401, "does not accept this login"),
        ("POST", "repos/create", 403, "lacks permission"),
        ("POST", "/preupload/", 403, "lacks permission"),
        ("POST", "/preupload/", 404, "not on the Hub"),
        ("POST", "/commit/", 400, "refused while uploading"),
        ("POST", "/commit/", 413, "too large"),
        ("POST", "repos/create", 402, "payment"),
    ],
)
def test_refusals_are_one_sentence_and_not_repeated(hub, out, method, path, status, match):
    hub.fail(method, path, status, times=99, message=f"no, {TOKEN}")
    refused(match, push, out, NAME)
    assert len(hub.asked(method, path)) == 1 and hub.slept == []


def test_an_unknown_login(hub, out, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 6)
    refused("does not accept this login", push, out, NAME)
    monkeypatch.delenv("HF_TOKEN")
    refused("hf auth login", push, out, NAME)


def test_someone_elses_name(hub, out):
    refused("lacks permission for bob/tiny", push, out, "bob/tiny")
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "jane/", "/tiny", "jane/ti ny", "jane/..", "", "https://x/y", TOKEN])
def test_wrong_names_are_refused_here(hub, out, name):
    refused("not a repository id", push, out, name)
    assert hub.requests == []


def test_too_many_requests_waits_as_long_as_the_server_asks(hub, out):
    said = []
    hub.fail("POST", "repos/create", 429, times=2, headers={"Retry-After": "7"})
    push(out, NAME, say=said.append)
    assert hub.slept == [7.0, 7.0] and sum("answered 429" in line for line in said) == 2
    assert hub.repos[NAME].files()["README.md"]


def test_the_hubs_own_rate_limit_header_counts_too():
    assert retry_after({"RateLimit": '"api";r=0;t=55'}) == 55
    assert retry_after({"RateLimit": '"api";r=3;t=55'}) is None
    assert retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}) is None


@pytest.mark.parametrize("path", ["repos/create", "/preupload/", "/commit/"])
def test_nobody_waits_for_an_hour(hub, out, path):
    """Also where the client itself would sleep for as long as it is told (/preupload/)."""
    hub.fail("POST", path, 429, times=99, headers={"Retry-After": "3600"})
    refused("asks to wait 3600 s", push, out, NAME)
    assert sum(hub.slept) <= 120 and len(hub.asked("POST", path)) == 1


def test_a_server_that_stumbles_is_asked_again(hub, out):
    hub.fail("POST", "/commit/", 503, times=2)
    push(out, NAME)
    assert len(hub.asked("POST", "/commit/")) == 3 and len(uploads(hub)) == 1  # the weights were there already


def test_a_server_that_is_down_is_given_up(hub, out):
    hub.fail("POST", "/commit/", 500, times=99)
    refused("answered 500 3 times", push, out, NAME)
    assert len(hub.asked("POST", "/commit/")) == 3


def test_a_cut_in_the_upload_is_survived(hub, out):
    hub.cut("PUT", "/lfs/", after=1000, times=2)
    push(out, NAME)
    assert hub.repos[NAME].files()["mlx/adapters.safetensors"] == (out / "mlx" / "adapters.safetensors").read_bytes()


def test_a_cut_for_good_is_resumed_by_the_next_run(hub, tmp_path):
    """Four large files; the connection dies in the third. The next run sends the two that are missing, once."""
    out = small_export(tmp_path / "out", shards=4)
    weights = sorted(p for p in (out / "mlx").glob("*.safetensors") if p.name != "optimizer.safetensors")
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in weights]
    for digest in digests[2:]:
        hub.cut("PUT", f"/lfs/{digest}", after=100, times=10**6)
    refused("connection to the Hub was lost while uploading", push, out, NAME)
    assert set(hub.store) == set(digests[:2]) and list(hub.repos[NAME].files()) == [".gitattributes"]
    hub.troubles.clear()
    before = len(uploads(hub))
    push(out, NAME)
    sent = [re.search("[0-9a-f]{64}", r.path)[0] for r in uploads(hub)[before:]]
    assert sorted(sent) == sorted(digests[2:])
    assert all(hub.repos[NAME].files()[f"mlx/{p.name}"] == p.read_bytes() for p in weights)


def test_the_commits_answer_is_lost(hub, out):
    """The Hub commits, the answer never arrives: the second attempt finds everything there and adds nothing."""
    request_count = len(hub.requests)
    hub.cut("POST", "/commit/", after=10**9, times=1)
    done = push(out, NAME)
    assert done.commit == hub.repos[NAME].refs["main"] and len(hub.requests) > request_count


@pytest.mark.parametrize(
    "endpoint", ["http://hub.example.org", "ftp://127.0.0.1", "http://127.0.0.1.evil.org", "", "x"]
)
def test_a_login_is_not_sent_in_the_clear(hub, out, monkeypatch, endpoint):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    refused("only over https|goes only over https", push, out, NAME)
    assert hub.requests == []


@pytest.mark.parametrize("endpoint", ["https://hf.co", "http://localhost:80", "http://127.8.0.1:9", "http://[::1]:9"])
def test_https_and_this_machine_are_fine(endpoint):
    check_endpoint(endpoint)


def test_presigned_uploads_carry_no_login(hub, out):
    push(out, NAME)
    assert uploads(hub) and not any(r.token for r in hub.requests if r.method == "PUT")
    assert all(r.token for r in hub.requests if r.method != "PUT")


def test_no_token_in_anything_written_or_printed(hub, out, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    said = []
    push(out, NAME, tag="v1", say=said.append)
    hub.fail("POST", "/commit/", 400, times=1, message=f"your token {TOKEN} is odd")
    (out / "README.md").write_text(CARD + "more\n")
    said.append(refused("refused", push, out, NAME))
    hub.cut("POST", "/preupload/", times=99)
    said.append(refused("connection", push, out, NAME))
    captured = capfd.readouterr()
    texts = "\n".join([*said, captured.out, captured.err, caplog.text])
    assert said and TOKEN not in texts and "X-Amz-Signature" not in captured.out + captured.err
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 5 and not [p for p in files if TOKEN.encode() in p.read_bytes()]
    assert not [c for r in hub.repos.values() for f in r.commits.values() for c in f.values() if TOKEN.encode() in c]


def test_a_server_that_answers_with_the_login_does_not_get_it_printed(hub, out):
    hub.answer("GET", "whoami", f'{{"name": "{TOKEN}", "type": "user", "orgs": []}}'.encode())
    said = []
    push(out, NAME, say=said.append)
    assert "as hf_***" in said[0] and TOKEN not in "".join(said)


def test_redaction():
    assert redact(f"Bearer {TOKEN}, and hf_abcdefgh12") == "Bearer hf_***, and hf_***"


def test_an_odd_token_is_struck_out_by_value(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "no-prefix-at-all")
    assert "no-prefix" not in redact("sent no-prefix-at-all")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=2), max_leaves=4
)
SHAPES = st.dictionaries(
    st.sampled_from(
        ["name", "url", "sha", "private", "files", "objects", "commitOid", "commitUrl", "tags", "branches"]
    ),
    JSON,
    max_size=4,
)
ADDRESSES = ["whoami", "repos/create", "/revision/", "/tree/", "/preupload/", "/objects/batch", "/commit/", "validate"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    address=st.sampled_from([*ADDRESSES, f"/api/models/{NAME}"]),
    body=st.binary(max_size=20) | (JSON | SHAPES).map(lambda value: __import__("json").dumps(value).encode()),
    status=st.sampled_from([200, 200, 200, 400, 418, 451]),
)
def test_malformed_answers_give_user_errors_only(hub, out, address, body, status):
    hub.repos.clear()
    hub.store.clear()
    hub.troubles.clear()
    for method in ("GET", "POST"):
        if status == 200:
            hub.answer(method, address, body)
        else:
            hub.fail(method, address, status, times=99, message=body.decode("latin-1"))
    try:
        push(out, NAME)
    except UserError as error:
        assert "\n" not in str(error) and TOKEN not in str(error)


def test_repository_names():
    check_repo_id("jane/smollm2-dpo_1.0")


def test_safetensors_helper_is_what_it_says():
    assert safetensors(b"abc").endswith(b"abc")
