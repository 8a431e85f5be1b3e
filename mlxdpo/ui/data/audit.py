"""The findings of `mlxdpo data audit` row by row, each dropped, flipped or kept with one click.

What was decided is in FILE.decisions.json beside the data, at once; the rows go to a new file, NAME.audited.jsonl, when
asked for. The data file itself is never written. No postponed annotations: Gradio reads `gr.Request` off them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any

from mlxdpo.data.findings import FLAGS
from mlxdpo.io.atomic import write_atomic, write_json
from mlxdpo.io.json_file import as_written, read_json, read_lines
from mlxdpo.types import UserError
from mlxdpo.ui.data.view import as_text, number_of, numbered_lines, short, stem_of
from mlxdpo.ui.jobs import spawn
from mlxdpo.ui.widgets import Act, alert, html_table

Finding = Mapping[str, Any]
ANY, EVERY = "any finding", "every row"
ACTS = {"drop": "Drop", "flip": "Flip", "keep": "Keep"}
MOST = 100  # rows shown at once
NO_FINDINGS = "<p>Not audited yet. Choose the model that will be trained and press Audit; it reads every row once.</p>"


def files_of(path: Path) -> tuple[Path, Path, Path]:
    """What a file's page depends on: the file, its findings, and what was decided."""
    return path, path.with_suffix(".audit.jsonl"), _decisions_file(path)


def findings_of(path: Path) -> dict[int, list[Finding]]:
    """The findings on a data file by the rows' numbers, the least probable label first; empty where there are none.

    Raises `UserError` for a damaged file of findings, and for one that is older than the data.
    """
    file = path.with_suffix(".audit.jsonl")
    if not isfile(file):
        return {}
    if file.stat().st_mtime < path.stat().st_mtime:
        raise UserError(f"{path.name} was changed after its audit; press Audit again")
    found: dict[int, list[Finding]] = {}
    with as_written(file, "audit the data again"):
        for one in sorted(read_lines(file), key=lambda one: one["probability"]):
            found.setdefault(number_of(one["where"]), []).append(one)
    return found


def shown_rows(found: Mapping[int, Sequence[Finding]], wanted: str) -> list[int]:
    """The numbers of the rows with a flag, with any, or all."""
    flags = {number: {flag for one in ones for flag in one["flags"]} for number, ones in found.items()}
    return [number for number, its in flags.items() if wanted == EVERY or (its if wanted == ANY else wanted in its)]


def decisions_of(path: Path) -> dict[int, str]:
    """What was decided of each row so far."""
    file = _decisions_file(path)
    if not isfile(file):
        return {}
    with as_written(file, "remove it to decide again"):
        return {int(number): str(act) for number, act in read_json(file)["rows"].items() if act in ACTS}


def _decisions_file(path: Path) -> Path:
    return path.with_suffix(".decisions.json")


def decide(path: Path, numbers: Sequence[int], act: str) -> None:
    """Keep a decision on rows; the one that a row has already is taken back. Raises `UserError` for other words."""
    found = findings_of(path)
    if act not in ACTS or not set(numbers) <= found.keys():
        raise UserError("no such row or decision; reload the page")
    if act == "flip" and (several := next((n for n in numbers if len(found[n]) > 1), None)):
        raise UserError(f"row {several} holds {len(found[several])} pairs; flip them in a terminal: mlxdpo data audit")
    record_decisions(path, numbers, act)


def record_decisions(path: Path, numbers: Sequence[int], act: str) -> None:
    """Write a decision on rows that are known to exist; the one that all of them have already is taken back."""
    now = decisions_of(path)
    taken_back = all(now.get(number) == act for number in numbers)
    for number in numbers:
        now.pop(number, None)
        if not taken_back:
            now[number] = act
    write_json(_decisions_file(path), {"rows": {str(number): word for number, word in sorted(now.items())}})


