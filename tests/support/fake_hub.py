"""A Hub on this machine, as far as its client speaks with it when it pushes and pulls models; in memory, stdlib only.

    with FakeHub(token="hf_...") as hub:
        hub.fail("POST", "/commit/", 503, times=2)       # then normal again
        hub.cut("PUT", "/lfs/", after=1000)              # hang up after 1,000 bytes of the body
        hub.answer("GET", "whoami", b"[1, 2")            # a malformed reply

`hub.requests` keeps what was asked: method, path, status, whether a token came along, bytes of the body.
"""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import ThreadingHTTPServer
from urllib.parse import unquote

import yaml
from hub_http import Handler, Problem, Trouble
from hub_rules import check_metadata

LARGE = (".safetensors", ".gguf", ".png", ".bin")
PART = r"[^/]+"
REPO = rf"(?P<repo>{PART}/{PART})"


def blob_id(content):
    """git's own."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Repo:
    """Commits are dicts of path -> bytes; `large` paths are stored by SHA-256."""

    def __init__(self, private):
        self.private, self.commits, self.refs, self.tags, self.pulls, self.large = private, {}, {}, {}, {}, set()
        self.refs["main"] = self.add({".gitattributes": b"*.safetensors filter=lfs\n"}, "start")

    def add(self, files, salt):
        commit = hashlib.sha1(repr((sorted(files.items()), salt, len(self.commits))).encode()).hexdigest()
        self.commits[commit] = files
        return commit

    def find(self, revision):
        revision = unquote(revision)
        for table in (self.refs, self.tags):
            if revision in table:
                return table[revision]
        if revision in self.commits:
            return revision
        raise Problem(404, "Revision not found", "RevisionNotFound")

    def files(self, revision="main"):
        return self.commits[self.find(revision)]


class FakeHub:
    def __init__(self, token, user="jane"):
        self.token, self.user = token, user
        self.repos, self.store, self.requests, self.troubles = {}, {}, [], []
        self.read_only, self.extra = set(), {}  # names this login may not write; extra names in a listing
        self.lock = threading.Lock()

    def __enter__(self):
        handler = type("Handler", (Handler,), {"hub": self, "routes": ROUTES})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method, path, status, times=1, headers=(), message="injected", code=None):
        self.troubles.append(Trouble(method, path, times, Problem(status, message, code, headers)))

    def cut(self, method, path, after=0, times=1):
        self.troubles.append(Trouble(method, path, times, after))

    def answer(self, method, path, body, times=10**9):
        self.troubles.append(Trouble(method, path, times, body))

    def trouble(self, method, path):
        with self.lock:
            for trouble in self.troubles:
                if trouble.times and trouble.method == method and trouble.path in unquote(path):
                    trouble.times -= 1
                    return trouble.act
        return None

    def asked(self, method, path):
        """The requests that match."""
        return [r for r in self.requests if r.method == method and path in unquote(r.path)]

    # What each address does: (method, pattern, function). `repo` is checked before the function is called.

    def whoami(self, request):
        return {"name": self.user, "type": "user", "orgs": [], "auth": {"type": "access_token"}}

    def validate(self, request):
        text = request.json()["content"]
        head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        wrong = check_metadata(yaml.safe_load(head[1])) if head else ["no metadata"]
        if wrong:
            raise Problem(400, json.dumps({"errors": [{"message": w} for w in wrong], "warnings": []}))
        return {"errors": [], "warnings": []}

    def create(self, request):
        asked = request.json()
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        private = asked["visibility"] == "private" if "visibility" in asked else asked.get("private", False)
        if name in self.repos:
            body = {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            raise Problem(409, json.dumps(body))
        if name.split("/")[0] != self.user:
            raise Problem(403, "You don't have the rights to create a model under this namespace")
        self.repos[name] = Repo(private)
        return {"url": f"{self.url}/{name}", "name": name, "id": name}

    def info(self, request, repo, revision="main"):
        commit = self.repos[repo].find(revision)
        files = [{"rfilename": name} for name in self.repos[repo].commits[commit]]
        return {"id": repo, "_id": "0", "sha": commit, "private": self.repos[repo].private, "siblings": files,
                "tags": [], "downloads": 0, "likes": 0, "createdAt": "2026-01-01T00:00:00.000Z"}  # fmt: skip

    def tree(self, request, repo, revision):
        rows = []
        for name, content in self.repos[repo].files(revision).items():
            row = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
            if name in self.repos[repo].large:
                row["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            rows.append(row)
        return rows + self.extra.get(repo, [])

    def refs(self, request, repo):
        found = self.repos[repo]
        branches = [r for r in found.refs if not r.startswith("refs/pr/")]
        return {
            "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": found.refs[n]} for n in branches],
            "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in found.tags.items()],
            "converts": [],
        }

    def preupload(self, request, repo, revision):
        there = self.repos[repo].files(revision)
        rows = []
        for file in request.json()["files"]:
            name = file["path"]
            large = name.endswith(LARGE)
            old = there.get(name)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else blob_id(old)
            mode = "lfs" if large else "regular"
            rows.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": rows}

    def batch(self, request, repo):
        objects = []
        for o in request.json()["objects"]:
            row = {"oid": o["oid"], "size": o["size"]}
            if o["oid"] not in self.store:
                href = f"{self.url}/lfs/{o['oid']}?X-Amz-Signature=secret"
                row["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.url}/lfs-verify"}}
            objects.append(row)
        return {"transfer": "basic", "objects": objects}

    def put(self, request, oid):
        content = request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise Problem(400, "the bytes are others than announced")
        self.store[oid] = content
        return {}

    def verify(self, request):
        if request.json()["oid"] not in self.store:
            raise Problem(404, "no such object")
        return {}

    def commit(self, request, repo, revision):
        found, lines = self.repos[repo], [json.loads(line) for line in request.body().splitlines()]
        head = found.find(revision)
        files = dict(found.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, head):
                raise Problem(412, "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.store[value["oid"]]
                found.large.add(value["path"])
            if line["key"] == "deletedFile":
                files.pop(value["path"])
        commit = found.add(files, lines[0]["value"]["summary"])
        found.refs[unquote(revision)] = commit
        return {
            "success": True,
            "commitOid": commit,
            "commitUrl": f"{self.url}/{repo}/commit/{commit}",
            "hookOutput": "",
        }

    def branch(self, request, repo, name):
        found, name = self.repos[repo], unquote(name)
        if name in found.refs:
            raise Problem(409, "Reference already exists")
        found.refs[name] = found.find((request.json() or {}).get("startingPoint", "main"))
        return {}

    def tag(self, request, repo, revision):
        found, name = self.repos[repo], request.json()["tag"]
        if name in found.tags:
            raise Problem(409, "Tag reference exists already")
        found.tags[name] = found.find(revision)
        return {}

    def discuss(self, request, repo):
        found = self.repos[repo]
        number = len(found.pulls) + 1
        found.pulls[number] = request.json() | {"status": "draft"}
        found.refs[f"refs/pr/{number}"] = found.refs["main"]
        return {"num": number}

    def discussion(self, request, repo, number):
        pull = self.repos[repo].pulls[int(number)]
        return {"title": pull["title"], "num": int(number), "author": {"name": self.user}, "status": pull["status"],
                "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": repo, "type": "model"}, "events": [],
                "isPullRequest": True, "changes": {"base": "refs/heads/main"}, "filesWithConflicts": []}  # fmt: skip

    def status(self, request, repo, number):
        self.repos[repo].pulls[int(number)]["status"] = request.json()["status"]
        return {"newStatus": {"id": "0", "type": "status-change", "createdAt": "2026-01-01T00:00:00.000Z",
                "author": {"name": self.user}, "data": {"status": request.json()["status"]}}}  # fmt: skip

    def resolve(self, request, repo, revision, name):
        found = self.repos[repo]
        commit, name = found.find(revision), unquote(name)
        if name not in found.commits[commit]:
            raise Problem(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        content = found.commits[commit][name]
        etag = hashlib.sha256(content).hexdigest() if name in found.large else blob_id(content)
        request.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
        return None


ROUTES = [
    ("GET", "/api/whoami-v2", FakeHub.whoami),
    ("POST", "/api/validate-yaml", FakeHub.validate),
    ("POST", "/api/repos/create", FakeHub.create),
    ("GET", f"/api/models/{REPO}", FakeHub.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>.+)", FakeHub.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>{PART})", FakeHub.tree),
    ("GET", f"/api/models/{REPO}/refs", FakeHub.refs),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>{PART})", FakeHub.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>{PART})", FakeHub.commit),
    ("POST", f"/api/models/{REPO}/branch/(?P<name>{PART})", FakeHub.branch),
    ("POST", f"/api/models/{REPO}/tag/(?P<revision>{PART})", FakeHub.tag),
    ("POST", f"/api/models/{REPO}/discussions", FakeHub.discuss),
    ("GET", f"/api/models/{REPO}/discussions/(?P<number>\\d+)", FakeHub.discussion),
    ("POST", f"/api/models/{REPO}/discussions/(?P<number>\\d+)/status", FakeHub.status),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", FakeHub.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", FakeHub.put),
    ("POST", "/lfs-verify", FakeHub.verify),
    ("GET", f"/{REPO}/resolve/(?P<revision>{PART})/(?P<name>.+)", FakeHub.resolve),
    ("HEAD", f"/{REPO}/resolve/(?P<revision>{PART})/(?P<name>.+)", FakeHub.resolve),
]


TOKEN = "hf_" + "SecretOfTheTests" * 2


class Clock:
    """Stands in for the module `time` where the client and we wait between attempts."""

    def __init__(self):
        self.slept = []

    def sleep(self, seconds):
        self.slept.append(seconds)

    def __getattr__(self, name):
        return getattr(time, name)


def connected(tmp_path, monkeypatch):
    """Yield a Hub that huggingface_hub talks to, with an own cache, an own login, and a clock that does not wait."""
    from huggingface_hub.utils import close_session

    from mlxdpo.exporters import client

    clock = Clock()
    with FakeHub(TOKEN) as hub:
        hub.slept = clock.slept
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub_cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no_token"),
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
        monkeypatch.setattr(client, "time", clock)
        yield hub
        close_session()
