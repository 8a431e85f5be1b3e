"""mlxdpo: Direct Preference Optimization on Apple silicon, in MLX.

The front door. Each name is imported when it is first asked for, so that `import mlxdpo` stays light:

    from mlxdpo import load_config, train
    for event in train(load_config("recipe.yaml")):
        print(event)
"""

import importlib
from typing import TYPE_CHECKING, Any

from mlxdpo.machine.openblas import look_wide, preload_blas

preload_blas()
look_wide()

if TYPE_CHECKING:  # what type checkers see; `_DOOR` is what is imported when it is asked for
    from mlxdpo.config import Config as Config
    from mlxdpo.config import load_config as load_config
    from mlxdpo.data.best_of_k import BestOfK as BestOfK
    from mlxdpo.data.encode import encode as encode
    from mlxdpo.data.encode import encode_prompt as encode_prompt
    from mlxdpo.data.read import read_preferences as read_preferences
    from mlxdpo.exporters import export as export
    from mlxdpo.forward.logprobs import completion_logps as completion_logps
    from mlxdpo.forward.next_token import next_logits as next_logits
    from mlxdpo.inference.generate import generate as generate
    from mlxdpo.inference.mixtures import at_strengths as at_strengths
    from mlxdpo.inference.mixtures import merge_runs as merge_runs
    from mlxdpo.inference.mixtures import run_at as run_at
    from mlxdpo.inference.reward_model import open_reward_model as open_reward_model
    from mlxdpo.inference.trained_run import PairLogps as PairLogps
    from mlxdpo.inference.trained_run import TrainedRun as TrainedRun
    from mlxdpo.inference.trained_run import at_checkpoints as at_checkpoints
    from mlxdpo.inference.trained_run import distinct_prompts as distinct_prompts
    from mlxdpo.inference.trained_run import encode_pairs as encode_pairs
    from mlxdpo.inference.trained_run import heldout_pairs as heldout_pairs
    from mlxdpo.inference.trained_run import heldout_records as heldout_records
    from mlxdpo.inference.trained_run import open_trained_run as open_trained_run
    from mlxdpo.inference.trained_run import pair_logps as pair_logps
    from mlxdpo.inference.trained_run import prompt_name as prompt_name
    from mlxdpo.inference.trained_run import prompt_text as prompt_text
    from mlxdpo.io.atomic import append_line as append_line
    from mlxdpo.io.atomic import write_json as write_json
    from mlxdpo.io.atomic import write_text as write_text
    from mlxdpo.io.digest import folder_digest as folder_digest
    from mlxdpo.io.json_file import as_written as as_written
    from mlxdpo.io.json_file import read_json as read_json
    from mlxdpo.io.json_file import read_lines as read_lines
    from mlxdpo.io.names import is_loopback as is_loopback
    from mlxdpo.losses import LOSSES as LOSSES
    from mlxdpo.machine.device import cache_folder as cache_folder
    from mlxdpo.machine.device import versions as versions
    from mlxdpo.model.adapters import attach_lora as attach_lora
    from mlxdpo.model.policy import load_policy as load_policy
    from mlxdpo.runs import Run as Run
    from mlxdpo.training.reference import with_reference as with_reference
    from mlxdpo.training.run import train as train
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
    "completion_logps": "mlxdpo.forward.logprobs",
    "with_reference": "mlxdpo.training.reference",
    "train": "mlxdpo.training.run",
    "generate": "mlxdpo.inference.generate",
    "export": "mlxdpo.exporters",
    "open_reward_model": "mlxdpo.inference.reward_model",
    # what the evaluation (eval/) needs besides
    "at_strengths": "mlxdpo.inference.mixtures",
    "merge_runs": "mlxdpo.inference.mixtures",
    "run_at": "mlxdpo.inference.mixtures",
    "BestOfK": "mlxdpo.data.best_of_k",
    "encode_prompt": "mlxdpo.data.encode",
    "read_preferences": "mlxdpo.data.read",
    "next_logits": "mlxdpo.forward.next_token",
    "TrainedRun": "mlxdpo.inference.trained_run",
    "PairLogps": "mlxdpo.inference.trained_run",
    "at_checkpoints": "mlxdpo.inference.trained_run",
    "distinct_prompts": "mlxdpo.inference.trained_run",
    "encode_pairs": "mlxdpo.inference.trained_run",
    "heldout_pairs": "mlxdpo.inference.trained_run",
    "heldout_records": "mlxdpo.inference.trained_run",
    "pair_logps": "mlxdpo.inference.trained_run",
    "prompt_name": "mlxdpo.inference.trained_run",
    "prompt_text": "mlxdpo.inference.trained_run",
    "open_trained_run": "mlxdpo.inference.trained_run",
    "append_line": "mlxdpo.io.atomic",
    "write_json": "mlxdpo.io.atomic",
    "write_text": "mlxdpo.io.atomic",
    "folder_digest": "mlxdpo.io.digest",
    "as_written": "mlxdpo.io.json_file",
    "read_json": "mlxdpo.io.json_file",
    "read_lines": "mlxdpo.io.json_file",
    "is_loopback": "mlxdpo.io.names",
    "cache_folder": "mlxdpo.machine.device",
    "versions": "mlxdpo.machine.device",
    "Example": "mlxdpo.types",
}
__all__ = sorted(_DOOR)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _DOOR:
        raise AttributeError(f"mlxdpo has no `{name}`; it has {', '.join(sorted(_DOOR))}")
    value = globals()[name] = getattr(importlib.import_module(_DOOR[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_DOOR})