def write_audited(path: Path) -> tuple[Path, int, int]:
    """Write the rows without those dropped, with those flipped exchanged, to a new file: (file, dropped, flipped).

    Every other line is copied as it is. Raises `UserError` where nothing was decided, or nothing is left.
    """
    findings_of(path)  # of this very file
    now = decisions_of(path)
    dropped = sum(act == "drop" for act in now.values())
    flipped = sum(act == "flip" for act in now.values())
    if not dropped + flipped:
        raise UserError("no row is marked Drop or Flip, so the file would be the same; decide on some first")
    names = (f"{stem_of(path)}.audited{f'-{n}' if n > 1 else ''}.jsonl" for n in range(1, 10_000))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())

    def write(draft: Path) -> None:
        """The rows that are left."""
        left = 0
        with draft.open("wb") as out:
            for number, line in numbered_lines(path):
                if now.get(number) == "drop":
                    continue
                text = line.rstrip(b"\r\n")
                left += bool(text.strip())
                out.write((_exchanged(path, number, text) if now.get(number) == "flip" else text) + b"\n")
        if not left:
            raise UserError("every row is marked Drop, so nothing would be left; keep some")

    write_atomic(target, write)
    return target, dropped, flipped


def _exchanged(path: Path, number: int, line: bytes) -> bytes:
    """A row with its answers exchanged, and every other column that comes in two of them (`score_chosen`)."""
    row = json.loads(line)
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise UserError(
            f"{path.name}:{number} has no columns chosen and rejected to exchange; use a terminal: mlxdpo data audit "
            f"{path} --flip --out FILE --model MODEL"
        )
    other = {name: name.replace("chosen", "rejected") for name in row if "chosen" in name}
    pairs = {name: twin for name, twin in other.items() if twin in row}
    pairs |= {twin: name for name, twin in pairs.items()}
    return json.dumps({name: row[pairs.get(name, name)] for name in row}, ensure_ascii=False).encode()


def audit_html(path: Path, rows: Mapping[int, Mapping[str, Any]], wanted: str) -> str:
    """The rows with findings, what was found, and the buttons; `rows` are those of the file that are in memory."""
    found, now = findings_of(path), decisions_of(path)
    if not found:
        return NO_FINDINGS
    numbers = shown_rows(found, wanted)
    if not numbers:
        return f"<p>No row has this finding; {len(found):,} rows were audited.</p>"
    cells = [_audit_cells(number, found[number], rows.get(number, {})) for number in numbers[:MOST]]
    more = f", the first {MOST}" if len(numbers) > MOST else ""
    counts = ", ".join(f"{list(now.values()).count(act)} to {act}" for act in ACTS)
    caption = f"{len(numbers):,} of {len(found):,} rows{more}; decided: {counts}"

    def acts(row: str) -> list[Act]:
        """The buttons of a row."""
        return [(act, word, now.get(int(row)) == act) for act, word in ACTS.items()]

    return html_table(caption, AUDITED, cells, acts=acts)


AUDITED = ("row", "finding", "label is right", "prompt", "chosen", "rejected", "decide")


def _audit_cells(number: int, found: Sequence[Finding], row: Mapping[str, Any]) -> list[str]:
    flags = dict.fromkeys(flag for one in found for flag in one["flags"])
    words = "; ".join(f"{FLAGS.get(flag, flag)} ({flag})" for flag in flags)
    like = [one["similar_to"] for one in found if "near-duplicate" in one["flags"] and one["similar_to"]]
    against = [one["contradicted_by"] for one in found if one["contradicted_by"]]
    words += "".join(f"; like {where}" for where in like) + "".join(f"; against {where}" for where in against)
    right = f"{100 * min(one['probability'] for one in found):.0f} %"
    texts = (short(as_text(row[name])) if name in row else "" for name in ("prompt", "chosen", "rejected"))
    return [str(number), words or "none", right, *texts]


def audit_folder(runs: Path, path: Path) -> Path:
    """Where the process of a file's audit is kept."""
    return runs / ".jobs" / f"audit-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"


def start_audit(runs: Path, path: Path, model: str) -> None:
    """Begin `mlxdpo data audit`. Raises `UserError` where one is at work on this file."""
    command = ["mlxdpo", "data", "audit", str(path), f"--model={model}"]
    spawn(audit_folder(runs, path), command, f"{path.name} is being audited already; wait for it to end")


def audit_view(path: Path, rows: Mapping[int, Mapping[str, Any]], wanted: str) -> str:
    """`audit_html`, or the alert that says what is wrong."""
    try:
        return audit_html(path, rows, wanted)
    except UserError as error:
        return alert(error)
