"""The Hub's client with manners: where it may talk to, who is logged in, bounded patience, errors in one sentence.

Nothing here sees the token except to strike it out of a text: huggingface_hub finds it itself (its own login, or
HF_TOKEN). Works with huggingface_hub 1.x (httpx) and 2.x (httpx2), so transport errors are caught by their base class.

Files come from a repository that a stranger may have written. A name that leaves its folder condemns the whole listing;
only names on our own list are asked for; every file is held against the digest in the listing; weights are safetensors
with a sane header, never pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from mlxdpo.io.atomic import DISK
from mlxdpo.io.names import is_loopback, is_plain_name, without_tokens
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


Say = Callable[[str], None]
T = TypeVar("T")

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
    return without_tokens(text.replace(own, "hf_***") if own else text)


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
        raise UserError(
            f"{redact(repr(repo_id))} is not a repository id; expected owner/name, such as jane/smollm2-dpo"
        )


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
            if isinstance(error, OSError) and error.errno in DISK:
                raise error from None
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
        return (
            "there is no Hub login on this machine; run `hf auth login`, or set HF_TOKEN to a token with write access"
        )
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
    return f"{about.repo}: unexpected answer of the Hub while {about.doing} ({type(error).__name__}: {detail})"


def _of_status(status: int, error: Exception, about: About) -> str:
    repo, doing = about.repo, about.doing
    if status >= 500 or status == 429:
        return f"the Hub answered {status} {ATTEMPTS} times while {doing}; run the same command later"
    known = {
        401: "the Hub does not accept this login (401); run `hf auth login` again, or renew HF_TOKEN",
        402: f"the Hub requires payment while {doing} (402); see the billing page of {repo.split('/')[0]}",
        403: f"this login lacks permission for {repo} (403 while {doing}); use a token with write access",
        404: f"{repo} is not on the Hub, or this login may not see it (404 while {doing}); check name and login",
        409: f"{repo}: {doing} conflicts with existing content (409); check the repository, then run it again",
        412: f"{repo} was changed by someone else while {doing} (412); run the same command again",
        413: f"{repo}: the upload is too large for the Hub (413); export fewer targets at once",
    }
    if status in known:
        return known[status]
    detail = " ".join((getattr(error, "server_message", None) or str(error)).split())[:300]
    return f"{repo}: the Hub refused while {doing} ({status}: {detail})"


HEADER_LIMIT = 100_000_000  # bytes; what safetensors' own reader allows
LONGEST_PATH = 1024  # bytes of a name with its folders
SIDE_LIMIT = 64 * 2**20  # bytes of anything that is not weights


class Entry(NamedTuple):
    """A file in a listing: its name, size in bytes, and the digest that its bytes must have.

    `sha256` is known for large files; others have `blob`, git's id: SHA-1 over "blob <size>\\0" and the bytes.
    """

    name: str
    size: int
    blob: str
    sha256: str | None


class Listing(NamedTuple):
    """The files of one commit of a repository."""

    repo: str
    commit: str
    entries: dict[str, Entry]


def list_repository(api: HfApi, repo: str, revision: str | None, say: Say) -> Listing:
    """The files of `revision`. Raises `UserError` for a name that leaves its folder, and whatever the Hub refuses."""

    def request() -> Listing:
        """The commit first, then its files, so that both are of one moment."""
        commit = api.repo_info(repo, revision=revision).sha
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError("the commit has no id")
        found = [_entry(file) for file in api.list_repo_tree(repo, recursive=True, revision=commit) if _is_file(file)]
        return Listing(repo, commit, {entry.name: entry for entry in found})

    listing = ask(About(repo, "listing its files", revision), request, say)
    for name in listing.entries:
        check_name(name, repo)
    return listing


def _is_file(file: Any) -> bool:
    from huggingface_hub import RepoFile

    return isinstance(file, RepoFile)


def _entry(file: Any) -> Entry:
    sha256 = None if file.lfs is None else file.lfs.sha256
    if not (isinstance(file.path, str) and isinstance(file.size, int) and isinstance(file.blob_id, str)):
        raise ValueError("a file has no name, size or digest")
    return Entry(file.path, file.size, file.blob_id, sha256)


def check_name(name: str, repo: str) -> None:
    """Raise `UserError` unless `name` stays below the folder that it is written into, on every system."""
    if not all(map(is_plain_name, name.split("/"))) or len(name.encode()) > LONGEST_PATH:
        shown = repr(name if len(name) <= 80 else f"{name[:80]}…")
        raise UserError(
            f"{repo} lists a file named {shown}, which is outside its folder or invalid on some systems; "
            "nothing was taken from it"
        )


def download(api: HfApi, listing: Listing, names: Sequence[str], folder: Path, say: Say) -> None:
    """Bring `names` into `folder` under the same names, byte for byte what the listing says.

    Raises `UserError` for a file that is too large for its kind, arrives changed, or is no safetensors file.
    """
    from huggingface_hub import hf_hub_download

    for name in names:
        entry = listing.entries[name]
        if entry.size > SIDE_LIMIT and not name.endswith(".safetensors"):
            raise UserError(f"{listing.repo}: {name} has {entry.size / 1e6:.0f} MB, too many for a settings file")

        def request(name: str = name) -> str:
            """Where the client put the file."""
            return hf_hub_download(listing.repo, name, revision=listing.commit, endpoint=api.endpoint)

        source = Path(ask(About(listing.repo, f"downloading {name}"), request, say))
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        check_bytes(target, entry, listing.repo)
        if name.endswith(".safetensors"):
            check_safetensors(target, f"{listing.repo}: {name}")


def check_bytes(file: Path, entry: Entry, repo: str) -> None:
    """Raise `UserError` unless the file has the size and the digest of the listing."""
    digest = hashlib.sha256() if entry.sha256 else hashlib.sha1(b"blob %d\0" % entry.size, usedforsecurity=False)
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    if file.stat().st_size != entry.size or digest.hexdigest() != (entry.sha256 or entry.blob):
        raise UserError(f"{repo}: {entry.name} does not match its digest in the repository; pull it again")


def check_safetensors(file: Path, name: str) -> None:
    """Raise `UserError` unless the file is laid out as safetensors: 8 bytes of length, a JSON header, the arrays."""
    size = file.stat().st_size
    with file.open("rb") as content:
        first = content.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else HEADER_LIMIT + 1
        header = content.read(length) if length <= min(HEADER_LIMIT, size - 8) else b""
    try:
        arrays = {key: value for key, value in json.loads(header.decode("utf-8")).items() if key != "__metadata__"}
        inside = all(0 <= a["data_offsets"][0] <= a["data_offsets"][1] <= size - 8 - length for a in arrays.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        inside = False
    if not inside:
        raise UserError(f"{name} is not a safetensors file, the only format mlxdpo reads")
