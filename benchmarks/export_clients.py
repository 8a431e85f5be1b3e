"""Every export target of six models, and what its own client answers: the table of docs/evidence/clients.md.

    python -m benchmarks.export_clients [MODEL ...] [--targets gguf,server] [--prompts 20] [--rows FILE]

Rows are added to FILE as they come; one that stands there is not measured again, so that a stopped run goes on. The
tiny models are made by transformers (random weights, a few DPO steps) with SmolLM2's own tokenizer and template;
`smollm2` is the real one. It runs where torch, transformers, PEFT, gguf and xllamacpp are installed; a client that is
missing is "not asked". Prints one row a target.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mlxdpo import train
from mlxdpo.config import Config
from mlxdpo.exporters import Target, export
from mlxdpo.exporters.source import Choices
from mlxdpo.model.builtin import smollm2_folder
from mlxdpo.runs import Run
from mlxdpo.types import UserError

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16, "num_hidden_layers": 6}),
    "mistral": ("MistralConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"norm_topk_prob": True}),
    "smollm2": (None, {}),
}
TARGETS = (
    "mlx",
    "server",
    "fused",
    "peft",
    "hf",
    "gguf",
    "gguf-lora",
    "ollama",
    "lmstudio",
    "quantized",
    "packed-base",
)
PACKED = ("quantized", "packed-base")
TOPICS = ("rivers", "bread", "chess", "the moon", "bicycles", "tea", "maps", "rain")


def make_model(name: str, folder: Path) -> str:
    """A tiny model as transformers saves it, with SmolLM2's tokenizer; the built-in one by its name."""
    import torch
    import transformers

    kind, changes = MODELS[name]
    if kind is None:
        return name
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder())
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SHAPE | changes | ids | {"vocab_size": len(tokenizer)})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pairs(count: int, start: int) -> str:
    """Chat pairs as JSON lines: short answers against long ones."""
    rows = []
    for i in range(start, start + count):
        prompt = f"Tell me something about {TOPICS[i % len(TOPICS)]}, number {i}."
        rows.append(
            {"prompt": prompt, "chosen": f"Yes, {i}: it is short.", "rejected": f"No. Well, {i} is a long story"}
        )
    return "".join(json.dumps(row) + "\n" for row in rows)


def trained(name: str, folder: Path, prompts: int) -> Run:
    """A run of a few DPO steps, with as many held-out prompts as are asked."""
    (folder / "pairs.jsonl").write_text(pairs(32, 0))
    (folder / "heldout.jsonl").write_text(pairs(prompts, 1000))
    config = Config.model_validate(
        {
            "model": {"path": make_model(name, folder / name), "dtype": "float32"},
            "data": {"path": str(folder / "pairs.jsonl"), "eval": str(folder / "heldout.jsonl")},
            "lora": {"rank": 4, "scale": 4.0},
            "optim": {"lr": 1e-3 if name == "smollm2" else 1e-2, "warmup": 0.0},
            "train": {"batch_size": 4, "gradient_accumulation": 1, "epochs": 1.0},
            "out": str(folder / "run"),
        }
    )
    for _ in train(config):
        pass
    return Run.open(folder / "run")


def rows_of(name: str, targets: list[str], prompts: int) -> Iterator[str]:
    """A row of the table for each target of a model, as it comes."""
    with tempfile.TemporaryDirectory(prefix="clients-") as made:
        folder, choices = Path(made), Choices(bits=8, group_size=32)
        run = trained(name, folder, prompts)
        for target in targets:
            try:
                found = export(run, [target], folder / target, pairs=0, ask=prompts, choices=choices, force=True)
            except UserError as error:
                yield f"| {name} | `{label_of(target)}` | | | | | no form: {error} |"
                continue
            yield row_of(name, target, found.targets[target])
            shutil.rmtree(folder / target)


def label_of(target: str) -> str:
    """How the table calls a target."""
    return f"{target}, 8 bits" if target in PACKED else target


def row_of(name: str, target: str, found: Target) -> str:
    """One target: client, greedy answers, worst log-prob difference, slope, verdict."""
    slope = "none" if found.fidelity.slope is None else f"{found.fidelity.slope:.4f}"
    told = ("not asked", "", "")
    if found.asked is not None:
        worst = "none" if found.asked["worst_logp"] is None else f"{found.asked['worst_logp']:.1e}"
        told = (found.asked["client"], f"{found.asked['equal']} of {found.asked['prompts']}", worst)
    verdict = "passed" if found.fidelity.passed else f"refused: {found.fidelity.reason}"
    return f"| {name} | `{label_of(target)}` | " + " | ".join([*told, slope, verdict]) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--rows", type=Path, default=Path(os.devnull))
    asked = parser.parse_args()
    before = asked.rows.read_text("utf-8").splitlines() if asked.rows.exists() else []
    print("| model | target | client | greedy answers equal | worst log-prob difference, nats | margin slope | gate |")
    print("|---|---|---|---|---|---|---|")
    for name in asked.models or list(MODELS):
        told = [row for row in before if row.startswith(f"| {name} |")]
        left = [one for one in asked.targets.split(",") if not any(f"`{label_of(one)}`" in row for row in told)]
        if told:
            print("\n".join(told))
        for row in rows_of(name, left, asked.prompts) if left else ():
            print(row, flush=True)
            with asked.rows.open("a", encoding="utf-8") as file:
                file.write(f"{row}\n")


if __name__ == "__main__":
    main()
