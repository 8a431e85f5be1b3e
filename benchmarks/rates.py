"""Is `optim.lr: auto` as good as the best rate of a grid? Six planted tasks, nine rates, three seeds.

    python -m benchmarks.rates --out runs/rates
    python -m benchmarks.rates --out runs/rates --model tiny
    python -m benchmarks.rates --out runs/rates --page docs/evidence/learning-rate.md

A cell is a run of `mlxdpo train`'s own code on 120 short pairs (`benchmarks.planted_tasks`), one pass in 30 steps, with
adapters in the last 8 blocks of SmolLM2. It is measured on 48 pairs and prompts that no training saw: the share of
pairs ranked rightly by implicit reward, and how often a judge that knows the planted rule prefers the tuned model's
answer over the untuned one's (a tie is a half).
A line for each cell goes to OUT/cells.jsonl; stopped at any time, the same command goes on. `tiny` is a llama of four
small layers that is first taught to write both kinds of answers.
"""

from __future__ import annotations

import mlxdpo  # isort: skip  # noqa: F401  (before mlx: it puts the fast BLAS in front)

import argparse
import gc
import itertools
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from benchmarks.objectives import into_page
from benchmarks.planted_tasks import TASKS, drawn_pairs, planted
from mlxdpo import Preference, Run, encode_pairs, load_config, open_trained_run
from mlxdpo.data.read import read_pairs
from mlxdpo.inference.trained_run import TrainedRun, model_logps
from mlxdpo.io.atomic import append_line, write_text
from mlxdpo.io.json_file import read_lines
from mlxdpo.io.words import counted
from mlxdpo.model.adapters import adapters_off
from mlxdpo.model.builtin import smollm2_folder
from mlxdpo.model.policy import Policy
from mlxdpo.training.run import train
from mlxdpo_eval.results import write_lines
from mlxdpo_eval.sampling import Sampling, sample_answers

AUTO = "auto"
EARLY, REST = ("auto", "2e-5", "1e-4", "5e-4", "1e-3", "2e-3"), ("1e-5", "5e-5", "2e-4", "5e-3")
HELDOUT, TOKENS, SEEDS = 48, 12, 3
LAYERS = {"smollm2": 8, "tiny": -1}  # blocks with adapters: gradients of all of SmolLM2 would double the time
SMALL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 192, "num_hidden_layers": 4,
    "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
TOKENIZER_FILES, END = ("tokenizer.json", "tokenizer_config.json"), "<|end|>"
TALK = 250  # pairs of each task whose answers, right and wrong, the small llama is taught


class Cell(NamedTuple):
    """One run of the grid."""

    model: str
    task: str
    rate: str
    seed: int
    pairs: int


def cells(model: str, tasks: Sequence[str], rates: Sequence[str], seeds: int, pairs: int) -> Iterator[Cell]:
    """All cells, so ordered that a table is soon of use: one seed of every task at the early rates first."""
    for seed in range(seeds):
        for block in (EARLY, REST):
            for rate in (rate for rate in block if rate in rates):
                yield from (Cell(model, task, rate, seed, pairs) for task in tasks)


def recipe(cell: Cell, weights: str, out: Path) -> dict[str, Any]:
    """The settings of a cell's run: mlxdpo's defaults, but for what makes a run short."""
    optim = {} if cell.rate == AUTO else {"lr": float(cell.rate)}
    train = {"epochs": 1.0, "batch_size": 4, "gradient_accumulation": 1, "save_every": 10_000, "seed": cell.seed}
    data = {"path": str(out / "data" / f"{cell.task}.jsonl"), "eval_fraction": 0.0, "template": "plain"}
    folder = out / "runs" / "-".join(map(str, cell))
    lora = {"layers": LAYERS[cell.model]}
    return {"model": weights, "data": data, "lora": lora, "optim": optim, "train": train, "out": str(folder)}


