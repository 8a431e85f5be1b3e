"""What an export was and how it did: the value `export` returns, and `OUT/export.json`; and what of it may be pushed.

    {"run": name, "base_model": Hub id or folder name, "base_revision": ..., "relation": adapter|finetune|quantized,
     "data": what the gate measured on, "beta": ..., "versions": {...},
     "strength": 1.0, "made_of": null or what the run was made of,
     "targets": {name: {"folder": "." or "mlx", "files": {name below the folder: bytes}, "relation": ..., "note": ...,
                        "kept": true, "asked": null, or {"client": ..., "prompts": n, "equal": n, "worst_logp": nats,
                                                        "unlike": n},
                        "fidelity": {"pairs": n, "tokens": n, "token_kl": nats, "policy_reference_kl": nats,
                                     "slope": ..., "correlation": ..., "accuracy_run": ..., "accuracy_artefact": ...,
                                     "passed": true, "forced": false, "reason": null or a sentence}}}}

A target that failed the gate stays in the record with `kept` false and no files; numbers that cannot be computed (one
pair has no slope, a broken artefact no divergence) are null.

Only files that are on a list, of targets that passed the gate, leave for the Hub. The folder is laid out like the
repository. Everything else in it (votes, samples, metrics, a stray `.env`) stays, and is named with the reason.
`pack_run` writes RUN below the export folder, what `mlxdpo pull` makes a run directory of again, without this machine's
folders:

    run/config.yaml  run/manifest.json  run/adapter/
    run/heldout.jsonl             the held-out pairs, where their owner said to publish them
    run/start/  run/reference/    the adapters that training began from, and that its reference has, if any
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mlxdpo.config import Config, dump_config, load_config
from mlxdpo.forward.reward_head import FILE as HEAD
from mlxdpo.io.atomic import write_atomic, write_json, write_text
from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.io.names import TOKEN, is_hub_id, is_plain_name, without_tokens
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, read_settings
from mlxdpo.model.chat_template import NAMED_FOLDER
from mlxdpo.runs import Run
from mlxdpo.types import UserError

RECORD = "export.json"


class Fidelity(NamedTuple):
    """How an artefact, reloaded, differs from the run on held-out pairs.

    `token_kl` is KL(run's policy || artefact) and `policy_reference_kl` KL(run's policy || its reference), both means
    over the completions' tokens, nats. `slope` and `correlation` are those of the artefact's DPO margins over the
    run's. `passed` is the gate's verdict and `reason` says in a sentence why not; `forced` keeps it all the same.
    """

    pairs: int
    tokens: int
    token_kl: float
    policy_reference_kl: float
    slope: float | None
    correlation: float | None
    accuracy_run: float
    accuracy_artefact: float
    passed: bool
    reason: str | None = None
    forced: bool = False


class Target(NamedTuple):
    """One written artefact: its folder below the export ("." is the export itself) and its files with their sizes.

    `asked` is how its client answered (`exporters.ask.ClientReport`), None where it was not asked.
    """

    folder: str
    files: dict[str, int]
    relation: str
    fidelity: Fidelity
    note: str | None = None
    kept: bool = True
    asked: Mapping[str, Any] | None = None


class Exported(NamedTuple):
    """A finished export."""

    out: Path
    run: str
    base_model: str
    base_revision: str | None
    relation: str
    data: str
    beta: float
    versions: dict[str, str]
    targets: dict[str, Target]
    made_of: Mapping[str, Any] | None = None
    """Of a run that was not trained but made of others (`inference.mixtures`): strength or merge, and of which."""

    @property
    def strength(self) -> float:
        """The strength at which the run was exported; 1 is as trained."""
        return (self.made_of or {}).get("strength", 1.0)

    @property
    def passed(self) -> bool:
        """Whether every target was kept: it passed the gate, or was forced through."""
        return all(target.kept for target in self.targets.values())


def write_record(exported: Exported, folder: Path) -> None:
    """Write `export.json` into `folder`."""
    targets = {name: t._asdict() | {"fidelity": _finite(t.fidelity)} for name, t in exported.targets.items()}
    fields: dict[str, Any] = exported._asdict() | {"targets": targets, "strength": exported.strength}
    del fields["out"]  # where it stands today is nobody's business
    write_json(folder / RECORD, fields)


def _finite(fidelity: Fidelity) -> dict[str, Any]:
    """The figures with null for what is no number: a broken artefact may compute none."""
    fields = fidelity._asdict()
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def read_record(out: Path) -> Exported:
    """The record of an earlier export. Raises `UserError` when `out` holds none."""
    file = out / RECORD
    if not file.exists():
        raise UserError(f"{out}: no {RECORD} there; expected a folder that `mlxdpo export` wrote")
    raw = read_json(file)
    with as_written(file, "export again"):
        targets = {name: _target(**target) for name, target in raw["targets"].items()}
        kept = {name: value for name, value in raw.items() if name != "strength"}
        return Exported(**kept | {"out": out, "targets": targets})


def _target(*, folder: str, files: dict[str, int], fidelity: dict[str, Any], **others: Any) -> Target:
    """A target of the record. Raises `ValueError` for names that lead out of the export."""
    names = [*files, *(() if folder == "." else (folder,))]
    if not all(is_plain_name(part) for name in names for part in name.split("/")):
        raise ValueError("a name points outside the export")
    return Target(folder, files, fidelity=Fidelity(**fidelity), **others)


CARD, CURVE, RUN, HELDOUT = "README.md", "training.png", "run", "heldout.jsonl"
ADAPTER = r"adapters\.safetensors|adapter_model\.safetensors|adapter_config\.json"
MODEL = (
    r"model[\w.-]*\.safetensors(\.index\.json)?|[\w.-]+\.gguf|Modelfile|[\w.-]+\.preset\.json|"
    r"config\.json|generation_config\.json"
)
TOKENIZER = (
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|"
    r"tokenizer\.model|vocab\.txt|merges\.txt|chat_template\.jinja|[\w.-]+\.tiktoken"
)
LICENCE = r"(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.txt|\.md)?"
NAMED_TEMPLATE = rf"(.*/)?{NAMED_FOLDER}/[\w-]+\.jinja"
OF_TARGETS = re.compile(f"({ADAPTER}|{MODEL}|{TOKENIZER}|{LICENCE})")
OF_THE_EXPORT = re.compile(re.escape(f"{CARD}|{CURVE}|{RECORD}").replace(r"\|", "|"))
OF_THE_RUN = re.compile(
    rf"{RUN}/(config\.yaml|manifest\.json|heldout\.jsonl|head\.safetensors|(adapter|start|reference)/({ADAPTER}))"
)
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
        raise UserError(f"{out}: {RECORD} names {name}, which does not exist; export again")
    if CARD not in files:
        raise UserError(f"{out}: no {CARD} there; a model without a card cannot be pushed; export again")
    reasons = {name: _why_not(out, name, named) for name in files}
    going = [Outgoing(name, (out / name).stat().st_size) for name, reason in reasons.items() if reason is None]
    for file in going:
        _check_for_secrets(out, file.name)
    return going, [LeftOut(name, reason) for name, reason in reasons.items() if reason is not None]


def check_gate(record: Exported) -> None:
    """Raise `UserError` unless every target passed its fidelity gate; being kept by force is not passing."""
    if not record.targets:
        raise UserError(f"{record.out}: the export has no target; export again with --to")
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
        return "a symbolic link"
    if OF_THE_EXPORT.fullmatch(name) or OF_THE_RUN.fullmatch(name):
        return None
    if name not in named:
        return f"not part of the export by its {RECORD}"
    known = OF_TARGETS.fullmatch(base) or re.fullmatch(NAMED_TEMPLATE, name)
    return None if known and ".." not in folder else "not a kind of file that is published"


def _check_for_secrets(out: Path, name: str) -> None:
    if name.endswith(BINARY):
        return
    if found := TOKEN.search((out / name).read_text("utf-8", "replace")):
        raise UserError(f"{out / name} contains what looks like a token ({found[0][:3]}...); remove and revoke it")


def belongs_to_an_export(name: str) -> bool:
    """Whether a file of a repository is one that loaders read: beside another export's files they would mix."""
    of_target = OF_TARGETS.fullmatch(name.rpartition("/")[2]) or re.fullmatch(NAMED_TEMPLATE, name)
    return bool(of_target or OF_THE_RUN.fullmatch(name)) and not re.fullmatch(LICENCE, name)


