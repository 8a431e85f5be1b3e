"""Capability checks by lm-evaluation-harness, through mlx-lm's own wrapper around a model that is already loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.model.adapters import dropout_off
from mlxdpo.types import UserError


def check_lm_eval() -> None:
    """Raise `UserError` when lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "--tasks needs lm-evaluation-harness, which is not installed; run `pip install 'mlxdpo[tasks]'`"
        )


def find_tasks(tasks: Sequence[str], include: Path | None = None) -> Any:
    """The harness's list of tasks, those of the folder `include` among them.

    Raises `UserError` for a task that is not in it, and when the harness is missing.
    """
    check_lm_eval()
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=None if include is None else str(include))
    if unknown := [name for name in tasks if not known.match_tasks([name])]:
        raise UserError(f"--tasks {unknown[0]}: lm-evaluation-harness has no such task; `lm-eval ls tasks` lists them")
    return known


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    known: Any,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 123,
) -> dict[str, dict[str, Any]]:
    """Task -> measure -> value, as the harness reports them; `limit` questions of each task, greedy answers.

    `known` is what `find_tasks` returned for these tasks.
    """
    import lm_eval
    from mlx_lm.evaluate import MLXLM

    # Its constructor loads a model from a folder; everything else works on the two attributes that it sets.
    wrapper = MLXLM.__new__(MLXLM)
    super(MLXLM, wrapper).__init__()
    wrapper._model, wrapper.tokenizer = model, tokenizer
    wrapper._max_tokens, wrapper._batch_size, wrapper._sampler = None, batch_size, None
    wrapper.use_chat_template = tokenizer.chat_template is not None
    mx.random.seed(seed)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with dropout_off(model):
        found = lm_eval.simple_evaluate(
            model=wrapper,
            tasks=list(tasks),
            task_manager=known,
            limit=limit,
            apply_chat_template=wrapper.use_chat_template,
            **seeds,
        )
    assert found is not None  # it is None on other ranks of a distributed job only
    return {task: _task_measures(measures) for task, measures in found["results"].items()}


def _task_measures(measures: dict[str, Any]) -> dict[str, Any]:
    return {name: float(v) if isinstance(v, int | float) else str(v) for name, v in measures.items()}
