"""The app's door, attacked: foreign hosts, other sites, paths, sizes, passwords; and every byte before a blind vote."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from tiny_desk import finished_run

from mlxdpo.cli import run as cli
from mlxdpo.io.json_file import read_lines
from mlxdpo.types import UserError
from mlxdpo.ui.guard import ASSETS, WITHOUT_LOGIN, known_host, refusal
from mlxdpo.ui.server import Login, check_login, hosts_for, is_open, start_app

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")
import httpx
from browser_client import JOIN, Browser


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    finished_run(folder)
    return folder


@pytest.fixture(scope="module")
def served(place):
    app = start_app(place / "runs", "one")
    yield app
    app.page.close()


@pytest.fixture(scope="module")
def locked(place):
    app = start_app(place / "runs", "one", login=Login("ada", "lovelace-1843"))
    yield app
    app.page.close()


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "192.168.1.5"]
)
def test_a_foreign_host_gets_nothing(served, host):
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", JOIN)):
        answer = httpx.request(method, served.url.rstrip("/") + path, headers={"Host": host})
        assert answer.status_code == 400 and "unknown host" in answer.text


def test_a_cross_origin_post_is_refused(served):
    user = Browser(served)
    body = {"data": ["one"], "fn_index": user.function("vote-export"), "session_hash": "x"}
    own = user.url
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", own.replace("http://", "http://evil."), None):
        headers = {} if origin is None else {"Origin": origin}
        plain = httpx.Client(base_url=own, cookies=user.http.cookies, headers=headers)
        for kind in ({"json": body}, {"content": json.dumps(body), "headers": {"Content-Type": "text/plain"}}):
            assert plain.post(JOIN, **kind).status_code == 403
        assert plain.post("/gradio_api/upload", files={"files": b"x"}).status_code == 403
    assert httpx.post(own + JOIN, json=body, headers={"Origin": own}).status_code == 403, "the cookie is asked for, too"
    assert (
        "SameSite=Strict" in httpx.get(own).headers["set-cookie"] and "HttpOnly" in httpx.get(own).headers["set-cookie"]
    )


FOREIGN = ("http://evil.example", "null", "http://127.0.0.1:1", "http://localhost:3000", "http://localhost")


@pytest.mark.parametrize("origin", FOREIGN)
def test_another_page_reads_nothing(served, origin):
    """Not by a GET, a preflight or an event stream; and no answer, to whomever, allows another page to read it."""
    own = served.url.rstrip("/")
    for method, path in (("GET", "/"), ("GET", "/config"), ("GET", "/gradio_api/info"), ("HEAD", "/"),
                         ("GET", "/gradio_api/queue/data?session_hash=x"), ("OPTIONS", "/config")):  # fmt: skip
        asked = {"Origin": origin, "Access-Control-Request-Method": "GET"}
        for headers in (asked, {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}):
            answer = httpx.request(method, own + path, headers=headers)
            assert answer.status_code == 403 and b"one" not in answer.content.replace(b"one page", b"")
            assert not [name for name in answer.headers if name.startswith("access-control")]
    plain = httpx.get(own + "/config", headers={"Origin": own})
    assert plain.status_code == 200 and not [name for name in plain.headers if name.startswith("access-control")]
    linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert httpx.get(own, headers=linked).status_code == 200, "a link to the app is followed"
    assert httpx.get(own, headers=linked | {"Sec-Fetch-Dest": "iframe"}).status_code == 403


def test_every_address_wants_a_login(locked):
    """Whatever routes Gradio has; but for the login page and what it is made of, which know nothing of the runs."""
    stranger = httpx.Client(base_url=locked.url.rstrip("/"), headers={"Origin": locked.url.rstrip("/")})
    open_ = {path for path in routes_of(locked.page.app) if stranger.get(path).status_code != 401}
    allowed = {*WITHOUT_LOGIN, *(f"{folder}x" for folder in ASSETS)}
    assert open_ <= allowed and len(routes_of(locked.page.app)) > 50
    for path in open_:
        assert b"runs" not in stranger.get(path).content and b"compare-run" not in stranger.get(path).content


def routes_of(app):
    """The paths of all routes, with x for what varies; asked for by GET, which a stream would keep open."""
    found = set()
    for route in [*app.routes, *(inner for one in app.routes for inner in nested(one))]:
        path = re.sub(r"\{[^}]*\}", "x", getattr(route, "path", "") or "/")
        found.add(path)
    return found | {
        "/gradio_api/app_id",
        "/gradio_api/token",
        "/gradio_api/user",
        "/gradio_api/heartbeat/x",
        "/openapi.json",
    }


def nested(route):
    router = getattr(route, "original_router", None)
    return [] if router is None else list(router.routes)


def test_wrong_passwords_make_the_next_attempt_wait(place, monkeypatch, capfd):
    clock = [1000.0]
    monkeypatch.setattr("mlxdpo.ui.guard.time", SimpleNamespace(monotonic=lambda: clock[0]))
    app = start_app(place / "runs", "one", login=Login("ada", "lovelace-1843"))
    try:
        user = Browser(app)
        wrong, right = ({"username": "ada", "password": word} for word in ("wrong", "lovelace-1843"))
        tried = [user.http.post("/login", data=wrong).status_code for _ in range(8)]
        assert tried == [400] * 5 + [429] * 3
        assert user.http.post("/login", data=right).status_code == 429, "and so does the right one"
        waits = []
        for _ in range(8):
            said = user.http.post("/login", data=wrong).text
            waits.append(int(re.search(r"wait (\d+) seconds", said)[1]))
            clock[0] += waits[-1] + 0.5
            assert user.http.post("/login", data=wrong).status_code == 400
        assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
        clock[0] += 61
        assert user.http.post("/login", data=right).status_code == 200
        assert [user.http.post("/login", data=wrong).status_code for _ in range(2)] == [400, 400], "counted from anew"
        said = capfd.readouterr().err
        assert said.count("login from 127.0.0.1: wrong name or password") == 15 and "wait" not in said
        assert "login from 127.0.0.1: refused, too soon" in said and "login from 127.0.0.1: welcome" in said
        assert "lovelace" not in said and "wrong\n" not in said
    finally:
        app.page.close()


def test_it_listens_on_ipv6(place):
    app = start_app(place / "runs", "one", host="::1")
    try:
        assert app.url.startswith("http://[::1]:") and Browser(app).http.get("/config").status_code == 200
        assert Browser(app).call("vote-export", ["one"])
    finally:
        app.page.close()


def test_the_page_of_another_process_is_refused():
    headers = {"host": "h:1", "origin": "http://h:1", "cookie": "mlxdpo_page_1=old; other=x"}
    assert refusal(headers, "new") == "the page is older than this app; reload it"
    assert refusal(headers, "old") is None
    assert "not from this app's own page" in refusal({**headers, "origin": "http://h:2"}, "old")


PATHS = [
    "../../../../etc/passwd",
    "/etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "../votes.jsonl",
    "runs/one/votes.jsonl",
]


@pytest.mark.parametrize("path", PATHS)
def test_no_file_is_served(served, path):
    for prefix in ("/gradio_api/file=", "/file=", "/static/", "/assets/", "/"):
        answer = Browser(served).http.get(prefix + path)
        shown = answer.content if answer.status_code == 200 else b""
        assert b"root:" not in shown and b"max_length:" not in shown


@pytest.mark.parametrize("name", ["../one", "/etc", "..", "one/../one"])
def test_the_page_takes_no_paths(served, name):
    """A name that the scan did not find is refused, whatever handler gets it."""
    (*_, last) = Browser(served).call("vote-export", [name])
    assert last["success"] is False
    user = Browser(served)
    (*_, last) = user.call("vote-next", [name, "own", "hi", 1.0, 1.0, 4, 1])
    assert last["success"] is False or b"no run called" in user.seen


def test_a_50_mb_prompt_is_turned_away(served):
    user = Browser(served)
    number = user.function("vote-next")
    body = json.dumps({"data": ["one", "own", "x" * 50_000_000, 1, 1, 4, 1], "fn_index": number, "session_hash": "s"})
    assert user.http.post(JOIN, content=body, headers={"Content-Type": "application/json"}).status_code == 413
    pieces = (body[i : i + 65536].encode() for i in range(0, len(body), 65536))
    with pytest.raises(httpx.HTTPError):  # without a length, the line is cut at the limit
        user.http.post(JOIN, content=pieces, headers={"Content-Type": "application/json"}).raise_for_status()
    assert user.http.get("/config").status_code == 200


def test_a_wrong_password_opens_nothing(locked):
    stranger = Browser(locked)
    for path in ("/config", "/gradio_api/info"):
        assert stranger.http.get(path).status_code == 401
    assert stranger.http.post(JOIN, json={"data": [], "fn_index": 0, "session_hash": "x"}).status_code == 401
    for user, password in (("ada", "wrong"), ("bob", "lovelace-1843"), ("ada", ""), ("", "")):
        answer = stranger.http.post("/login", data={"username": user, "password": password})
        assert answer.status_code in (400, 422) and stranger.http.get("/config").status_code == 401
    assert b"compare-run" not in stranger.http.get("/").content
    assert stranger.http.post("/login", data={"username": "ada", "password": "lovelace-1843"}).status_code == 200
    assert stranger.http.get("/config").status_code == 200


def test_an_open_app_without_a_password_does_not_start(place, capsys, monkeypatch):
    monkeypatch.delenv("MLXDPO_APP_PASSWORD", raising=False)
    for words in ("--host 0.0.0.0", "--share", "--host 192.168.1.5"):
        assert cli(["app", str(place / "runs/one"), *shlex.split(words)]) == 2
        assert "needs a password: add --auth NAME" in capsys.readouterr().err
    assert cli(["app", "--auth", "ada"]) == 2
    assert "no password; set MLXDPO_APP_PASSWORD" in capsys.readouterr().err
    monkeypatch.setenv("MLXDPO_APP_PASSWORD", "short")
    assert cli(["app", "--auth", "ada"]) == 2
    assert "short" not in (said := capsys.readouterr().err).replace("characters", "") and "5 characters" in said
    assert cli(["app", str(place)]) == 2


def test_who_is_open():
    assert not is_open("127.0.0.1", False) and is_open("127.0.0.1", True) and is_open("0.0.0.0", False)
    assert not is_open("::1", False) and not is_open("127.0.0.2", False) and is_open("::", False)
    check_login("localhost", False, Login("a", "12345678"))
    check_login("0.0.0.0", False, Login("a", "123456789abc"))
    for host, share in (("0.0.0.0", False), ("localhost", True)):
        with pytest.raises(UserError, match="has 11 characters; use at least 12"):
            check_login(host, share, Login("a", "123456789ab"))
        with pytest.raises(UserError, match="has 1 different characters; use at least 5"):
            check_login(host, share, Login("a", "a" * 40))
    with pytest.raises(UserError, match="shared over the internet"):
        check_login("localhost", True, None)


def test_host_names():
    near, far = hosts_for("127.0.0.1", False), hosts_for("0.0.0.0", True, ("box.example",))
    assert known_host("localhost:7860", near) and known_host("[::1]:7860", near) and known_host("127.0.0.1", near)
    assert not any(known_host(h, near) for h in ("", "evil", "10.0.0.1", "x.gradio.live", "127.0.0.1@evil.example"))
    assert known_host("10.0.0.1:80", far) and known_host("x.gradio.live", far) and known_host("box.example", far)
    assert not known_host("gradio.live", far) and not known_host("evil.example", far)


TELLING = ["before", "after", "tuned", "tuning", "reward", "kl", "tok", "ratio", "base", "adapter", "step-", "seed"]


@pytest.mark.parametrize("coin", [0, 1])
def test_every_byte_before_the_vote_is_blind(served, place, monkeypatch, coin):
    """The raw stream of a round: no side, no name, no number of either model; the state does not travel."""
    monkeypatch.setattr("mlxdpo.ui.vote.blind_round.secrets.randbelow", lambda n: coin if n == 2 else 11)
    user = Browser(served, session=f"blind{coin}")
    messages = user.call("vote-next", ["one", "own", "q3 red the:", 1.0, 1.0, 8, 5])
    assert messages[-1]["success"], messages[-1]
    raw = user.seen.decode().lower()
    for word in (
        "before",
        "after",
        "tuned",
        "tuning",
        "reward",
        "kl",
        "tok",
        "ratio",
        "base",
        "adapter",
        "step-",
        "seed",
    ):
        assert not re.search(rf"\b{word}", raw), word
    user.call("vote-a", [None])
    line = list(read_lines(place / "runs/one/votes.jsonl"))[-1]
    assert line["tuned"] == "ab"[coin] and line["winner"] == "a"
    raw = re.sub(r'"(rank_)?eta":[\d.]+', "", raw)  # Gradio's own, where any short number can stand by chance
    for secret in (line["id"], line["model"], line["adapter"]["after"], json.dumps(line["seconds"])):
        assert not re.search(rf"(?<![\d.]){re.escape(secret)}(?!\d)", raw)
    assert "after tuning" in user.seen.decode(), "and after the vote it is said"


def test_both_sides_of_the_coin_send_the_same_bytes(served, monkeypatch):
    """The same draw with the coin on either side: equal streams, once the two texts have changed places."""
    streams = []
    for coin in (0, 1):
        monkeypatch.setattr("mlxdpo.ui.vote.blind_round.secrets.randbelow", lambda n, coin=coin: coin if n == 2 else 11)
        messages = Browser(served, session=f"coin{coin}").call("vote-next", ["one", "own", "q3 red:", 1.0, 1.0, 8, 5])
        streams.append([(m["msg"], m.get("output", {}).get("data")) for m in messages if m["msg"] != "estimation"][-1])
    (kind, first), (other, second) = streams
    cards = [re.findall(r'<div class="answer">(.*?)</div>', data[1], re.S) for data in (first, second)]
    assert cards[0] == cards[1][::-1] and cards[0][0] != cards[0][1] and kind == other
    blank = [re.sub(r'<div class="answer">.*?</div>', "", data[1], flags=re.S) for data in (first, second)]
    assert blank[0] == blank[1] and first[2:] == second[2:] and first[0] == second[0] is None


def test_two_sessions_do_not_see_each_other(served, place):
    file = place / "runs/one/votes.jsonl"
    count = len(list(read_lines(file))) if file.exists() else 0
    one, two = Browser(served, session="one"), Browser(served, session="two")
    assert one.call("vote-next", ["one", "own", "q3 red the:", 1.0, 1.0, 8, 5])[-1]["success"]
    said = lambda browser: browser.call("vote-a", [None])[-1]["output"]["data"][3]  # noqa: E731
    assert "nothing to vote on yet" in said(two), "the other session has no round"
    assert "saved: A is better" in said(one)
    assert "saved: A is better" in said(one), "and the round has its one vote"
    assert len(list(read_lines(file))) == count + 1


def test_the_page_keeps_nothing_and_asks_nobody(served):
    answer = Browser(served).http.get("/config")
    assert answer.json()["analytics_enabled"] is False
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'self'" in policy and "http" not in policy
    page = Browser(served).http.get("/").text
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+)"', page)
    assert not [url for url in fetched if "127.0.0.1" not in url and "localhost" not in url], fetched