# A path inside a sentence: from a root, a home or a drive to the next blank or closing mark.
PATHS = re.compile(r"(?<![\w.:/~-])(?:~?/|[A-Za-z]:[\\/])[^\s\"'`,;()]*[\\/]")
START, REFERENCE = "start", "reference"


def public_name(name: str) -> str:
    """A source as others may see it: a Hub id or an address as it stands, a file or folder by its last name."""
    return name if is_hub_id(name) or "://" in name else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def card_metadata(card: Path) -> Mapping[str, Any]:
    """The metadata at the head of a model card; a missing card, or a head that is no YAML mapping, holds nothing."""
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    head = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---", text, re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date with a month 13, say
        return {}
    return found if isinstance(found, Mapping) else {}


def without_paths(value: Any) -> Any:
    """JSON values in which paths from the root, a home or a drive are cut down to their last name, and logins out."""
    if isinstance(value, Mapping):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    return without_tokens(PATHS.sub("", value)) if isinstance(value, str) else value


def public_config(config: Config) -> Config:
    """The recipe with names instead of places; adapters it begins from are named by their folder in the package."""
    model = {"path": public_name(config.model.path), "adapter": START if config.model.adapter else None}
    data = {"path": public_name(config.data.path)}
    if config.data.eval is not None:
        data["eval"] = public_name(config.data.eval)
    reference: dict[str, Any] = {"adapter": REFERENCE if config.reference.adapter else None}
    if config.reference.model is not None:
        reference["model"] = public_name(config.reference.model)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update=data),
            "reference": config.reference.model_copy(update=reference),
            "out": None,
        }
    )


