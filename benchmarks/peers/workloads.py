"""What is measured: the shapes of well-known preference sets, made of real text, and one epoch of a real file.

Lengths decide what a step costs and what it needs; the words hardly matter, but they are real ones, because random
token ids make losses that no trainer would meet.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Pair = dict[str, list[int]]


class Workload(NamedTuple):
    """A shape: `prompts` prompts with `completions` ranked completions each, every pair of them in one step.

    `sides` are the ones measured by default, as `side` or `side:switch+switch`.
    """

    name: str
    what: str
    prompts: int
    completions: int
    prompt_tokens: int
    completion_tokens: int
    sides: tuple[str, ...]


class Plan(NamedTuple):
    """Pairs and the steps each side takes over them: lists of indices; `same` says all sides take the same steps."""

    pairs: list[Pair]
    steps: dict[str, list[list[int]]]
    batch_size: int
    same: bool

    @property
    def scored(self) -> int:
        """The most tokens that a pair's loss is a sum over: those of its two completions."""
        return max(len(pair["chosen"]) + len(pair["rejected"]) for pair in self.pairs)


BETA = 0.1
TRAINERS = ("mlxdpo", "mlx-lm-lora", "soup-cli", "trl")
ON_A_MAC = ("trl:mps",) if sys.platform == "darwin" else ()
PEERS = (*TRAINERS, *ON_A_MAC)
CHECKPOINTED = tuple(f"{side}{'+' if ':' in side else ':'}checkpoint" for side in PEERS)
TRAINED = (*PEERS, *CHECKPOINTED)
PARTS = tuple(f"mlxdpo:{part}" for part in ("plain", "chunked-head", "mlx-attention", "mlx-swiglu", "no-lanes"))

WORKLOADS = {
    w.name: w
    for w in (
        Workload("hh", "HH-RLHF-shaped", 2, 2, 256, 128, PEERS + CHECKPOINTED + PARTS),
        Workload("tldr", "TL;DR-shaped", 2, 2, 384, 48, PEERS + CHECKPOINTED + PARTS),
        Workload("ultrafeedback", "UltraFeedback-shaped", 2, 2, 192, 320, PEERS + CHECKPOINTED + PARTS),
        Workload(
            "ranked",
            "UltraFeedback, four ranked completions",
            1,
            4,
            192,
            320,
            (*PEERS, *CHECKPOINTED, *PARTS, "mlxdpo:ungrouped"),
        ),
        # Without checkpointing mlx-lm-lora keeps every attention square: tens of gigabytes.
        Workload("long", "one long pair", 1, 2, 1024, 3072, (*CHECKPOINTED, "mlxdpo:checkpoint+mlx-attention")),
    )
}
EPOCH = Workload("epoch", "one epoch of a file", 0, 0, 0, 0, (*PEERS, "mlxdpo:no-packing", "mlxdpo:plain"))
EPOCH_BATCH = 4  # pairs


def describe(workload: Workload, scale: float) -> str:
    """The shape in one line."""
    pairs = workload.prompts * workload.completions * (workload.completions - 1) // 2
    prompt, completion = scaled(workload, scale)
    count = f"{pairs} pair{'s' * (pairs > 1)} of {workload.prompts} prompt{'s' * (workload.prompts > 1)}"
    return f"{count}, {prompt} + {completion} tokens"


def scaled(workload: Workload, scale: float) -> tuple[int, int]:
    """Tokens of prompt and completion, at least 8 each."""
    return max(8, round(workload.prompt_tokens * scale)), max(8, round(workload.completion_tokens * scale))


def real_text(tokenizer: Any) -> list[int]:
    """Token ids of the demo's texts, one after the other."""
    folder = Path(__file__).parents[2] / "mlxdpo" / "demo"
    with (folder / "pairs.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = (f"{row['prompt']}{row[name]}\n\n" for row in rows for name in ("chosen", "rejected"))
    return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False)]


def shape_plan(workload: Workload, text: list[int], scale: float, steps: int) -> Plan:
    """The same batch for `steps` steps: all pairs of each prompt, the better completion first."""
    prompt_tokens, completion_tokens = scaled(workload, scale)
    source = itertools.cycle(text)
    take = lambda count: list(itertools.islice(source, count))  # noqa: E731
    pairs: list[Pair] = []
    for _ in range(workload.prompts):
        prompt = take(prompt_tokens)
        completions = [take(completion_tokens) for _ in range(workload.completions)]
        pairs += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in itertools.combinations(completions, 2)]
    everything = [list(range(len(pairs)))] * steps
    return Plan(pairs, dict.fromkeys((*TRAINERS, "exact"), everything), len(pairs), True)


def epoch_plan(file: Path, folder: Path, share: float, max_length: int) -> Plan:
    """One epoch of a file, or the first `share` of our steps and for the peers the same pairs in their own order.

    Ours keeps a prompt's pairs together. mlx-lm-lora sorts by length, cuts and shuffles the batches (each once here:
    its own sampling repeats some and never meets others). TRL and soup-cli shuffle the pairs and cut; soup-cli
    drops the last batch where it is short.
    """
    from mlxdpo.config import DataConfig
    from mlxdpo.data.dataset import encode_split, read_split
    from mlxdpo.data.planning import outline, plan_epoch
    from mlxdpo.model.policy import load_tokenizer

    data = DataConfig(path=str(file), eval_fraction=0, on_bad_row="skip", max_length=max_length)
    tokenizer = load_tokenizer(folder, str(folder))
    examples = encode_split(read_split(data, 0), data, tokenizer, frozenset(tokenizer.eos_token_ids)).train
    pairs = [{k: np.asarray(getattr(e, k)).tolist() for k in ("prompt", "chosen", "rejected")} for e in examples]
    windows = plan_epoch(outline(examples, data.group), EPOCH_BATCH, 1, 0, 0).windows
    ours = [[i for batch in window for i in batch] for window in windows[: max(1, round(share * len(windows)))]]
    seen = sorted(i for step in ours for i in step)
    shuffled = _shuffled_batches(seen)
    steps = {"mlxdpo": ours, "mlx-lm-lora": _sorted_batches(pairs, seen), "trl": shuffled, "exact": ours}
    steps["soup-cli"] = [batch for batch in shuffled if len(batch) == EPOCH_BATCH] or shuffled
    return Plan(pairs, steps, EPOCH_BATCH, False)


def _sorted_batches(pairs: list[Pair], seen: list[int]) -> list[list[int]]:
    ranked = sorted(seen, key=lambda i: len(pairs[i]["prompt"]) + len(pairs[i]["chosen"]))
    batches = list(_cut(ranked))
    return [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]


def _shuffled_batches(seen: list[int]) -> list[list[int]]:
    """The short batch, if any, comes last, as a data loader gives it."""
    return list(_cut(np.random.default_rng(0).permutation(seen).tolist()))


def _cut(indices: list[int]) -> Iterator[list[int]]:
    return (indices[i : i + EPOCH_BATCH] for i in range(0, len(indices), EPOCH_BATCH))
