"""To the Hub: private unless asked, only listed files, only after the gate, and able to go on after a cut connection.

`push` commits to a branch, `propose` opens a pull request. Running either again transfers what is missing and nothing
else: the client asks the Hub for each file's digest first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mlxdpo.exporters.card import OFFER, between_marks
from mlxdpo.exporters.client import About, Say, ask, check_repo_id, connect, redact
from mlxdpo.exporters.record import CARD, LeftOut, Outgoing, belongs_to_an_export, outgoing
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Visibility = Literal["private", "public"]
MESSAGE = "Upload with mlxdpo"


class Pushed(NamedTuple):
    """What is on the Hub now. `pull_request` is its address, where one was opened; `revision` the branch or its ref."""

    url: str
    commit: str
    revision: str
    tag: str | None
    pull_request: str | None
    files: tuple[Outgoing, ...]


class _Session(NamedTuple):
    """A client with the repository it works on."""

    api: HfApi
    repo: str
    say: Say

    def ask(self, doing: str, call: Callable[[], Any], revision: str | None = None) -> Any:
        """See `client.ask`."""
        return ask(About(self.repo, doing, revision), call, self.say)


def dry_run(out: Path) -> tuple[list[Outgoing], list[LeftOut]]:
    """What `push` would transfer, and what it would leave, without asking the Hub. Raises `UserError` like `push`."""
    return outgoing(out)


def push(
    out: Path,
    repo_id: str,
    *,
    visibility: Visibility = "private",
    revision: str | None = None,
    tag: str | None = None,
    say: Say = lambda text: None,
) -> Pushed:
    """Upload the export in `out` to a branch of `repo_id`, made if need be, and tag the commit.

    `revision` may also be the ref of a pull request (refs/pr/3), to go on with one. Raises `UserError` before anything
    is sent when the gate was not passed, the repository's visibility is not `visibility`, or it holds files that the
    export would mix with; and for whatever the Hub refuses.
    """
    files, left = outgoing(out)
    session = _log_in(repo_id, say)
    _announce(files, left, say)
    url = session.ask(
        "creating the repository",
        lambda: str(session.api.create_repo(repo_id, private=visibility == "private", exist_ok=True)),
    )
    _check_visibility(session, visibility)
    branch = revision or "main"
    if branch != "main" and not branch.startswith("refs/"):
        session.ask("making the branch", lambda: session.api.create_branch(repo_id, branch=branch, exist_ok=True))
    _check_what_is_there(session, out, files, branch)
    commit = _upload(session, out, files, branch)
    if tag is not None:
        _tag(session, tag, commit)
    return Pushed(redact(url), redact(commit), branch, tag, None, tuple(files))


def propose(out: Path, repo_id: str, *, visibility: Visibility = "private", say: Say = lambda text: None) -> Pushed:
    """Upload the export in `out` as a pull request to an existing repository. Raises `UserError` like `push`."""
    files, left = outgoing(out)
    session = _log_in(repo_id, say)
    _announce(files, left, say)
    _check_visibility(session, visibility)
    _check_what_is_there(session, out, files, "main")
    opened = session.ask(
        "opening a pull request", lambda: session.api.create_pull_request(repo_id, title=MESSAGE, description=MESSAGE)
    )
    ref = f"refs/pr/{opened.num}"
    say(f"pull request {opened.num}: if the connection is lost, continue with --revision {ref}")
    commit = _upload(session, out, files, ref)
    session.ask(
        "opening the draft", lambda: session.api.change_discussion_status(repo_id, opened.num, new_status="open")
    )
    url = f"{session.api.endpoint}/{repo_id}"
    return Pushed(url, redact(commit), ref, None, redact(opened.url), tuple(files))


def _log_in(repo_id: str, say: Say) -> _Session:
    """A client that is logged in. Raises `UserError` for a wrong id, an unsafe endpoint or no login."""
    check_repo_id(repo_id)
    session = _Session(connect(), repo_id, say)
    name = session.ask("asking who is logged in", lambda: _of_kind(session.api.whoami()["name"], str))
    say(f"logged in to {session.api.endpoint} as {redact(name)}")
    return session


def _announce(files: Sequence[Outgoing], left: Sequence[LeftOut], say: Say) -> None:
    say(f"{len(files)} files, {sum(file.size for file in files) / 1e6:,.1f} MB")
    for name, reason in left:
        say(f"left out: {name} ({reason})")


def _check_visibility(session: _Session, wanted: Visibility) -> None:
    """A repository that exists already keeps its visibility, so one that differs from what was asked is refused."""
    private = session.ask(
        "looking at the repository", lambda: _of_kind(session.api.repo_info(session.repo).private, bool)
    )
    if private and wanted == "public":
        raise UserError(
            f"{session.repo} exists and is private; drop --public, or make it public in its settings on the Hub first"
        )
    if not private and wanted == "private":
        raise UserError(f"{session.repo} exists and is public; add --public to publish there, or take another name")


def _of_kind(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _check_what_is_there(session: _Session, out: Path, files: Sequence[Outgoing], revision: str) -> None:
    """Refuse to spoil what the repository holds already: weights of another export, words of the user's own."""
    there = session.ask(
        "listing its files", lambda: session.api.list_repo_files(session.repo, revision=revision), revision
    )
    _check_mixing(session, files, there)
    if CARD in there:
        _check_users_words(session, out, revision)


