"""What an evaluation leaves behind: whose numbers they are, the drift of the answers, and every line behind them."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlxdpo import Run
from mlxdpo.inner import TrainedRun, write_json, write_text
from mlxdpo_eval.judges import BothOrders
from mlxdpo_eval.metrics.intervals import clustered_mean
from mlxdpo_eval.metrics.texts import length_ratio, text_report
from mlxdpo_eval.sampling import Answers


def to_json(value: Any) -> Any:
    """A value as JSON: named tuples become objects, NumPy numbers become numbers.

    Infinity and NaN become null, because not every reader can parse them.
    """
    if hasattr(value, "_asdict"):
        return to_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(name): to_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if isinstance(value, np.ndarray | np.generic):
        return to_json(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


FORMAT = 2  # of results files


def write_results(run: Run, results: Mapping[str, Any], seconds: float) -> tuple[Path, dict[str, Any]]:
    """The results file; only `when` differs between two runs of the same evaluation."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    written = to_json(results) | {"when": {"created": now.isoformat(), "seconds": round(seconds, 1)}}
    file = run.path / "eval" / f"results_{now:%Y-%m-%dT%H-%M-%S}.json"
    write_json(file, written)
    return file, written


def drift_report(before: Answers, after: Answers, kl_of: Answers, kl: Sequence[float]) -> dict[str, Any]:
    """KL along the policy's own answers (the first to each prompt), and the form of the texts."""
    tokens = [len(t) + s for t, s in zip(kl_of.tokens, kl_of.stopped, strict=True)]
    old, new = ([float(len(t)) for t in side.tokens] for side in (before, after))
    return {
        "kl": float(np.mean(kl)),
        "kl_interval": clustered_mean(kl, kl_of.names),
        "kl_per_token": float(np.sum(kl) / max(1, sum(tokens))),
        "answers": len(kl),
        "before": text_report(before.tokens, before.stopped, before.names),
        "after": text_report(after.tokens, after.stopped, after.names),
        "length_ratio": length_ratio(old, new, before.names),
        "same": sum(a == b for a, b in zip(before.texts, after.texts, strict=True)) / len(after.texts),
    }


def identify_run(opened: TrainedRun) -> dict[str, Any]:
    """Whose numbers these are: model, reference, adapter, objective, data."""
    config, manifest = opened.config, opened.run.manifest()
    adapter = opened.run.adapter / "adapters.safetensors"
    return {
        "name": opened.run.path.name,
        "model": manifest["model"],
        "reference": manifest["reference"],
        "reference_source": manifest["reference_source"],
        "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "template": manifest["template"],
        "loss": config.loss.model_dump(),
        "loss_set": config.loss.model_dump(exclude_defaults=True),
        "training_pairs": manifest["data"]["pairs"],
        "seed": manifest["seed"],
    }


def sample_lines(
    before: Answers, after: Answers, kl: Mapping[str, float], found: Mapping[str, Sequence[BothOrders]]
) -> list[dict[str, Any]]:
    """One line per pair of answers; `kl` stands at the first answer of each prompt, `found` holds verdicts by judge."""
    lines, numbers = [], dict[str, int]()
    for i, name in enumerate(before.names):
        number = numbers[name] = numbers.get(name, -1) + 1
        verdicts = {
            judge: {
                "shown_first": b.first,
                "shown_second": b.second,
                "logit": b.logit,
                "reason": b.reason,
                "same": b.same,
            }
            for judge, both in found.items()
            for b in (both[i],)
        }
        lines.append(
            {
                "prompt_id": name,
                "sample": number,
                "prompt": before.prompts[i],
                "before": before.texts[i],
                "after": after.texts[i],
                "tokens": [len(before.tokens[i]), len(after.tokens[i])],
                "stopped": [before.stopped[i], after.stopped[i]],
                "kl": kl[name] if number == 0 else None,
                "verdicts": verdicts,
            }
        )
    return lines


def write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or absent."""
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