def run_cell(cell: Cell, weights: str, out: Path) -> dict[str, Any]:
    """Train and measure: the line of a cell. The run directory is deleted, its figures are kept."""
    training, heldout = planted(cell.task, cell.pairs, HELDOUT)
    write_lines(out / "data" / f"{cell.task}.jsonl", training)
    write_lines(out / "data" / f"{cell.task}-heldout.jsonl", heldout)
    config = load_config(None, recipe(cell, weights, out))
    assert config.out is not None
    shutil.rmtree(config.out, ignore_errors=True)  # an unfinished one
    started, probing, steps = time.perf_counter(), 0.0, 0.0
    then, policy = started, None
    for event in train(config):
        if event.kind == "start":
            policy = event.values["policy"]
        now = time.perf_counter()
        probing, steps = probing + (now - then) * (event.kind == "probe"), steps + (now - then) * (event.kind == "step")
        then = now
    assert policy is not None  # every run begins with a "start"
    opened = as_it_stands(config.out, policy)
    found = {**cell._asdict(), "lr": opened.config.optim.lr, "probe_share": probing / (probing + steps)}
    found |= {"reason": opened.run.manifest().get("rate", {}).get("reason")}
    found |= measure(opened, cell, out)
    shutil.rmtree(config.out)
    return found | {"seconds": time.perf_counter() - started}


def as_it_stands(folder: str | Path, policy: Policy) -> TrainedRun:
    """A run with the policy that has just been trained in it: loading it again takes seconds."""
    run, start = Run.open(folder), partial(adapters_off, policy.model)
    return TrainedRun(run, run.config(), policy, start, start)


def ranked_rightly(apart: np.ndarray) -> float:
    """Share of pairs whose chosen answer has the higher implicit reward, by differences (N,); a tie is a half."""
    return float(((apart > 0) + 0.5 * (apart == 0)).mean())


def keep(file: Path, line: dict[str, Any]) -> None:
    """Append a finished run's line, print it, and free what the run held."""
    append_line(file, line)
    print(json.dumps(line), flush=True)
    gc.collect()
    mx.clear_cache()


def measure(opened: TrainedRun, cell: Cell, out: Path) -> dict[str, float]:
    """Accuracy, win rate and distance of a tuned model; the untuned one's answers are kept for next cells."""
    rows, _ = read_pairs(opened.config.data, str(out / "data" / f"{cell.task}-heldout.jsonl"))
    rows, examples, _ = encode_pairs(opened, rows)
    before = _untuned(opened, rows, out / f"untuned-{cell.model}-{cell.task}.json")
    after = _scored_and_answered(opened, opened.policy.model, rows)
    moved = np.array(after["logps"]) - np.array(before["logps"])  # (2, N), nats
    lengths = np.array([example.scored for example in examples], float).T
    apart, judge = moved[0] - moved[1], TASKS[cell.task].judge
    scores = [
        (judge(str(row.prompt), old), judge(str(row.prompt), new))
        for row, old, new in zip(rows, before["answers"], after["answers"], strict=True)
    ]
    return {
        "accuracy": ranked_rightly(apart),
        "win_rate": float(np.mean([(new > old) + 0.5 * (new == old) for old, new in scores])),
        "rewards_apart": float(opened.config.loss.beta * np.sqrt(np.mean(apart**2))),
        "nats_a_token": float(np.sqrt(np.mean((moved / lengths) ** 2))),
    }


def _untuned(opened: TrainedRun, rows: Sequence[Preference], file: Path) -> dict[str, Any]:
    if not file.exists():
        with opened.start() as model:
            write_text(file, json.dumps(_scored_and_answered(opened, model, rows)))
    return json.loads(file.read_text("utf-8"))


def _scored_and_answered(opened: TrainedRun, model: Any, rows: Sequence[Preference]) -> dict[str, Any]:
    """Log-probs (2, N) of held-out pairs, nats, and one sampled answer to each prompt."""
    _, examples, _ = encode_pairs(opened, rows)
    drawn = sample_answers(opened, model, rows, 1, Sampling(HELDOUT, 1, TOKENS))
    return {"logps": model_logps(model, examples, "none", 16).tolist(), "answers": drawn.texts}


