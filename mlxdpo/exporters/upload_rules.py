"""What of an export folder may leave for the Hub: only files that are on a list, of targets that passed the gate.

The folder is laid out like the repository. Everything else in it (votes, samples, metrics, an optimizer's state, a
stray `.env`) stays, and is named with the reason.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from mlxdpo.exporters.client import TOKEN
from mlxdpo.exporters.record import RECORD, Exported, read_record
from mlxdpo.types import UserError

CARD, CURVE, RUN = "README.md", "training.png", "run"
ADAPTER = r"adapters\.safetensors|adapter_model\.safetensors|adapter_config\.json"
MODEL = r"model[\w.-]*\.safetensors(\.index\.json)?|[\w.-]+\.gguf|config\.json|generation_config\.json"
TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|"
    r"tokenizer\.model|vocab\.txt|merges\.txt|chat_template\.jinja|[\w.-]+\.tiktoken"
)
LICENCE = r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.txt|\.md)?"
OF_TARGETS = re.compile(f"({ADAPTER}|{MODEL}|{TOKENIZER}|{LICENCE})")
OF_THE_EXPORT = re.compile(re.escape(f"{CARD}|{CURVE}|{RECORD}").replace(r"\|", "|"))
OF_THE_RUN = re.compile(rf"{RUN}/(config\.yaml|manifest\.json|head\.safetensors|(adapter|start|reference)/({ADAPTER}))")
BINARY = (".safetensors", ".gguf", ".png", ".model")


class Outgoing(NamedTuple):
    """A file that goes to the Hub: its name there (and below the export folder), and its size in bytes."""

    name: str
    size: int


class LeftOut(NamedTuple):
    """A file below the export folder that stays, and why."""

    name: str
    reason: str


def outgoing(out: Path) -> tuple[list[Outgoing], list[LeftOut]]:
    """The files of the export in `out` that go to the Hub, and those that stay; both sorted by name.

    Raises `UserError` when a target did not pass the gate, a file of the record is missing, or a text holds a token.
    """
    record = read_record(out)
    check_gate(record)
    named = {f"{'' if t.folder == '.' else t.folder + '/'}{file}" for t in record.targets.values() for file in t.files}
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file() or p.is_symlink())
    for name in sorted(named.difference(files)):
        raise UserError(f"{out}: {RECORD} names {name}, which is not there; export again")
    if CARD not in files:
        raise UserError(f"{out}: no {CARD} there; a model without a card is not pushed, export again")
    reasons = {name: _why_not(out, name, named) for name in files}
    going = [Outgoing(name, (out / name).stat().st_size) for name, reason in reasons.items() if reason is None]
    for file in going:
        _check_for_secrets(out, file.name)
    return going, [LeftOut(name, reason) for name, reason in reasons.items() if reason is not None]


def check_gate(record: Exported) -> None:
    """Raise `UserError` unless every target passed its fidelity gate; being kept by force is not passing."""
    if not record.targets:
        raise UserError(f"{record.out}: the export holds no target; export again with --to")
    for name, target in record.targets.items():
        if target.fidelity.passed is not True:
            reason = target.fidelity.reason or "no reason was recorded"
            raise UserError(
                f"{record.out}: {name} did not pass the fidelity gate ({reason.rstrip('.')}), so nothing is pushed; "
                f"export again without {name}"
            )


def _why_not(out: Path, name: str, named: set[str]) -> str | None:
    """The reason why a file stays, or None when it goes."""
    folder, _, base = name.rpartition("/")
    if (out / name).is_symlink() or any((out / part).is_symlink() for part in Path(name).parents):
        return "a link, which may lead anywhere"
    if OF_THE_EXPORT.fullmatch(name) or OF_THE_RUN.fullmatch(name):
        return None
    if name not in named:
        return f"not part of the export by its {RECORD}"
    return None if OF_TARGETS.fullmatch(base) and ".." not in folder else "not a kind of file that is published"


def _check_for_secrets(out: Path, name: str) -> None:
    if name.endswith(BINARY):
        return
    if TOKEN.search((out / name).read_text("utf-8", "replace")):
        raise UserError(f"{out / name} holds what looks like a Hub token (hf_...); take it out, and revoke the token")


def belongs_to_an_export(name: str) -> bool:
    """Whether a file of a repository is one that loaders read: beside another export's files they would mix."""
    return bool(OF_TARGETS.fullmatch(name.rpartition("/")[2]) or OF_THE_RUN.fullmatch(name)) and not re.fullmatch(
        LICENCE, name
    )
