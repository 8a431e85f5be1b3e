"""The Hub's client with manners: where it may talk to, who is logged in, bounded patience, errors in one sentence.

Nothing here sees the token except to strike it out of a text: huggingface_hub finds it itself (its own login, or
HF_TOKEN). Works with huggingface_hub 1.x (httpx) and 2.x (httpx2), so transport errors are caught by their base class.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from mlxdpo.io.names import is_loopback
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]
T = TypeVar("T")

TOKEN = re.compile(r"hf_[A-Za-z0-9_-]{8,}")
AGAIN = frozenset({429, 500, 502, 503, 504})
ATTEMPTS = 3
LONGEST = 120.0  # seconds; the client itself would sleep for as long as a server asks, hours even


class About(NamedTuple):
    """What a request is about, for its error message. `doing` completes "while ..."."""

    repo: str
    doing: str
    revision: str | None = None


class TooLong(Exception):
    """The server asks for more patience than `LONGEST`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:.0f} s")
        self.seconds = seconds


def redact(text: str) -> str:
    """`text` without anything that looks like a token, and without the token in use, whatever it looks like."""
    from huggingface_hub import get_token

    own = get_token()
    return TOKEN.sub("hf_***", text.replace(own, "hf_***") if own else text)


def connect() -> HfApi:
    """A client for the configured endpoint. Raises `UserError` for one that would see the token in the clear."""
    from huggingface_hub import HfApi, constants

    endpoint = constants.ENDPOINT
    check_endpoint(endpoint)
    return HfApi(endpoint=endpoint, library_name="mlxdpo", library_version=importlib.metadata.version("mlxdpo"))


def check_endpoint(endpoint: str) -> None:
    """Raise `UserError` unless `endpoint` is HTTPS, or this very machine: the client sends its token there."""
    parts = urlsplit(endpoint)
    if (parts.scheme == "https" and parts.hostname) or (parts.scheme == "http" and is_loopback(parts.hostname)):
        return
    raise UserError(
        f"HF_ENDPOINT is {redact(endpoint)}: a login goes only over https or to this machine; unset it or correct it"
    )


def check_repo_id(repo_id: str) -> None:
    """Raise `UserError` unless `repo_id` is owner/name in the Hub's spelling."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        allowed = False
    else:
        allowed = repo_id.count("/") == 1
    if not allowed:
        raise UserError(f"{redact(repr(repo_id))} is no repository id; expected owner/name, such as jane/smollm2-dpo")


def ask(about: About, call: Callable[[], T], say: Say) -> T:
    """What `call`, a request of the client's, returns; tried again a bounded number of times where that may help.

    Raises `UserError` in one sentence, without a token, whatever went wrong.
    """
    attempt = 1
    while True:
        try:
            with _bounded_waits(), _no_chatter():
                return call()
        except UserError:
            raise
        except Exception as raised:  # the client lets malformed answers through as KeyError, TypeError and others
            error = _root_cause(raised)
            wait = _wait_after(error, attempt)
            if wait is None or attempt == ATTEMPTS:
                raise hub_error(error, about) from None
            say(f"{_what(error)} while {about.doing}; trying again in {wait:.0f} s")
            time.sleep(wait)
            attempt += 1


def _root_cause(error: BaseException) -> Exception:
    """What the client's "Error while uploading FILE" was raised from, where it says so."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def _wait_after(error: Exception, attempt: int) -> float | None:
    """Seconds until the next attempt, or None where another one is of no use."""
    status = _http_status(error)
    if status in AGAIN:
        asked = retry_after(_headers(error))
        return min(LONGEST, asked if asked is not None else 2.0**attempt)
    return 2.0**attempt if status is None and isinstance(error, _transport_errors()) else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: Retry-After, or the window of the Hub's own RateLimit header."""
    named = {name.lower(): value for name, value in headers.items()}
    if (value := named.get("retry-after", "").strip()).isdigit():
        return float(value)
    found = re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", named.get("ratelimit", ""))
    return float(found[1]) if found else None


@contextlib.contextmanager
def _bounded_waits() -> Iterator[None]:
    """Turn answers that ask for more than `LONGEST` seconds into an error, before the client goes to sleep on them."""
    from huggingface_hub.utils import get_session

    def refuse(response: Any) -> None:
        """Stop where the client would silently wait for longer than anybody would."""
        asked = retry_after(response.headers) if response.status_code in AGAIN else None
        if asked is not None and asked > LONGEST:
            raise TooLong(asked)

    hooks = get_session().event_hooks["response"]
    hooks.append(refuse)
    try:
        yield
    finally:
        hooks.remove(refuse)


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """The client warns with whole URLs, which for uploads are signed; what matters is said by `ask`."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _transport_errors() -> type[Exception]:
    """The base class of what the client's transport raises: httpx.HTTPError in 1.x, httpx2.HTTPError in 2.x."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _http_status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _headers(error: Exception) -> Mapping[str, str]:
    return getattr(getattr(error, "response", None), "headers", {})


def _what(error: Exception) -> str:
    status = _http_status(error)
    return f"the Hub answered {status}" if status else "the connection was lost"


def hub_error(error: Exception, about: About) -> UserError:
    """What went wrong and what to do, in one sentence without a token."""
    return UserError(redact(_explanation(error, about)))


def _explanation(error: Exception, about: About) -> str:
    from huggingface_hub import errors

    if isinstance(error, TooLong):
        return (
            f"the Hub asks to wait {error.seconds:.0f} s before {about.doing} (too many requests); "
            "run the same command again after that, what was transferred is kept"
        )
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "there is no Hub login here; run `hf auth login`, or set HF_TOKEN to a token with write access"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, so {about.repo} cannot be reached; unset it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{about.repo} has no branch, tag or commit {about.revision or 'main'}; look at its list of branches"
    if (status := _http_status(error)) is not None:
        return _of_status(status, error, about)
    if isinstance(error, _transport_errors() | errors.LocalEntryNotFoundError):
        return (
            f"the connection to the Hub was lost while {about.doing}; "
            "run the same command again, what was transferred is kept"
        )
    detail = " ".join(str(error).split())[:300]
    return f"{about.repo}: the Hub's answer while {about.doing} is not understood ({type(error).__name__}: {detail})"


def _of_status(status: int, error: Exception, about: About) -> str:
    repo, doing = about.repo, about.doing
    if status >= 500 or status == 429:
        return f"the Hub answered {status} {ATTEMPTS} times while {doing}; run the same command later"
    known = {
        401: "the Hub does not accept this login (401); run `hf auth login` again, or renew HF_TOKEN",
        402: f"the Hub asks for a payment while {doing} (402); see the billing page of {repo.split('/')[0]}",
        403: f"this login may not do that to {repo} (403 while {doing}); use a token that may write there",
        404: f"{repo} is not on the Hub, or this login may not see it (404 while {doing}); check name and login",
        409: f"{repo}: {doing} conflicts with what is there already (409); look at the repository, then run it again",
        412: f"{repo} was changed by someone else while {doing} (412); run the same command again",
        413: f"{repo}: the Hub finds the upload too large (413); export fewer targets at once",
    }
    if status in known:
        return known[status]
    detail = " ".join((getattr(error, "server_message", None) or str(error)).split())[:300]
    return f"{repo}: the Hub refused while {doing} ({status}: {detail})"
