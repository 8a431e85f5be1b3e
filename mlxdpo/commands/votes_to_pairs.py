"""Pairs that the app's votes decide, as a collection: the same files, the same counts, nothing drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdpo.io.atomic import write_json
from mlxdpo.io.json_file import read_lines
from mlxdpo.online.collect.write_outputs import report_file
from mlxdpo.online.votes_to_pairs import Pair, pairs_of, row_of, write_rows
from mlxdpo.types import Event, UserError
from mlxdpo_eval.judges.votes import read_ballots

WRITTEN = {"prompt", "a", "b", "winner"}  # what the app writes, and pairs are made of


def voted_pairs(votes: Path, out: Path, heldout: frozenset[bytes], source: Mapping[str, Any]) -> Iterator[Event]:
    """Write the pairs of a votes file to `out`; prompts in `heldout` teach nothing and are counted.

    `source` goes into every row. Raises `UserError` for a file that is missing, or without a vote that gives a pair.
    """
    if out.exists():
        raise UserError(f"{out} is there already; choose another --out, or remove it")
    known = read_ballots(votes)  # says what is wrong with a file that holds no vote at all
    lines = [line for line in read_lines(votes) if line.keys() >= WRITTEN]
    pairs, left_out = pairs_of(lines, heldout)
    if not pairs:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(f"{votes}: none of its {len(known.votes)} votes gives a pair ({why})")
    digest = hashlib.sha256(votes.read_bytes()).hexdigest()
    made = {**source, "judge": f"votes:{votes.name}", "judge_digest": digest[:16]}
    turns = any(not isinstance(pair.prompt, str) for pair in pairs)
    report = _report(pairs, len(lines), left_out | known.left_out, made)
    write_json(report_file(out), report)
    write_rows(out, [row_of(pair, turns) | {"made": made} for pair in pairs])
    yield Event("done", len(pairs), {"file": out, "report": report})


def _report(pairs: Sequence[Pair], votes: int, left_out: Mapping[str, int], made: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompts": len({str(pair.prompt) for pair in pairs}),
        "prompts_left_out": {},
        "prompts_without_pair": {},
        "answers": 2 * votes,
        "answers_left_out": {f"votes {reason}": count for reason, count in left_out.items()},
        "mean_score": None,
        "rows": len(pairs),
        "identity": {"judge": dict(made)},
    }
