"""Rows that are too long: what is cut, what is dropped, and that it is counted."""

from __future__ import annotations

import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.report import BadRow, Report
from mlxdpo.types import UserError


def fit(
    where: str,
    prompt: np.ndarray,
    completions: list[np.ndarray],
    bos: frozenset[int],
    data: DataConfig,
    report: Report,
) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """Cut a row to `data.max_length` tokens, or None when it is dropped; the completions share their prompt.

    The prompt loses its beginning but keeps a BOS (an id in `bos`); the completions stay whole. Only one that
    leaves no room for a single prompt token is cut itself; the prompt then keeps up to half of the limit.
    """
    limit, longest = data.max_length, max(map(len, completions))
    if longest + 1 > limit:
        what = f"a completion of {longest} tokens does not fit data.max_length {limit}"
        if not _may(data.on_long_completion, "truncate", where, "completion too long", what, report):
            return None
        longest = limit - min(len(prompt), limit // 2)
        report.change(where, "completion truncated")
        completions = [completion[:longest] for completion in completions]
    room = limit - longest
    if len(prompt) > room:
        what = (
            f"a prompt of {len(prompt)} tokens and a completion of {longest} exceed data.max_length {limit}"
        )
        if not _may(data.on_long_prompt, "trim", where, "prompt too long", what, report):
            return None
        report.change(where, "prompt trimmed")
        head = prompt[:1] if int(prompt[0]) in bos else prompt[:0]
        prompt = np.concatenate([head, prompt[len(prompt) - room + len(head) :]])
    return prompt, completions


def _may(policy: str, cut: str, where: str, reason: str, what: str, report: Report) -> bool:
    """Whether the policy is to cut. Counts the row when it is to drop; `UserError` when it is to stop."""
    if policy == "stop":
        knob = "on_long_prompt" if cut == "trim" else "on_long_completion"
        raise UserError(f"{where}: {what}; raise data.max_length, or set data.{knob} to {cut} or drop")
    if policy == "drop":
        report.refuse(where, BadRow(reason, what), "skip")
    return policy == cut
