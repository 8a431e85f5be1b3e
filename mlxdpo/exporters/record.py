"""What an export was and how it did: the value `export` returns, and `OUT/export.json`, which card and push read.

    {"run": name, "base_model": Hub id or folder name, "base_revision": ..., "relation": adapter|finetune|quantized,
     "data": what the gate measured on, "beta": ..., "versions": {...},
     "targets": {name: {"folder": "." or "mlx", "files": {name below the folder: bytes}, "relation": ..., "note": ...,
                        "kept": true,
                        "fidelity": {"pairs": n, "tokens": n, "token_kl": nats, "policy_reference_kl": nats,
                                     "slope": ..., "correlation": ..., "accuracy_run": ..., "accuracy_artefact": ...,
                                     "passed": true, "forced": false, "reason": null or a sentence}}}}

A target that failed the gate stays in the record with `kept` false and no files; numbers that cannot be computed (one
pair has no slope, a broken artefact no divergence) are null.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.io.atomic import write_json
from mlxdpo.io.json_file import as_written, read_json
from mlxdpo.io.names import is_plain_name
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
    """One written artefact: its folder below the export ("." is the export itself) and its files with their sizes."""

    folder: str
    files: dict[str, int]
    relation: str
    fidelity: Fidelity
    note: str | None = None
    kept: bool = True


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

    @property
    def passed(self) -> bool:
        """Whether every target was kept: it passed the gate, or was forced through."""
        return all(target.kept for target in self.targets.values())


def write_record(exported: Exported, folder: Path) -> None:
    """Write `export.json` into `folder`."""
    targets = {name: t._asdict() | {"fidelity": _finite(t.fidelity)} for name, t in exported.targets.items()}
    fields: dict[str, Any] = exported._asdict() | {"targets": targets}
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
        return Exported(**raw | {"out": out, "targets": targets})


def _target(*, folder: str, files: dict[str, int], fidelity: dict[str, Any], **others: Any) -> Target:
    """A target of the record. Raises `ValueError` for names that lead out of the export."""
    names = [*files, *(() if folder == "." else (folder,))]
    if not all(is_plain_name(part) for name in names for part in name.split("/")):
        raise ValueError("a name leads out of the export")
    return Target(folder, files, fidelity=Fidelity(**fidelity), **others)
