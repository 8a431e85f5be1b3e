"""The inner door: what `mlxdpo_eval` needs beside the names of `import mlxdpo`, and nothing else of the rooms.

The evaluation reads runs, pairs, models and files through here, so that a room can be changed without it. The names
may change between versions; those of `import mlxdpo` do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxdpo.data.best_of_k import BestOfK as BestOfK
    from mlxdpo.data.encode import encode_prompt as encode_prompt
    from mlxdpo.data.read import read_preferences as read_preferences
    from mlxdpo.forward.next_token import next_logits as next_logits
    from mlxdpo.inference.generate import finished as finished
    from mlxdpo.inference.generate import generate as generate
    from mlxdpo.inference.mixtures import at_strengths as at_strengths
    from mlxdpo.inference.mixtures import merge_runs as merge_runs
    from mlxdpo.inference.mixtures import run_at as run_at
    from mlxdpo.inference.trained_run import PairLogps as PairLogps
    from mlxdpo.inference.trained_run import TrainedRun as TrainedRun
    from mlxdpo.inference.trained_run import at_checkpoints as at_checkpoints
    from mlxdpo.inference.trained_run import distinct_prompts as distinct_prompts
    from mlxdpo.inference.trained_run import encode_pairs as encode_pairs
    from mlxdpo.inference.trained_run import heldout_pairs as heldout_pairs
    from mlxdpo.inference.trained_run import heldout_records as heldout_records
    from mlxdpo.inference.trained_run import model_logps as model_logps
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
    from mlxdpo.io.progress import saying_left as saying_left
    from mlxdpo.io.progress import time_left as time_left
    from mlxdpo.machine.device import cache_folder as cache_folder
    from mlxdpo.machine.device import versions as versions
    from mlxdpo.training.step import NonFiniteError as NonFiniteError
    from mlxdpo.types import Example as Example

NAMES = {
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
    "model_logps": "mlxdpo.inference.trained_run",
    "open_trained_run": "mlxdpo.inference.trained_run",
    "append_line": "mlxdpo.io.atomic",
    "write_json": "mlxdpo.io.atomic",
    "write_text": "mlxdpo.io.atomic",
    "folder_digest": "mlxdpo.io.digest",
    "as_written": "mlxdpo.io.json_file",
    "read_json": "mlxdpo.io.json_file",
    "read_lines": "mlxdpo.io.json_file",
    "is_loopback": "mlxdpo.io.names",
    "saying_left": "mlxdpo.io.progress",
    "time_left": "mlxdpo.io.progress",
    "cache_folder": "mlxdpo.machine.device",
    "versions": "mlxdpo.machine.device",
    "NonFiniteError": "mlxdpo.training.step",
    "Example": "mlxdpo.types",
    "finished": "mlxdpo.inference.generate",
    "generate": "mlxdpo.inference.generate",
}
__all__ = sorted(NAMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"mlxdpo.inner has no `{name}`; it has {', '.join(sorted(NAMES))}")
    value = globals()[name] = getattr(importlib.import_module(NAMES[name]), name)
    return value
