"""Rows of a collection: two answers with their scores, or all of them ranked, and what they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mlxdpo.config import Drawing
from mlxdpo.online.collect.rules import RULES, why_none

Row = dict[str, Any]


def made_of(identity: Mapping[str, Any]) -> Row:
    """What stands in every row: whose answers, ranked by whom, drawn how."""
    judge, source = identity["judge"], identity["source"]
    digest = hashlib.sha256(json.dumps(judge, sort_keys=True).encode()).hexdigest()[:16]
    drawing = {name: identity["drawing"][name] for name in ("seed", "samples", "max_tokens", "temperature", "top_p")}
    model = {**source, "model": source["model"]["digest"]}
    return {**model, "judge": judge["name"], "judge_digest": digest, **drawing}


def pair_rows(line: Mapping[str, Any], how: Drawing) -> tuple[list[Row], str]:
    """The rows that a prompt's answers give, or the reason for none."""
    usable = [answer for answer in line["answers"] if not answer["left_out"]]
    scores = [answer["score"] for answer in usable]
    pairs = RULES[how.pairs](scores, how.margin) if len(scores) > 1 else []
    if not pairs:
        return [], why_none(scores, how.margin)
    shared = {name: line[name] for name in ("prompt", "tools") if name in line}
    if how.pairs == "ranked":
        return [{**shared, "completions": [answer["text"] for answer in usable], "scores": scores}], ""
    return [shared | _pair_row(usable[better], usable[worse]) for better, worse in pairs], ""


def _pair_row(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> Row:
    sides = {"chosen": chosen, "rejected": rejected}
    row: Row = {name: side["text"] for name, side in sides.items()}
    for part in ("score", "finish", "tokens"):
        row |= {f"{part}_{name}": side[part] for name, side in sides.items()}
    return row | {"gap": chosen["score"] - rejected["score"]}


def written(row: Mapping[str, Any], turns: bool) -> Row:
    """The row as it is written: where one prompt of the file is a conversation, all are."""
    if not turns or not isinstance(row["prompt"], str):
        return dict(row)
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}]}
