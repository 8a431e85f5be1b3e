"""The tokenizer in a GGUF file: byte-level BPE under the name of the splitting rule that llama.cpp knows it by.

llama.cpp reads the rule's *name*, not the rule. A wrong name gives other token ids for the same text and looks like a
model that got worse, so the rule in `tokenizer.json` must be one of those written out here, to the letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdpo.io.json_file import read_json
from mlxdpo.types import UserError

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# llama.cpp's name -> (the splits before bytes are mapped, whether GPT-2's own rule follows)
RULES: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((), True),
    "smollm": (("digits",), True),
    "qwen2": ((CONTRACTIONS + "|\\p{N}" + REST,), False),
    "llama-bpe": ((CONTRACTIONS + "|\\p{N}{1,3}" + REST,), False),
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def rule_name(specification: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the rule in a parsed `tokenizer.json`, None when it is not one of those known here."""
    outer = specification.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    if specification["model"]["type"] != "BPE" or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    if steps[-1].get("add_prefix_space"):
        return None
    found = (tuple(_split_step(step) for step in steps[:-1]), steps[-1].get("use_regex", True))
    return next((name for name, rule in RULES.items() if rule == found), None)


def _split_step(step: Mapping[str, Any]) -> str:
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", "")
    return f"unknown {step['type']}"


def refuse_tokenizer(folder: Path, name: str) -> None:
    """Raise `UserError` for a tokenizer that cannot be written so that llama.cpp splits text as it does."""
    file = folder / "tokenizer.json"
    if not file.exists() or rule_name(read_json(file)) is None:
        raise UserError(
            f"gguf: the tokenizer of {name} splits text by a rule without a name in this converter (known: "
            f"{', '.join(RULES)}); export --to hf and use llama.cpp's convert_hf_to_gguf.py"
        )


def write_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Vocabulary, merges, rule, special tokens and chat template of a Hugging Face folder into a GGUF writer."""
    from transformers import AutoTokenizer

    specification = read_json(folder / "tokenizer.json")
    tokens, kinds = vocabulary(specification, config["vocab_size"])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_name(specification))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = specification["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for end, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        if (token := getattr(tokenizer, f"{end}_token_id")) is not None:
            add(token)
    ends = config.get("eos_token_id")
    others = [token for token in (ends if isinstance(ends, list) else [ends]) if token is not None]
    if others and (turn := next((t for t in others if t != tokenizer.eos_token_id), None)) is not None:
        writer.add_eot_token_id(turn)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary(specification: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(`size` tokens by id, their types). Ids that no token has, where the embedding is wider, are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for text, i in specification["model"]["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL
    for added in specification.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds
