"""A reward model that was trained (`stage: reward`), opened again: prompts and completions in, numbers out.

    rewards = open_reward_model(Run.open("runs/rm"))
    rewards(["Name a fruit."], ["A pear."])     # array([0.71])

Only differences between answers to one prompt mean something: r_1 - r_2 is the log-odds that the first is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode_stream
from mlxdpo.data.report import Report
from mlxdpo.data.template import probe
from mlxdpo.data.transforms import with_end
from mlxdpo.forward.choose_forward import find_level
from mlxdpo.forward.reward_head import FILE, load_head
from mlxdpo.forward.rewards import reward_fns
from mlxdpo.inference.trained_run import score_examples
from mlxdpo.io.digest import file_digest, folder_digest
from mlxdpo.model.adapters import base_of_run, dropout_off, load_adapter
from mlxdpo.model.policy import Policy
from mlxdpo.runs import Run
from mlxdpo.types import Example, Text, UnpairedExample, UserError

# An answer that is too long is judged by what fits: it is better to have a number than none.
READING = {"on_bad_row": "skip", "on_long_prompt": "trim", "on_long_completion": "truncate"}


@dataclass(frozen=True)
class RewardModel:
    """A callable that gives rewards. `identity` says which numbers it computes with: weights, head, reading."""

    policy: Policy
    data: DataConfig
    identity: Mapping[str, Any]
    batch_size: int = 16

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text]) -> np.ndarray:
        """(N,) float64 rewards of the completions of N prompts; NaN for an answer that cannot be read (an empty one).

        Text is written as the run's pairs were: as chat turns, or as it stands. Raises `ValueError` for unequal counts.
        """
        values = np.full(len(prompts), np.nan)
        examples = list(with_end(self._encoded(prompts, completions), self.data, Report()))
        forward = reward_fns(find_level(self.policy.model)).score
        with dropout_off(self.policy.model) as model:
            score = lambda batch: forward(model, batch)[batch.chosen]  # noqa: E731
            rewards = score_examples(examples, self.data.group, self.batch_size, 1, score)[0]
        values[[int(example.where) for example in examples]] = rewards
        return values

    def _encoded(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Iterable[Example]:
        """Encoded rows; `where` is the number of the row."""
        writer = probe(self.policy.tokenizer, self.data, self.policy.eos_ids)
        return encode_stream(_unpaired_rows(prompts, completions), writer, self.data, Report())


def _unpaired_rows(prompts: Sequence[Text], completions: Sequence[Text]) -> Iterator[UnpairedExample]:
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        yield UnpairedExample(prompt, completion, True, str(number))


def open_reward_model(run: Run, batch_size: int = 16) -> RewardModel:
    """Load a run's reward model, ready to be called; `batch_size` answers are computed at once.

    Raises `UserError` for a run of another stage, one that is not finished, or one whose base model has changed.
    """
    config = run.config()
    if config.stage != "reward":
        raise UserError(f"{run.path}: a run of stage {config.stage} is not a reward model; use a run of stage reward")
    policy = base_of_run(run)
    load_adapter(policy.model, run.adapter)
    load_head(policy.model, run.path)
    mx.eval(policy.model.parameters())
    data = config.data.model_copy(update=READING)
    numbers = {name: policy.identity[name] for name in ("digest", "dtype", "quantization")}
    made = {"adapter": folder_digest(run.adapter), "head": file_digest(run.path / FILE)}
    reading = data.model_dump(mode="json", include={"template", "eos", "thinking", "max_length"})
    # Left out where they are as they were before there were such settings: identities of older runs stay.
    reading |= data.model_dump(mode="json", include={"reasoning", "system", "date"}, exclude_defaults=True)
    return RewardModel(policy, data, numbers | made | reading, batch_size)
