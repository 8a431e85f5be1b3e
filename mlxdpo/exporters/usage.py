"""How each target is loaded, as the model card says it, and how its client answered."""

from __future__ import annotations

from mlxdpo.exporters.record import Exported, Target

REPO = "USER/REPO"  # in the commands of a card that is not meant for a known repository


def code_block(language: str, text: str) -> str:
    """A fenced block of Markdown."""
    return f"```{language}\n{text}\n```"


def _subfolder(target: Target) -> str:
    return "" if target.folder == "." else f', subfolder="{target.folder}"'


def _mlx(record: Exported, target: Target) -> str:
    at = "." if target.folder == "." else target.folder
    adapter = "adapters.safetensors" in target.files
    model = f"{record.base_model} --adapter-path here/{at}" if adapter else f"here/{at}"
    return code_block("sh", f"hf download {REPO} --local-dir here\nmlx_lm.generate --model {model} --prompt '...'")


def _peft(record: Exported, target: Target) -> str:
    return code_block(
        "python",
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{record.base_model}")\n'
        f'model = PeftModel.from_pretrained(base, "{REPO}"{_subfolder(target)})',
    )


def _hf(record: Exported, target: Target) -> str:
    load = f'"{REPO}"{_subfolder(target)}'
    return code_block(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({load})\ntokenizer = AutoTokenizer.from_pretrained({load})",
    )


def _gguf(record: Exported, target: Target) -> str:
    return code_block("sh", f"llama-cli -hf {REPO}")


def _gguf_lora(record: Exported, target: Target) -> str:
    file = f"here/{target.folder}/adapter.gguf"
    return code_block("sh", f"hf download {REPO} --local-dir here\nllama-cli -m BASE.gguf --lora {file}")


def _ollama(record: Exported, target: Target) -> str:
    create = f"ollama create {record.run.lower()} -f here/{target.folder}/Modelfile"
    return code_block("sh", f"hf download {REPO} --local-dir here\n{create}\nollama run {record.run.lower()}")


def _lmstudio(record: Exported, target: Target) -> str:
    here = f"here/{target.folder}"
    copy = f"cp -R {here}/*/ ~/.lmstudio/models/\ncp {here}/*.preset.json ~/.lmstudio/config-presets/"
    return code_block("sh", f"hf download {REPO} --local-dir here\n{copy}")


def _server(record: Exported, target: Target) -> str:
    return _mlx(record, target).replace("mlx_lm.generate", "mlx_lm.server").replace(" --prompt '...'", "")


def _packed_base(record: Exported, target: Target) -> str:
    at = f"here/{target.folder}"
    run = f"mlx_lm.generate --model {at} --adapter-path {at}/adapter --prompt '...'"
    return code_block("sh", f"hf download {REPO} --local-dir here\n{run}")


USAGE = {
    "mlx": _mlx,
    "fused": _mlx,
    "quantized": _mlx,
    "packed-base": _packed_base,
    "peft": _peft,
    "hf": _hf,
    "gguf": _gguf,
    "gguf-lora": _gguf_lora,
    "ollama": _ollama,
    "lmstudio": _lmstudio,
    "server": _server,
}


def client_words(target: Target) -> str:
    """How the target's client answered, or that it was not asked."""
    if target.asked is None:
        return "not asked"
    worst = target.asked["worst_logp"]
    apart = "" if worst is None else f", log-probs within {worst:.1g}"
    return f"{target.asked['client']}: {target.asked['equal']} of {target.asked['prompts']}{apart}"
