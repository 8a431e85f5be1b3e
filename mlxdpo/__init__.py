"""mlxdpo: Direct Preference Optimization on Apple silicon, in MLX.

The front door. Each name is imported when it is first asked for, so that `import mlxdpo` stays light:

    from mlxdpo import load_config, train
    for event in train(load_config("recipe.yaml")):
        print(event)
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from mlxdpo.platform import look_wide, preload_blas

preload_blas()
look_wide()

if TYPE_CHECKING:  # what type checkers see; `_DOOR` is what is imported when it is asked for
    from mlxdpo.config import Config as Config
    from mlxdpo.config import load_config as load_config
    from mlxdpo.data.encode import encode as encode
    from mlxdpo.data.encode import encode_prompt as encode_prompt
    from mlxdpo.data.several import Several as Several
    from mlxdpo.export import export as export
    from mlxdpo.generate import generate as generate
    from mlxdpo.losses import LOSSES as LOSSES
    from mlxdpo.model.adapters import attach_lora as attach_lora
    from mlxdpo.model.identity import folder_digest as folder_digest
    from mlxdpo.model.policy import load_policy as load_policy
    from mlxdpo.next_token import next_logits as next_logits
    from mlxdpo.platform import cache_folder as cache_folder
    from mlxdpo.platform import versions as versions
    from mlxdpo.reference import with_reference as with_reference
    from mlxdpo.reopen import Opened as Opened
    from mlxdpo.reopen import PairLogps as PairLogps
    from mlxdpo.reopen import at_checkpoints as at_checkpoints
    from mlxdpo.reopen import distinct_prompts as distinct_prompts
    from mlxdpo.reopen import encode_pairs as encode_pairs
    from mlxdpo.reopen import heldout_pairs as heldout_pairs
    from mlxdpo.reopen import heldout_records as heldout_records
    from mlxdpo.reopen import pair_logps as pair_logps
    from mlxdpo.reopen import prompt_name as prompt_name
    from mlxdpo.reopen import prompt_text as prompt_text
    from mlxdpo.reopen import reopen as reopen
    from mlxdpo.reward_model import open_reward_model as open_reward_model
    from mlxdpo.runs import Run as Run
    from mlxdpo.runs import append_line as append_line
    from mlxdpo.runs import as_written as as_written
    from mlxdpo.runs import read_json as read_json
    from mlxdpo.runs import read_lines as read_lines
    from mlxdpo.runs import write_json as write_json
    from mlxdpo.runs import write_text as write_text
    from mlxdpo.scoring import completion_logps as completion_logps
    from mlxdpo.train import train as train
    from mlxdpo.types import Example as Example
    from mlxdpo.types import Message as Message
    from mlxdpo.types import Pairs as Pairs
    from mlxdpo.types import Preference as Preference
    from mlxdpo.types import Unpaired as Unpaired
    from mlxdpo.types import UserError as UserError

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
    "export": "mlxdpo.export",
    "open_reward_model": "mlxdpo.reward_model",
    # what the evaluation (eval/) needs besides
    "Example": "mlxdpo.types",
    "Opened": "mlxdpo.reopen",
    "PairLogps": "mlxdpo.reopen",
    "reopen": "mlxdpo.reopen",
    "at_checkpoints": "mlxdpo.reopen",
    "heldout_pairs": "mlxdpo.reopen",
    "heldout_records": "mlxdpo.reopen",
    "folder_digest": "mlxdpo.model.identity",
    "Several": "mlxdpo.data.several",
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
    "as_written": "mlxdpo.runs",
    "read_json": "mlxdpo.runs",
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
