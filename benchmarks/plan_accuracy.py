"""How far `mlxdpo plan` is from the truth: two steps of real training each, in a fresh process, peak against forecast.

    python benchmarks/plan_accuracy.py            every configuration
    python benchmarks/plan_accuracy.py qwen3      those whose name contains the word

Small batches, so that weights do not hide activations. Prints predicted and measured GB, their ratio, the forecast of
each phase and the peak before each event. On a CPU smollm2 qlora takes minutes: quantised matmuls bypass the BLAS.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlxdpo  # noqa: F401  (before mlx.core: it preloads a fast BLAS)

TESTS = Path(__file__).parents[1] / "tests" / "support"
METHODS = {
    "lora": {},
    "lora checkpointed": {"train": {"gradient_checkpointing": True}},
    "qlora": {"model": {"quantize": 4}},
    "full": {"lora": {"method": "full"}},
    "full checkpointed": {"lora": {"method": "full"}, "train": {"gradient_checkpointing": True}},
}
QWEN = {
    "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
}  # fmt: skip


def write_pairs(file: Path, count: int, prompt: int, completion: int) -> None:
    """Pairs of words, completions of unequal length."""
    words = ["red", "blue", "the", "user", "string"]
    lines = []
    for i in range(count):
        say = lambda n, shift=i: " ".join(words[(j * 7 + shift) % 5] for j in range(n))  # noqa: E731
        row = {
            "prompt": f"{say(prompt)} {i}",
            "chosen": say(completion),
            "rejected": say(completion - i % 2 * 9) + " no",
        }
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines) + "\n")


def write_qwen(folder: Path) -> None:
    """A random model whose vocabulary is larger than its tokenizer's."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from tiny_models import CONFIGS, tiny_model
    from tiny_tokenizers import chatml_tokenizer

    folder.mkdir()
    tokenizer = chatml_tokenizer()
    model = tiny_model("qwen3", QWEN["vocab_size"], **{k: v for k, v in QWEN.items() if k != "vocab_size"})
    config = CONFIGS["qwen3"] | QWEN | {"eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"})
    tokenizer.save_pretrained(folder)


def measure(config: dict) -> dict:
    """Forecast and then train two steps, in this process."""
    import mlx.core as mx

    from mlxdpo.config import load_config
    from mlxdpo.estimate.forecast import forecast
    from mlxdpo.training.run import train

    recipe = load_config(None, config)
    memory = forecast(recipe).memory
    peaks: dict[str, int] = {}
    mx.clear_cache()
    mx.reset_peak_memory()
    for event in train(recipe):
        peaks[f"{event.kind} {event.step}"] = mx.get_peak_memory()
        mx.reset_peak_memory()
    return {"predicted": memory.peak, "measured": max(peaks.values()), "phases": memory.phases, "peaks": peaks}


def main() -> None:
    """Every configuration whose name contains the word given."""
    word = " ".join(sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl", 4, 60, 40)
        write_qwen(folder / "qwen3")
        for model in ("smollm2", str(folder / "qwen3")):
            for method, sections in METHODS.items():
                title = f"{Path(model).name} {method}"
                if word in title:
                    report(title, run(folder, model, sections, title))


def run(folder: Path, model: str, sections: dict, title: str) -> dict:
    """A configuration in a fresh process."""
    base = {
        "model": {"path": model},
        "data": {"path": str(folder / "pairs.jsonl"), "eval_fraction": 0.0, "template": "plain"},
        "train": {"batch_size": 2, "gradient_accumulation": 1, "steps": 2},
    }
    config = {name: base.get(name, {}) | sections.get(name, {}) for name in base.keys() | sections.keys()}
    config["out"] = str(folder / title.replace(" ", "-"))
    command = [sys.executable, __file__, "--measure", json.dumps(config)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(title: str, result: dict) -> None:
    """One line."""
    phases = {name: round(size / 1e9, 3) for name, size in result["phases"].items()}
    ratio = result["predicted"] / result["measured"]
    print(f"{title:28} {result['predicted'] / 1e9:.3f} {result['measured'] / 1e9:.3f} GB  {ratio:.2f}", flush=True)
    print("    phases", phases)
    print("    peaks after", {name: round(size / 1e9, 3) for name, size in result["peaks"].items()}, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(json.loads(sys.argv[2]))))
    else:
        sys.path.insert(0, str(TESTS))
        main()
