"""Does every architecture of mlx-lm train, or say why not? `python -m benchmarks.models.train_all PATH/test_models.py`.

mlx-lm's own tests build a tiny model of each (tests/test_models.py of its repository, at the tag of the version that is
installed). Each is written to a folder as mlx-lm would, and tuned for two steps on a few pairs. Exit status 1 where one
ends in a traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxdpo.config import load_config
from mlxdpo.training.run import train
from mlxdpo.types import UserError

LARGEST = 450_000_000  # parameters
WORDS = [f"w{i}" for i in range(20)]


class Outcome(NamedTuple):
    """What became of one model: "trained", "refused" with the sentence, "TRACEBACK", or "not tried"."""

    kind: str
    verdict: str
    note: str = ""


def try_all(file: Path, say: Callable[[Outcome], None], kinds: Sequence[str] = ()) -> None:
    """Every model that the tests in `file` build, in order, each said when it is done; `kinds` leaves out others."""
    specification = importlib.util.spec_from_file_location("mlx_lm_test_models", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def runner(self: Any, model: Any, model_type: str, vocab_size: int, num_layers: int) -> None:
        """Stands where the tests run a model."""
        if not kinds or model_type in kinds:
            say(_outcome(model, model_type))

    case = type("Models", (module.TestModels,), {"model_test_runner": runner})
    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        # Tests of single functions build no model for the runner; what they say is mlx-lm's business.
        if "model_test_runner" in _names_in(getattr(case, name)):
            result = unittest.TestResult()
            case(name).run(result)
            for _, text in (*result.errors, *result.failures):
                say(Outcome(name, "not tried", text.strip().splitlines()[-1][:120]))


def _names_in(function: Any) -> set[str]:
    return set(function.__code__.co_names)


def _outcome(model: Any, kind: str) -> Outcome:
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    if count > LARGEST:
        return Outcome(kind, "not tried", f"{count / 1e6:.0f} million parameters")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            write_folder(model, kind, folder / "model")
            losses = [e.values["loss"] for e in train(_recipe(folder)) if e.kind == "step"]
        except UserError as error:
            return Outcome(kind, "refused", str(error).replace(f"{folder}/", ""))
        except Exception as error:  # a traceback is what this is to find
            return Outcome(kind, "TRACEBACK", f"{type(error).__name__}: {str(error)[:200]}")
        finally:
            mx.clear_cache()
    if len(losses) != 2 or not all(abs(loss) < 100 for loss in losses):
        return Outcome(kind, "TRACEBACK", f"losses {losses}")
    return Outcome(kind, "trained")


def write_folder(model: Any, kind: str, folder: Path) -> None:
    """A model folder: config.json out of the model's arguments, its random weights in float32, a tokenizer of words."""
    folder.mkdir()
    arguments = getattr(model, "args", None) or model.config
    config = {**_plain(arguments), "model_type": kind}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    arrays = {name: array.astype(mx.float32) for name, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    _tokenizer().save_pretrained(folder)


def _plain(arguments: Any) -> Mapping[str, Any]:
    values = dataclasses.asdict(arguments) if dataclasses.is_dataclass(arguments) else vars(arguments)
    return {key: value for key, value in values.items() if value is not None}


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


def _recipe(folder: Path) -> Any:
    rows = [
        {"prompt": " ".join(WORDS[i : i + 4]), "chosen": WORDS[i + 5], "rejected": " ".join(WORDS[i + 6 : i + 8])}
        for i in range(8)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_config(
        None,
        {
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"path": str(folder / "pairs.jsonl"), "eval_fraction": 0.0},
            "lora": {"rank": 2},
            "train": {"batch_size": 2, "gradient_accumulation": 1, "steps": 2, "eval_every": 0},
            "out": str(folder / "run"),
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Train each, print what became of it, and the counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.train_all", description=__doc__)
    parser.add_argument("file", type=Path, help="tests/test_models.py of mlx-lm's repository")
    parser.add_argument("kinds", nargs="*", help="model types; all where none is given")
    given = parser.parse_args(arguments)
    counts: Counter[str] = Counter()

    def say(one: Outcome) -> None:
        """Count and print one."""
        counts[one.verdict] += 1
        print(f"{one.kind}: {one.verdict}{f' ({one.note})' if one.note else ''}", flush=True)

    try_all(given.file, say, given.kinds)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return int(counts["TRACEBACK"] > 0)


if __name__ == "__main__":
    sys.exit(main())
