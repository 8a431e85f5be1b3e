"""Rows that are too long: what is cut, what is dropped, and that it is counted."""

from __future__ import annotations

from typing import Literal

import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.report import BadRow
from mlxdpo.types import UserError


class DroppedRow(BadRow):
    """A row left out because the settings say so; nothing is wrong with it, so it never stops a run."""


def fit(
    where: str,
    prompt: np.ndarray,
    completions: list[np.ndarray],
    bos: frozenset[int],
    data: DataConfig,
    changes: list[str],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Cut a row to `data.max_length` tokens, one prompt for all completions; `changes` gets what was done.

    The prompt loses its beginning but keeps a BOS (an id in `bos`); the completions stay whole. Only one that
    leaves no room for a single prompt token is cut itself; the prompt then keeps up to half of the limit.
    Raises `DroppedRow` or `UserError` where the settings say drop or stop.
    """
    limit, longest = data.max_length, max(map(len, completions))
    if longest + 1 > limit:
        what = f"a completion of {longest} tokens does not fit data.max_length {limit}"
        _allow(data.on_long_completion, "completion", where, what)
        longest = limit - min(len(prompt), limit // 2)
        changes.append("completion truncated")
        completions = [completion[:longest] for completion in completions]
    room = limit - longest
    if len(prompt) > room:
        what = f"a prompt of {len(prompt)} tokens and a completion of {longest} exceed data.max_length {limit}"
        _allow(data.on_long_prompt, "prompt", where, what)
        changes.append("prompt trimmed")
        head = prompt[:1] if int(prompt[0]) in bos else prompt[:0]
        prompt = np.concatenate([head, prompt[len(prompt) - room + len(head) :]])
    return prompt, completions


def _allow(policy: str, part: Literal["prompt", "completion"], where: str, what: str) -> None:
    """Passes when the policy is to cut (trim, truncate)."""
    if policy == "stop":
        cut = {"prompt": "trim", "completion": "truncate"}[part]
        raise UserError(f"{where}: {what}; raise data.max_length, or set data.on_long_{part} to {cut} or drop")
    if policy == "drop":
        raise DroppedRow(f"{part} too long", what)
