"""Direct Preference Optimization on Apple silicon, in MLX: tune a model on pairs, and know whether it is better.

Tune on rows in memory, look at the run (a notebook shows its curve), and ask whether it is better:

    import mlxdpo
    rows = [{"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "I like trains."}, ...]
    run = mlxdpo.tune("smollm2", rows, loss="sigmoid", lr=1e-4, out="runs/mine")
    print(mlxdpo.evaluate(run, judge=lambda prompt, answer: -len(answer))["sentences"])

Answers before and after:

    mlxdpo.generate(run, ["Name a fruit."]), mlxdpo.generate(run, ["Name a fruit."], before=True)

An objective of your own, one loss per pair:

    @mlxdpo.objective
    def squared(pairs, *, beta):
        lead = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
        return (1 - beta * lead) ** 2
    mlxdpo.tune("smollm2", "pairs.jsonl", loss=squared, beta=0.2, steps=100)

Several settings, with what can be told apart:

    mlxdpo.sweep("smollm2", rows, beta=[0.05, 0.1, 0.3], seeds=3, out="runs/betas")

Events one by one, from a recipe or from settings:

    for event in mlxdpo.train(mlxdpo.load_config("recipe.yaml")):
        print(event.kind, event.step)
    for event in mlxdpo.train(model="smollm2", data=rows, **{"optim.lr": 1e-4, "train.steps": 10}):
        print(event.kind, event.step)

A run of last week: is it the same when it is trained again?

    run = mlxdpo.open_run("runs/mine")
    print(run.reproduce().same)

Settings are those of a recipe (`help(mlxdpo.Config)`). Each name is imported when it is first asked for, so that
`import mlxdpo` stays light. What the evaluation package needs besides is in `mlxdpo.inner`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mlxdpo.machine.openblas import look_wide, preload_blas

preload_blas()
look_wide()

if TYPE_CHECKING:  # what type checkers see; `_DOOR` is what is imported when it is asked for
    from mlxdpo.api.judged import evaluate as evaluate
    from mlxdpo.api.judged import generate as generate
    from mlxdpo.api.objective_function import objective as objective
    from mlxdpo.api.swept import sweep as sweep
    from mlxdpo.api.tuned_run import open_run as open_run
    from mlxdpo.api.tuned_run import tune as tune
    from mlxdpo.config import Config as Config
    from mlxdpo.config import load_config as load_config
    from mlxdpo.data.encode import encode as encode
    from mlxdpo.exporters import export as export
    from mlxdpo.forward.logprobs import completion_logps as completion_logps
    from mlxdpo.inference.reward_model import open_reward_model as open_reward_model
    from mlxdpo.losses import LOSSES as LOSSES
    from mlxdpo.model.adapters import attach_lora as attach_lora
    from mlxdpo.model.policy import load_policy as load_policy
    from mlxdpo.runs import Run as Run
    from mlxdpo.training.reference import with_reference as with_reference
    from mlxdpo.training.run import train as train
    from mlxdpo.types import Message as Message
    from mlxdpo.types import Pairs as Pairs
    from mlxdpo.types import Preference as Preference
    from mlxdpo.types import Unpaired as Unpaired
    from mlxdpo.types import UserError as UserError

_DOOR = {
    "tune": "mlxdpo.api.tuned_run",
    "train": "mlxdpo.training.run",
    "evaluate": "mlxdpo.api.judged",
    "generate": "mlxdpo.api.judged",
    "open_run": "mlxdpo.api.tuned_run",
    "sweep": "mlxdpo.api.swept",
    "objective": "mlxdpo.api.objective_function",
    "export": "mlxdpo.exporters",
    "load_config": "mlxdpo.config",
    "Config": "mlxdpo.config",
    "Run": "mlxdpo.runs",
    "LOSSES": "mlxdpo.losses",
    "Pairs": "mlxdpo.types",
    "Unpaired": "mlxdpo.types",
    "Preference": "mlxdpo.types",
    "Message": "mlxdpo.types",
    "UserError": "mlxdpo.types",
    "load_policy": "mlxdpo.model.policy",
    "attach_lora": "mlxdpo.model.adapters",
    "encode": "mlxdpo.data.encode",
    "completion_logps": "mlxdpo.forward.logprobs",
    "with_reference": "mlxdpo.training.reference",
    "open_reward_model": "mlxdpo.inference.reward_model",
}
__all__ = sorted(_DOOR)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        inner = importlib.import_module("mlxdpo.inner")
        if name in inner.NAMES:  # the door had them up to version 0.1
            return getattr(inner, name)
        raise AttributeError(f"mlxdpo has no `{name}`; it has {', '.join(sorted(_DOOR))}")
    value = globals()[name] = getattr(importlib.import_module(_DOOR[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOOR})
