"""`mlxdpo score --model M [--adapter A] --data D --out FILE.jsonl`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from mlxdpo.config import DataConfig, LossConfig, ModelConfig, Section

Positive = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]


class ScoreConfig(Section):
    """What is scored with what."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()


DEFAULT_BETA = LossConfig().beta
NOTHING = ScoreConfig()  # no setting given


def run(
    *,
    config: Annotated[ScoreConfig, Parameter(name="*")] = NOTHING,
    out: Path,
    beta: Positive = DEFAULT_BETA,
    batch_size: Count = 4,
) -> None:
    """Write per pair: summed completion log-probs (nats), token counts and, with an adapter, rewards and margin.

    The reference is the model without the adapter; rewards are beta * (log pi - log ref).

    Parameters
    ----------
    config
        Settings.
    out
        JSON lines, one per pair, in the order of the data.
    beta
        Factor of the implicit rewards.
    batch_size
        Pairs computed at once.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.data.encode import encode_all
    from mlxdpo.data.planning import outline, plan_straight
    from mlxdpo.data.read import read_pairs
    from mlxdpo.io.atomic import write_text
    from mlxdpo.model.adapters import load_adapter, read_settings
    from mlxdpo.model.policy import load_policy

    if config.model.adapter:
        read_settings(Path(config.model.adapter))  # refused before the work begins
    rows, report = read_pairs(config.data)
    policy = load_policy(config.model)
    examples, encoding = encode_all(rows, policy.tokenizer, config.data, eos_ids=policy.eos_ids)
    for line in report.lines() + encoding.lines():
        console.print(line, style="yellow")
    batches = plan_straight(outline(examples, config.data.group), batch_size)
    base = score_all(policy.model, examples, batches, batch_size)
    tuned = None
    if config.model.adapter:
        load_adapter(policy.model, Path(config.model.adapter))
        tuned = score_all(policy.model, examples, batches, batch_size)
    lines = (json.dumps(row) for row in _score_rows(examples, base, tuned, beta))
    write_text(out, "\n".join(lines) + "\n")
    console.print(f"{len(examples)} pairs scored -> {out}")


def score_all(model: Any, examples: list, batches: list, batch_size: int) -> list[tuple[float, float]]:
    """(chosen, rejected) summed log-probs of each pair, nats, in the order given."""
    from rich.progress import track

    from mlxdpo.commands.terminal import console
    from mlxdpo.data.batching import collate
    from mlxdpo.model.adapters import dropout_off
    from mlxdpo.training.step import make_scorer

    scorer, result = make_scorer(model), [(0.0, 0.0)] * len(examples)
    shown = track(batches, "scoring", console=console, transient=True, disable=not console.is_terminal)
    with dropout_off(model):
        for indices in shown:
            pairs = scorer(collate(examples, indices, batch_size))
            for i, chosen, rejected in zip(indices, pairs.chosen.tolist(), pairs.rejected.tolist(), strict=False):
                result[i] = (chosen, rejected)
    return result


def _score_rows(examples: list, base: list, tuned: list | None, beta: float) -> Iterator[dict[str, Any]]:
    for i, example in enumerate(examples):
        row: dict[str, Any] = {
            "where": example.where,
            "prompt_tokens": len(example.prompt),
            "chosen_tokens": len(example.chosen),
            "rejected_tokens": len(example.rejected),
        }
        policy = tuned or base
        row |= {"policy_chosen": policy[i][0], "policy_rejected": policy[i][1]}
        if tuned:
            rewards = [beta * (t - b) for t, b in zip(tuned[i], base[i], strict=True)]
            row |= {"reference_chosen": base[i][0], "reference_rejected": base[i][1]}
            row |= {"reward_chosen": rewards[0], "reward_rejected": rewards[1], "margin": rewards[0] - rewards[1]}
        yield row
