"""mlxdpo: Direct Preference Optimization on Apple silicon, in MLX.

The front door. Each name is imported when it is first asked for, so that `import mlxdpo` stays light:

    from mlxdpo import load_config, train
    for event in train(load_config("recipe.yaml")):
        print(event)
"""

import importlib
import sys
import types
from typing import Any

from mlxdpo.platform import preload_blas

preload_blas()

_DOOR = {
    "Config": "mlxdpo.config",
    "load_config": "mlxdpo.config",
    "Run": "mlxdpo.runs",
    "Message": "mlxdpo.types",
    "Preference": "mlxdpo.types",
    "Pairs": "mlxdpo.types",
    "Unpaired": "mlxdpo.types",
    "UserError": "mlxdpo.types",
    "LOSSES": "mlxdpo.losses",
    "load_policy": "mlxdpo.model.policy",
    "attach_lora": "mlxdpo.model.adapters",
    "encode": "mlxdpo.data.encode",
    "completion_logps": "mlxdpo.scoring",
    "with_reference": "mlxdpo.reference",
    "train": "mlxdpo.train",
    "generate": "mlxdpo.generate",
    # what the evaluation (eval/) needs besides
    "Example": "mlxdpo.types",
    "Opened": "mlxdpo.reopen",
    "PairLogps": "mlxdpo.reopen",
    "reopen": "mlxdpo.reopen",
    "heldout_pairs": "mlxdpo.reopen",
    "encode_pairs": "mlxdpo.reopen",
    "pair_logps": "mlxdpo.reopen",
    "distinct_prompts": "mlxdpo.reopen",
    "prompt_name": "mlxdpo.reopen",
    "prompt_text": "mlxdpo.reopen",
    "encode_prompt": "mlxdpo.data.encode",
    "next_logits": "mlxdpo.next_token",
    "cache_folder": "mlxdpo.platform",
    "versions": "mlxdpo.platform",
    "append_line": "mlxdpo.runs",
    "read_lines": "mlxdpo.runs",
    "write_json": "mlxdpo.runs",
    "write_text": "mlxdpo.runs",
}
__all__ = sorted(_DOOR)  # pyright: ignore[reportUnsupportedDunderAll]


class _FrontDoor(types.ModuleType):
    """A package whose names win over its submodules: `mlxdpo.train` is the function, whoever imported the file."""

    def __getattr__(self, name: str) -> Any:
        if name not in _DOOR:
            raise AttributeError(f"mlxdpo has no `{name}`; it has {', '.join(sorted(_DOOR))}")
        value = getattr(importlib.import_module(_DOOR[name]), name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule sets it as an attribute of its package.
        if not (name in _DOOR and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_DOOR})


sys.modules[__name__].__class__ = _FrontDoor
