"""Requests that do not come from the page itself are refused: a web page in another tab must not press our buttons.

The threat is a browser that visits a hostile page while the app runs on 127.0.0.1. Each check has its test: the Host
header must be one the app answers to (DNS rebinding); no request may say that it comes from another page, to read no
more than to write, and no answer allows other pages to read it; what changes something must name this page and carry
the cookie of this process, which other sites' requests leave at home. Where the app has a password, nothing but the
login page is served without a login, and wrong passwords make the next attempt wait.
`api_visibility="private"` is no boundary in Gradio, so handlers that write or start something ask the guard again.

What a widget cannot send is refused before a handler sees it: its API takes any JSON, from whoever has the cookie, and
Gradio checks some widgets' values and not others'; a list where a name belongs would break a handler half-way.
"""

from __future__ import annotations

import functools
import hmac
import inspect
import ipaddress
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any

COOKIE = "mlxdpo_page"
LARGEST_BODY = 2_000_000  # bytes; a chat's text is a few kilobytes, and nothing is uploaded
# The browser itself refuses requests to other hosts, and to show the page inside another one's. Gradio needs inline
# scripts and styles. A stricter referrer policy would blank the Origin that `refusal` looks at.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; base-uri 'self'; "
    "form-action 'self'; object-src 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-frame-options", b"SAMEORIGIN"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
CROSS_ORIGIN = b"access-control-"  # headers that allow other pages to read; Gradio sends them to every local one
SAFE = ("GET", "HEAD", "OPTIONS")
# What the login page is made of, and the address at which Gradio asks whether it runs: it says yes and nothing else.
WITHOUT_LOGIN = ("/", "/login", "/login/", "/theme.css", "/favicon.ico", "/gradio_api/startup-events")
ASSETS = ("/assets/", "/static/", "/svelte/")
FREE, LONGEST_WAIT = 5, 60.0  # attempts at the password before the next has to wait; seconds that it waits at most
MOST_ADDRESSES = 1000

Guard = Callable[[Any], None]
"""(gr.Request) -> None; raises `gr.Error` for a request that does not come from the page itself."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


def new_nonce() -> str:
    """A secret of this process, 256 bits."""
    return secrets.token_urlsafe(32)


def refusal(headers: Mapping[str, str], nonce: str) -> str | None:
    """Why a request that changes something is refused, or None. `headers` have lower-case names."""
    origin, host = headers.get("origin", ""), headers.get("host", "")
    if not host or origin.partition("://")[2] != host:
        return f"it comes from {origin or 'no page'}, not from this app's own page; open the app and use its buttons"
    mine = [value for name, value in _cookies(headers).items() if name.startswith(COOKIE)]
    if not any(hmac.compare_digest(value.encode(), nonce.encode()) for value in mine):
        return "the page is older than this app; reload it"
    return None


def foreign(headers: Mapping[str, str]) -> bool:
    """Whether a browser says that another page asks. A link to the app in another page is none: it is followed."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None and origin.partition("://")[2] != headers.get("host", ""):
        return True
    linked = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return site in ("cross-site", "same-site") and not linked


class Attempts:
    """Who tried passwords, and when each may try again; by address, or the network of one in IPv6."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[int, float]] = {}

    def begin(self, address: str) -> float:
        """Count an attempt, which is wrong until `forget` says otherwise; seconds to wait where it comes too soon."""
        count, when = self.made.pop(address, (0, 0.0))
        now = time.monotonic()
        early = when > now
        count, when = (count, when) if early else (count + 1, now + _pause(count + 1))
        self.made[address] = count, when
        while len(self.made) > MOST_ADDRESSES:
            self.made.pop(next(iter(self.made)))
        return when - now if early else 0.0

    def forget(self, address: str) -> None:
        """The password was right."""
        self.made.pop(address, None)


def _pause(count: int) -> float:
    return 0.0 if count < FREE else min(LONGEST_WAIT, 2.0 ** (count - FREE))


def _address_of(scope: Scope) -> str:
    host = (scope.get("client") or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return str(host)
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def logged_in(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Whether the app has no password, or the request carries the cookie of a login."""
    app = scope.get("app")
    if getattr(app, "auth", None) is None:
        return True
    names = [f"access-token-{kind}{app.cookie_id}" for kind in ("", "unsecure-")]  # type: ignore[union-attr]
    return any(_cookies(headers).get(name) in app.tokens for name in names)  # type: ignore[union-attr]


def _cookies(headers: Mapping[str, str]) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}


def page_guard(nonce: str) -> Guard:
    """The check that handlers make."""
    import gradio as gr

    def guard(request: gr.Request) -> None:
        """Raise `gr.Error` for a request that did not come from this page."""
        reason = refusal({name.lower(): value for name, value in request.headers.items()}, nonce)
        if reason:
            raise gr.Error(f"This request was refused: {reason}.")

    return guard


class Shutter:
    """ASGI middleware around all others: Gradio's own would answer other local pages before `Gate` is asked."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 to other pages; allow none to read what is answered."""
        headers = _headers_of(scope)
        if scope["type"] in ("http", "websocket") and foreign(headers):
            return await _answer(
                send, 403, "refused: the request comes from another page; open the app and use its buttons"
            )

        async def sent(message: MutableMapping[str, Any]) -> None:
            """`send`, without what allows other pages to read."""
            if message["type"] == "http.response.start":
                own = [pair for pair in message.get("headers", []) if not pair[0].lower().startswith(CROSS_ORIGIN)]
                message["headers"] = own
            await send(message)

        await self.app(scope, receive, sent)


def _headers_of(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope.get("headers", [])}


