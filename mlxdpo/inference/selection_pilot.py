"""Which selection of the pairs teaches most: a short run on each, all of equal steps, measured on held-out pairs.

Published rules for choosing pairs contradict each other (arXiv 2502.14560, 2508.04149), so they are tried on the pairs
at hand, next to all pairs and to as many pairs drawn at random.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.findings import SELECTIONS, selected
from mlxdpo.inference.run_prompts import text_to_json
from mlxdpo.inference.trained_run import encode_pairs, open_trained_run, pair_logps
from mlxdpo.io.atomic import write_text
from mlxdpo.io.json_file import json_lines
from mlxdpo.runs import Run
from mlxdpo.training.run import train
from mlxdpo.types import Preference, UserError

ALL, RANDOM = "all", "random"
SHARE = 0.5  # of the pairs that a rule keeps where none is named
STEPS = 40  # optimizer steps of each run where `train.steps` is not set


class PilotRun(NamedTuple):
    """One run: `margins` (H,) are the held-out pairs' differences of log-ratios, chosen less rejected, nats."""

    name: str
    seed: int
    pairs: int
    margins: list[float]
    lr: float


def pilot_selections(
    findings: Sequence[Mapping[str, Any]], rules: Sequence[str], seed: int
) -> dict[str, tuple[int, ...]]:
    """What is compared, by name: the rows of all pairs, of a random subset, and of each rule NAME:SHARE.

    Raises `UserError` for a rule of another form, and for rules of different shares.
    """
    kept = {rule: tuple(sorted(selected(findings, rule))) for rule in rules}
    sizes = {len(rows) for rows in kept.values()}
    if len(sizes) != 1:
        raise UserError(f"the rules {', '.join(rules)} keep different numbers of pairs; give them one share")
    drawn = random.Random(seed * 1_000_003 + 17).sample(range(len(findings)), sizes.pop())
    return {ALL: tuple(range(len(findings))), RANDOM: tuple(sorted(drawn)), **kept}


def every_rule(share: float = SHARE) -> list[str]:
    """The rules of `mlxdpo data audit --select`, at one share."""
    return [f"{name}:{share:g}" for name in SELECTIONS]


def run_pilot(
    config: Config,
    rows: Sequence[Preference],
    findings: Sequence[Mapping[str, Any]],
    heldout: Sequence[Preference],
    rules: Sequence[str],
    seeds: int,
    done: Sequence[PilotRun] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[PilotRun]:
    """Train on each selection of `rows` with each seed and score `heldout`; yields the runs that are not in `done`.

    All have the steps of `config` and one learning rate: where it is "auto", that which the first run measures. The
    reference's log-probs are in the cache after the audit. Asked to stop it ends between two runs, or drops the one it
    is in. Raises `UserError` as training does.
    """
    finished, lr = {(one.name, one.seed) for one in done}, next((one.lr for one in done), None)
    for seed in range(seeds):
        for name, kept in pilot_selections(findings, rules, seed).items():
            if (name, seed) in finished:
                continue
            found = _one_run(config, [pair_as_json(rows[i]) for i in kept], heldout, name, seed, lr, should_stop)
            if found is None:
                return
            lr = found.lr
            yield found


def _one_run(
    config: Config,
    kept: Sequence[Mapping[str, Any]],
    heldout: Sequence[Preference],
    name: str,
    seed: int,
    lr: float | None,
    should_stop: Callable[[], bool],
) -> PilotRun | None:
    """Train and score in a folder that is removed afterwards; None when asked to stop."""
    with tempfile.TemporaryDirectory(prefix="mlxdpo-pilot-") as folder:
        file, out = Path(folder) / "pairs.jsonl", Path(folder) / "run"
        write_text(file, json_lines(kept))
        data = config.data.model_copy(
            update={"path": str(file), "format": "auto", "columns": {}, "eval": None, "eval_fraction": 0.0}
        )
        optim = config.optim.model_copy(update={"lr": config.optim.lr if lr is None else lr})
        settings = config.train.model_copy(update={"seed": config.train.seed + seed})
        update = {"data": data, "optim": optim, "train": settings, "out": str(out)}
        events = [event.kind for event in train(config.model_copy(update=update), should_stop=should_stop)]
        if events[-1] == "interrupted":
            return None
        run = Run.open(out)
        rate = run.config().optim.lr
        assert rate != "auto"  # settled by the run
        return PilotRun(name, seed, len(kept), heldout_margins(run, heldout), rate)


def heldout_margins(run: Run, heldout: Sequence[Preference]) -> list[float]:
    """(H,) differences of log-ratios of pairs that a run was not trained on, chosen less rejected, nats; those that do
    not fit are left out, the same ones for every run with these settings."""
    trained = open_trained_run(run)
    _, examples, _ = encode_pairs(trained, heldout)
    logps = pair_logps(trained, examples, trained.config.train.batch_size)
    margins = (logps.chosen - logps.ref_chosen) - (logps.rejected - logps.ref_rejected)
    return np.round(margins, 6).tolist()


def pair_as_json(row: Preference, flipped: bool = False) -> dict[str, Any]:
    """A pair as a row of a data file; its answers exchanged where it is `flipped`."""
    sides = (row.rejected, row.chosen) if flipped else (row.chosen, row.rejected)
    found: dict[str, Any] = {"prompt": text_to_json(row.prompt)}
    found |= {name: text_to_json(side) for name, side in zip(("chosen", "rejected"), sides, strict=True)}
    if row.tools:
        found["tools"] = [dict(tool) for tool in row.tools]
    return {name: value for name, value in row.columns.items() if name not in found} | found
