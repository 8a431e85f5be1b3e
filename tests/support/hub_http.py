"""The HTTP side of the fake Hub: requests, logins, injected troubles, answers."""

import json
import re
import socket
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple
from urllib.parse import urlsplit


class Request(NamedTuple):
    method: str
    path: str
    status: int
    token: bool
    size: int


class Problem(Exception):
    """An error answer."""

    def __init__(self, status, message, code=None, headers=()):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers)


class Trouble:
    """What goes wrong with requests that match, `times` times."""

    def __init__(self, method, path, times, act):
        self.method, self.path, self.times, self.act = method, path, times, act


class Handler(BaseHTTPRequestHandler):
    hub = None  # a FakeHub
    routes = ()
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    content = None

    def log_message(self, *arguments):
        pass

    def body(self):
        if self.content is None:
            self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self.content

    def json(self):
        return json.loads(self.body() or b"null")

    def send(self, status, content, headers=()):
        size = int(self.headers.get("Content-Length") or 0)
        self.hub.requests.append(Request(self.command, self.path, status, "Authorization" in self.headers, size))
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_any(self):
        self.content = None
        trouble = self.hub.trouble(self.command, self.path)
        if isinstance(trouble, int):
            self.rfile.read(min(trouble, int(self.headers.get("Content-Length") or 0)))
            self.hub.requests.append(Request(self.command, self.path, 0, "Authorization" in self.headers, trouble))
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        try:
            self.body()
            if isinstance(trouble, Problem):
                raise trouble
            if isinstance(trouble, bytes):
                self.send(200, trouble, {"Content-Type": "application/json"})
                return
            result = self.route()
            if result is not None:
                self.send(200, json.dumps(result).encode(), {"Content-Type": "application/json"})
        except Problem as problem:
            self.explain(problem)

    def explain(self, problem):
        body = problem.message if problem.message.startswith("{") else json.dumps({"error": problem.message})
        code = {"X-Error-Code": problem.code} if problem.code else {}
        plain = problem.message if problem.message.isprintable() and not problem.message.startswith("{") else "error"
        self.send(problem.status, body.encode(), {"X-Error-Message": plain, **code, **problem.headers})

    def route(self):
        parts = urlsplit(self.path)
        for method, pattern, function in self.routes:
            found = re.fullmatch(pattern, parts.path)
            if method == self.command and found:
                if not parts.path.startswith("/lfs/"):  # presigned
                    self.check_login(found.groupdict().get("repo"))
                return function(self.hub, self, **found.groupdict())
        raise Problem(404, f"no such address: {self.command} {parts.path}")

    def check_login(self, repo):
        given, hub = self.headers.get("Authorization"), self.hub
        if given is not None and given != f"Bearer {hub.token}":
            raise Problem(401, "Invalid credentials in Authorization header")
        if repo is None:
            if given is None and "validate" not in self.path:
                raise Problem(401, "Invalid username or password.")
            return
        known = hub.repos.get(repo)
        if known is None or (known.private and given is None):
            raise Problem(404 if given else 401, "Repository not found", "RepoNotFound")
        if self.command == "POST" and (given is None or repo in hub.read_only):
            raise Problem(403, "You don't have write access to this repo")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any