class Gate:
    """ASGI middleware: known host names, no other page, a login where there is one, bounded bodies, `refusal`."""

    def __init__(self, app: Application, *, nonce: str, hosts: Sequence[str]) -> None:
        self.app, self.nonce, self.hosts, self.attempts = app, nonce, tuple(hosts), Attempts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 400 (host), 401 (login), 403 (page, cookie), 413 (size) or 429 (too soon)."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = _headers_of(scope)
        if not known_host(headers.get("host", ""), self.hosts):
            return await _answer(send, 400, "unknown host; open the address that mlxdpo app printed")
        path = scope["path"]
        if not (path in WITHOUT_LOGIN or path.startswith(ASSETS) or logged_in(scope, headers)):
            return await _answer(send, 401, "log in first; open the address that mlxdpo app printed")
        if scope.get("method", "GET") not in SAFE or scope["type"] == "websocket":
            if reason := refusal(headers, self.nonce):
                return await _answer(send, 403, f"refused: {reason}")
            size = headers.get("content-length") or "0"
            if not (size.isascii() and size.isdigit()):
                return await _answer(send, 400, "content-length is not a number")
            if len(size) > 18 or int(size) > LARGEST_BODY:
                return await _answer(send, 413, f"too large; at most {LARGEST_BODY:,} bytes")
        send = self._dressed(scope, send)
        if path in ("/login", "/login/") and scope.get("method") == "POST":
            return await self._login(scope, receive, send)
        await self.app(scope, _bounded(receive), send)

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an attempt at the password on, unless it comes too soon; wrong ones are said on the terminal."""
        address = _address_of(scope)
        if wait := self.attempts.begin(address):
            print(f"login from {address}: refused, too soon", file=sys.stderr)
            return await _answer(send, 429, f"too many attempts; wait {wait:.0f} seconds")

        async def sent(message: MutableMapping[str, Any]) -> None:
            """`send`, looking at the status."""
            if message["type"] == "http.response.start":
                if right := message["status"] == 200:
                    self.attempts.forget(address)
                print(f"login from {address}: {'welcome' if right else 'wrong name or password'}", file=sys.stderr)
            await send(message)

        await self.app(scope, _bounded(receive), sent)

    def _dressed(self, scope: Scope, send: Send) -> Send:
        # Cookies know no ports: two apps on one machine need two names.
        port = (scope.get("server") or ("", 0))[1]
        cookie = f"{COOKIE}_{port}={self.nonce}; Path=/; HttpOnly; SameSite=Strict"
        extra = [*HEADERS, (b"set-cookie", cookie.encode())] if scope["path"] == "/" else HEADERS

        async def sent(message: MutableMapping[str, Any]) -> None:
            """`send`, with our headers at the start of the response."""
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        return sent


def known_host(host: str, known: Sequence[str]) -> bool:
    """Whether a Host header names one of `known`: names without port, `*.name` for any below it, `ip` for addresses."""
    name = host.rsplit("]", 1)[0] + "]" if host.startswith("[") else host.split(":")[0]
    name = name.lower().rstrip(".")
    below = [pattern[1:] for pattern in known if pattern.startswith("*.")]
    return name in known or any(name.endswith(end) for end in below) or ("ip" in known and _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _bounded(receive: Receive) -> Receive:
    """A body without content-length is counted while it comes in."""
    seen = 0

    async def received() -> MutableMapping[str, Any]:
        """`receive`, until too much has come in: then the client counts as gone."""
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > LARGEST_BODY:
            return {"type": "http.disconnect"}
        return message

    return received


async def _answer(send: Send, status: int, text: str) -> None:
    head = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": text.encode()})


LARGEST = 1e15  # what a browser's numbers hold without rounding; NaN is not below it
TEXTS, NUMBERS = ("textbox", "dropdown", "radio"), ("slider", "number")


def check_inputs(page: Any) -> None:
    """Put `problem` in front of every handler of a page."""
    for block in page.fns.values():
        if block.fn is not None:
            block.fn = _checked_handler(block.fn, tuple(block.inputs))


def problem(widget: Any, value: Any) -> str | None:
    """Why a widget cannot have sent `value`, or None."""
    name = widget.get_block_name()
    if value is None or (name not in TEXTS and name not in (*NUMBERS, "checkbox")):
        return None
    if getattr(widget, "multiselect", None):
        fits, wanted = isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of text"
    elif name in TEXTS:
        fits, wanted = isinstance(value, str) and _is_unicode(value), "text"
    elif name in NUMBERS:
        fits, wanted = _in_range(widget, value), "a number in the widget's range"
    else:
        fits, wanted = isinstance(value, bool), "yes or no"
    return None if fits else f"{widget.label or name} is {type(value).__name__}, expected {wanted}"


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: no half characters, which no file takes."""
    return text == text.encode("utf-8", "ignore").decode()


def _in_range(widget: Any, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return False
    least, most = (getattr(widget, name, None) for name in ("minimum", "maximum"))
    return (least is None or value >= least) and (most is None or value <= most)


def _checked_handler(function: Callable[..., Any], widgets: Sequence[Any]) -> Callable[..., Any]:
    """A handler that refuses values of other kinds; a generator stays one, as Gradio tells by the function."""
    import gradio as gr

    def check(values: Sequence[Any]) -> None:
        """Raise `gr.Error` for the first value that its widget cannot have sent."""
        sent = [value for value in values if not isinstance(value, gr.Request | gr.Progress | gr.EventData)]
        for widget, value in zip(widgets, sent, strict=False):
            if (why := problem(widget, value)) is not None:
                raise gr.Error(f"This request was refused: {why}.", print_exception=False)

    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*values: Any) -> Any:
            """The handler, step by step."""
            check(values)
            yield from function(*values)

        return steps

    @functools.wraps(function)
    def handler(*values: Any) -> Any:
        """The handler."""
        check(values)
        return function(*values)

    return handler
