"""Pairs of random trajectories as token ids, and their log-probs computed row by row."""

import mlx.core as mx
import numpy as np

from mlxdpo.forward.logprobs import completion_logps
from mlxdpo.types import Example


def judged_turns(draw, prompt=21, steps=4, turn=(3, 9), tool=(2, 12), alternatives=1):
    """A conversation in which each assistant turn is chosen over others that it might have had: (steps *
    alternatives) pairs, in each of which the last turn alone is scored."""
    ids = lambda low, high: draw.integers(1, 300, draw.integers(low, high)).astype(np.int32)  # noqa: E731
    root, history, pairs = ids(prompt, prompt + 1), np.zeros(0, np.int32), []
    for step in range(steps):
        chosen = ids(*turn)
        for other in range(alternatives):
            rejected = ids(*turn)
            if other:  # two answers that begin alike branch within a turn
                rejected[:2] = chosen[:2]
            rows = [np.concatenate([history, answer]) for answer in (chosen, rejected)]
            masks = [np.arange(len(row)) >= len(history) for row in rows]
            pairs.append(Example(root, *rows, f"step {step}", chosen_mask=masks[0], rejected_mask=masks[1]))
        history = np.concatenate([history, chosen, ids(*tool)])
    return pairs


def whole_trajectories(draw, prompt=35, steps=3):
    """Two conversations that part after a turn that both have: every assistant turn behind it is scored."""
    ids = lambda low, high: draw.integers(1, 300, draw.integers(low, high)).astype(np.int32)  # noqa: E731
    root, shared = ids(prompt, prompt + 1), ids(5, 12)

    def one():
        """Tokens and mask of one of them."""
        parts = [
            (shared, False),
            *((ids(2, 9), scored) for _ in range(steps) for scored in (True, False)),
            (ids(3, 5), True),
        ]
        return np.concatenate([part for part, _ in parts]), np.concatenate([np.full(len(p), s) for p, s in parts])

    (chosen, chosen_mask), (rejected, rejected_mask) = one(), one()
    return [Example(root, chosen, rejected, "pair", chosen_mask=chosen_mask, rejected_mask=rejected_mask)]


def row_by_row(model, examples):
    """(2 N,) summed log-probs of the scored tokens of chosen and rejected, each row alone."""
    found = []
    for e in examples:
        for ids, mask in ((e.chosen, e.chosen_mask), (e.rejected, e.rejected_mask)):
            tokens = mx.array(np.concatenate([e.prompt, ids]))[None]
            scored = np.ones(len(ids), bool) if mask is None else mask
            counts = np.concatenate([np.zeros(len(e.prompt) - 1, bool), scored])
            found.append(completion_logps(model, tokens, mx.array(counts.astype(np.float32))[None])[0])
    return mx.stack(found)