def public_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with names instead of places; its digests stay, they are the proof."""
    source, data = manifest["reference_source"], manifest["data"]
    named = {
        "model": manifest["model"] | {"source": public_name(manifest["model"]["source"])},
        "reference_source": {name: value and public_name(value) for name, value in source.items()},
        "data": data | {"source": public_name(data["source"])},
    }
    return without_paths({**manifest, **named})


def pack_run(run: Run, out: Path) -> Path:
    """Write what makes a run directory out of a pulled repository into `out`/run, and return that folder."""
    config, folder = run.config(), out / RUN
    adapters = {"adapter": run.adapter, START: config.model.adapter, REFERENCE: config.reference.adapter}
    for name, source in adapters.items():
        if source is None:
            continue
        read_settings(Path(source))
        for file in (WEIGHTS, SETTINGS):
            write_atomic(folder / name / file, lambda copy, origin=Path(source) / file: _copy(origin, copy))
    if (run.path / HEAD).exists():  # a reward model's
        write_atomic(folder / HEAD, lambda copy: _copy(run.path / HEAD, copy))
    write_text(folder / "config.yaml", dump_config(public_config(config)))
    write_json(folder / "manifest.json", public_manifest(run.manifest()))
    return folder


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def command(config: Config) -> str:
    """The `mlxdpo train` command line that gives this recipe: every setting that is not its stage's default."""
    stage = [] if config.stage == Config().stage else ["--stage", config.stage]
    defaults = load_config(None, {"stage": config.stage})
    return shlex.join(
        ["mlxdpo", "train", *stage, *_options(public_config(config).model_dump(), defaults.model_dump(), "")]
    )


def _options(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        key, default = f"{prefix}{name}", defaults.get(name)
        if value == default:
            continue
        if isinstance(value, Mapping):
            yield from _options(value, default or {}, f"{key}.")
        elif isinstance(value, bool):
            yield f"--{key}" if value else f"--no-{key}"
        elif isinstance(value, list):
            yield from (word for item in value for word in (f"--{key}", str(item)))
        elif isinstance(value, tuple):
            yield from (f"--{key}", *map(str, value))
        else:
            yield from (f"--{key}", str(value))