def _check_users_words(session: _Session, out: Path, revision: str) -> None:
    """Refuse to replace what the user wrote into the card on the Hub by an untouched card."""
    from huggingface_hub import hf_hub_download

    def request() -> str:
        """The card that is there."""
        file = hf_hub_download(session.repo, CARD, revision=revision, endpoint=session.api.endpoint)
        return Path(file).read_text("utf-8", "replace")

    theirs = between_marks(session.ask("reading its card", request, revision))
    if theirs not in (None, OFFER) and between_marks((out / CARD).read_text("utf-8")) in (None, OFFER):
        raise UserError(
            f"the card of {session.repo} has words of yours between its marks that {out / CARD} has not; "
            "copy them there first, and push again"
        )


def _check_mixing(session: _Session, files: Sequence[Outgoing], there: Sequence[str]) -> None:
    """Refuse to lay an export beside another one's weights or adapter: a loader would take some of each."""
    stale = sorted(set(there) - {file.name for file in files})
    if mixed := [name for name in stale if belongs_to_an_export(name)]:
        raise UserError(
            f"{session.repo} holds {mixed[0]}{f' and {len(mixed) - 1} more' if mixed[1:] else ''}, which this export "
            "does not have and a loader would mix with it; delete it there, or take another repository or --revision"
        )


def _upload(session: _Session, out: Path, files: Sequence[Outgoing], revision: str) -> str:
    """Commit the files to `revision`; the commit's id. What the Hub has already is not sent again."""

    def attempt() -> str:
        """One commit on top of what is there now."""
        head = session.api.repo_info(session.repo, revision=revision).sha
        with tempfile.TemporaryDirectory() as staging:
            stage(out, files, Path(staging))
            info = session.api.upload_folder(
                repo_id=session.repo,
                folder_path=staging,
                commit_message=MESSAGE,
                revision=revision,
                parent_commit=_of_kind(head, str),
            )
        return _of_kind(info.oid, str)

    return session.ask("uploading", attempt, revision)


def stage(out: Path, files: Sequence[Outgoing], folder: Path) -> None:
    """Links to exactly the files that go, so that nothing else can be picked up."""
    for file in files:
        link = folder / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((out / file.name).resolve())


def _tag(session: _Session, tag: str, commit: str) -> None:
    """Tag the commit. The same tag on the same commit is what an earlier, cut run left behind."""
    refs = session.ask("reading its tags", lambda: session.api.list_repo_refs(session.repo).tags)
    for ref in refs:
        if ref.name == tag:
            if ref.target_commit == commit:
                return
            raise UserError(f"{session.repo} already has a tag {tag} on another commit; choose another --tag")
    session.ask("tagging the commit", lambda: session.api.create_tag(session.repo, tag=tag, revision=commit))
