"""Is the tuned model really preferred? Import name: mlxdpo_eval.

`winrate` reads verdicts of other harnesses too and needs neither MLX nor a model:

    import mlxdpo_eval
    result = mlxdpo_eval.winrate("annotations.json")
    print(result.rate, result.interval, result.controlled)
"""

import importlib
from typing import TYPE_CHECKING, Any

import mlxdpo  # noqa: F401  (before mlx.core: it puts a fast BLAS in front)

if TYPE_CHECKING:
    from mlxdpo_eval.pairwise import PairwiseResult as PairwiseResult
    from mlxdpo_eval.pairwise import winrate as winrate

_DOOR = {"winrate": "mlxdpo_eval.pairwise", "PairwiseResult": "mlxdpo_eval.pairwise"}


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"mlxdpo_eval has no `{name}`; it has {', '.join(sorted(_DOOR))}")
    value = globals()[name] = getattr(importlib.import_module(_DOOR[name]), name)
    return value
