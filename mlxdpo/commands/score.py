"""`mlxdpo score --model M [--adapter A] --data D --out FILE.jsonl`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
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

    Args:
        config: Settings.
        out: JSON lines, one per pair, in the order of the data.
        beta: Factor of the implicit rewards.
        batch_size: Pairs computed at once.
    """
    from rich.progress import track

    from mlxdpo.commands.terminal import console
    from mlxdpo.data.encode import encode_all
    from mlxdpo.data.examples import largest_token, longest_row
    from mlxdpo.data.read import read_pairs
    from mlxdpo.inference.trained_run import model_logps
    from mlxdpo.io.atomic import write_text
    from mlxdpo.io.progress import saying_left
    from mlxdpo.io.words import counted
    from mlxdpo.model.adapters import load_adapter, read_settings
    from mlxdpo.model.limits import check_takes
    from mlxdpo.model.policy import load_policy

    if config.model.adapter:
        read_settings(Path(config.model.adapter))  # refused before the work begins
    rows, report = read_pairs(config.data)
    policy = load_policy(config.model)
    examples, encoding = encode_all(rows, policy.tokenizer, config.data, eos_ids=policy.eos_ids)
    check_takes(policy, longest_row(examples), largest_token(examples))
    for line in [*policy.reading.notes, *report.lines(), *encoding.lines()]:
        console.print(line, style="yellow")
    on_a_terminal = partial(track, description="scoring", console=console, transient=True)
    progress = on_a_terminal if console.is_terminal else saying_left("scored batches of pairs", console.print)
    base = model_logps(policy.model, examples, config.data.group, batch_size, progress)
    tuned = None
    if config.model.adapter:
        load_adapter(policy.model, Path(config.model.adapter))
        tuned = model_logps(policy.model, examples, config.data.group, batch_size, progress)
    lines = (json.dumps(row) for row in _score_rows(examples, base, tuned, beta))
    write_text(out, "\n".join(lines) + "\n")
    console.print(f"{counted(len(examples), 'pair')} scored -> {out}")


def _score_rows(examples: list, base: Any, tuned: Any, beta: float) -> Iterator[dict[str, Any]]:
    """Lines of the file; `base` and `tuned` are (2, N) log-probs, `tuned` None without an adapter."""
    policy = base if tuned is None else tuned
    for i, example in enumerate(examples):
        row: dict[str, Any] = {
            "where": example.where,
            "prompt_tokens": len(example.prompt),
            "chosen_tokens": example.scored[0],
            "rejected_tokens": example.scored[1],
        }
        row |= {"policy_chosen": float(policy[0, i]), "policy_rejected": float(policy[1, i])}
        if tuned is not None:
            rewards = [beta * (t - b) for t, b in zip(tuned[:, i].tolist(), base[:, i].tolist(), strict=True)]
            row |= {"reference_chosen": float(base[0, i]), "reference_rejected": float(base[1, i])}
            row |= {"reward_chosen": rewards[0], "reward_rejected": rewards[1], "margin": rewards[0] - rewards[1]}
        yield row