def teach_small_llama(folder: Path, vocabulary: int | None = None) -> str:
    """A small llama that writes answers of all tasks, right and wrong alike.

    It reads SmolLM2's tokens, or a `vocabulary` of its own: so many, learnt from the tasks, make it ten times faster.
    """
    if (folder / "taught").exists():
        return str(folder / "taught")
    shutil.rmtree(folder, ignore_errors=True)
    bare = folder / "bare"
    rows = [row for name in TASKS for row in itertools.islice(drawn_pairs(name, random.Random(1)), TALK)]
    rows += [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    folder.mkdir(parents=True)
    write_lines(folder / "talk.jsonl", rows)
    write_small_llama(bare, [row["prompt"] + row["chosen"] for row in rows], vocabulary)
    data = {"path": str(folder / "talk.jsonl"), "eval_fraction": 0.0, "template": "plain"}
    size = {"epochs": 2.0, "batch_size": 16, "gradient_accumulation": 1, "save_every": 10_000}
    rest = {"lora": {"method": "full"}, "optim": {"lr": 2e-3}, "train": size, "out": str(folder / "run")}
    taught = load_config(None, {"stage": "sft", "model": str(bare), "data": data} | rest)
    for _ in train(taught):
        pass
    opened = open_trained_run(Run.open(folder / "run"))
    (folder / "taught.part").mkdir()
    for name in (*TOKENIZER_FILES, "config.json"):
        shutil.copy(bare / name, folder / "taught.part" / name)
    tuned = dict(tree_flatten(opened.policy.model.parameters()))
    mx.save_safetensors(str(folder / "taught.part" / "model.safetensors"), tuned, {"format": "pt"})
    (folder / "taught.part").rename(folder / "taught")
    return str(folder / "taught")


def write_small_llama(bare: Path, texts: Sequence[str], vocabulary: int | None = None) -> str:
    """A small llama of random weights; it reads SmolLM2's tokens, or so many that are learnt from `texts`."""
    bare.mkdir(parents=True)
    if vocabulary is None:
        source = smollm2_folder()
        for name in TOKENIZER_FILES:
            shutil.copy(source / name, bare / name)
        ids = json.loads((source / "config.json").read_text())
    else:
        ids = _write_tokenizer(bare, texts, vocabulary)
    config = SMALL | {name: ids[name] for name in ("vocab_size", "bos_token_id", "eos_token_id") if name in ids}
    (bare / "config.json").write_text(json.dumps(config))
    made, arguments = _get_classes(config)
    mx.random.seed(0)
    model = made(arguments.from_dict(config))
    arrays = [
        (name, 0.04 * mx.random.normal(a.shape) if a.ndim > 1 else a) for name, a in tree_flatten(model.parameters())
    ]
    mx.save_safetensors(str(bare / "model.safetensors"), dict(arrays), {"format": "pt"})
    return str(bare)


def _write_tokenizer(folder: Path, texts: Sequence[str], vocabulary: int) -> dict[str, int]:
    """A byte-level BPE of these texts; its entries of the model's config."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocabulary, special_tokens=[END])
    PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, eos_token=END).save_pretrained(folder)
    return {"vocab_size": learnt.get_vocab_size(), "eos_token_id": learnt.token_to_id(END)}


def table(found: Sequence[dict[str, Any]]) -> str:
    """For each model accuracy and win rate of every rate and task, and what `auto` loses to the best rate."""
    text = []
    for model in dict.fromkeys(line["model"] for line in found):
        own = [line for line in found if line["model"] == model]
        tasks = [name for name in TASKS if any(line["task"] == name for line in own)]
        rates = sorted({line["rate"] for line in own} - {AUTO}, key=float)
        seeds = max(line["seed"] for line in own) + 1
        text.append(
            f"\n**{model}**, {own[0]['pairs']} pairs, up to {counted(seeds, 'seed')}; "
            "held-out accuracy / judged win rate, %:\n"
        )
        text.append(f"| rate | {' | '.join(tasks)} | mean | rewards differ by | nats a token |")
        text.append("|---" * (len(tasks) + 4) + "|")
        for rate in [*rates, AUTO]:
            lines = [line for line in own if line["rate"] == rate]
            values = [_percent(mean_of(lines, task, "accuracy"), mean_of(lines, task, "win_rate")) for task in tasks]
            means = [float(np.mean([v for t in tasks if (v := mean_of(lines, t, name)) is not None] or [np.nan]))
                     for name in ("accuracy", "win_rate")]  # fmt: skip
            far = [
                float(np.mean([line[name] for line in lines] or [np.nan])) for name in ("rewards_apart", "nats_a_token")
            ]
            text.append(f"| {rate} | {' | '.join(values)} | {_percent(*means)} | {far[0]:.2f} | {far[1]:.3f} |")
        text += ["", *auto_sentences(own, tasks, rates)]
    return "\n".join(text) + "\n"


def mean_of(lines: Sequence[dict[str, Any]], task: str, name: str) -> float | None:
    """Mean over the seeds of a task, None where nothing is measured."""
    values = [line[name] for line in lines if line["task"] == task]
    return float(np.mean(values)) if values else None


def auto_sentences(own: Sequence[dict[str, Any]], tasks: Sequence[str], rates: Sequence[str]) -> list[str]:
    """By how many points `auto` is behind the best rate, and what it chose."""
    auto = [line for line in own if line["rate"] == AUTO]
    if not auto or not rates:
        return []
    said = []
    for name, words in (("accuracy", "held-out accuracy"), ("win_rate", "judged win rate")):
        behind: dict[str, float] = {}
        for task in tasks:
            # The seeds that both have: a table of a grid under way compares equal things.
            own_best = [_paired(own, task, rate, name) for rate in rates]
            known = [gap for gap in own_best if gap is not None]
            if known:
                behind[task] = 100 * max(known)
        if not behind:
            continue
        worst = max(behind, key=lambda task: behind[task])
        overall = {
            rate: [gap for task in tasks if (gap := _paired(own, task, rate, name)) is not None] for rate in rates
        }
        best = max((rate for rate in rates if len(overall[rate]) == len(behind)), default=None,
                   key=lambda rate: float(np.mean(overall[rate])))  # fmt: skip
        single = "" if best is None else (
            f"; behind {best}, the best single rate for all tasks, {100 * float(np.mean(overall[best])):+.1f}"
        )  # fmt: skip
        said.append(
            f"- {words}: `auto` is behind the best rate of each task by {np.mean(list(behind.values())):+.1f} points "
            f"on average, at worst {behind[worst]:+.1f} ({worst}){single}"
        )
    chosen = sorted(line["lr"] for line in auto)
    probed = [line["probe_share"] for line in auto]
    said.append(
        f"- `auto` chose {chosen[0]:.2g} to {chosen[-1]:.2g}; probes took {100 * float(np.mean(probed)):.0f} % of the "
        f"time of probes and steps together, at most {100 * max(probed):.0f} %"
    )
    return said


def _paired(own: Sequence[dict[str, Any]], task: str, rate: str, name: str) -> float | None:
    """By how much a rate leads `auto` on the seeds that both have."""
    of = lambda wanted: {  # noqa: E731
        line["seed"]: line[name] for line in own if line["task"] == task and line["rate"] == wanted
    }
    here, auto = of(rate), of(AUTO)
    both = here.keys() & auto.keys()
    return float(np.mean([here[seed] - auto[seed] for seed in both])) if both else None


def _percent(*values: float | None) -> str:
    return " / ".join("-" if value is None or np.isnan(value) else f"{100 * value:.0f}" for value in values)


def main() -> None:
    """Run the cells that are missing, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/rates"))
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rates", default=",".join((*EARLY, *REST)))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--pairs", type=int, default=120, help="training pairs of a cell")
    parser.add_argument("--page", type=Path, help="put the table of what is measured so far into this page instead")
    options = parser.parse_args()
    file = options.out / "cells.jsonl"
    if options.page is not None:
        into_page(options.page, table(list(read_lines(file))))
        return
    tasks, rates = options.tasks.split(","), options.rates.split(",")
    if unknown := [*(set(tasks) - set(TASKS)), *(set(rates) - {*EARLY, *REST})]:
        parser.error(f"unknown: {', '.join(unknown)}; tasks: {', '.join(TASKS)}; rates: {', '.join((*EARLY, *REST))}")
    weights = "smollm2" if options.model == "smollm2" else teach_small_llama(options.out / "small-llama")
    done = {tuple(line[name] for name in Cell._fields) for line in (read_lines(file) if file.exists() else ())}
    for cell in cells(options.model, tasks, rates, options.seeds, options.pairs):
        if cell not in done:
            keep(file, run_cell(cell, weights, options.out))


if __name__ == "__main__":
    main()
