"""A tokenizer as llama.cpp has it: byte-level pairs under the name of a splitting rule, or SentencePiece's scores.

llama.cpp reads the *name* of a byte-level tokenizer's splitting rule, not the rule. A wrong name gives other token ids
for the same text and looks like a model that got worse, so the rule in `tokenizer.json` must be one of those written
out here, to the letter.

A SentencePiece tokenizer joins the neighbours whose piece has the highest score. The scores written are the order of
the merges in `tokenizer.json`, not those of `tokenizer.model`: the run saw the token ids of transformers, which differ
for runs of spaces where it made the merges itself (Mistral's first tokenizer gives runs of spaces the lowest score).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdpo.io.json_file import read_json
from mlxdpo.model.chat_template import template_settings
from mlxdpo.model.ends import end_tokens, turn_end
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
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
NOT_STRIPPING = {"<unk>", "<s>", "<|endoftext|>"}  # of Phi-3's special tokens; `</s>` and the others are
LAST = -1e6  # the score of a piece that no merge makes


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


def is_sentencepiece(specification: Mapping[str, Any]) -> bool:
    """Whether a parsed `tokenizer.json` is SentencePiece's pairs: bytes as a last resort, spaces as U+2581."""
    model = specification["model"]
    return (
        model["type"] == "BPE"
        and bool(model.get("byte_fallback"))
        and "\u2581"
        in json.dumps([specification.get("normalizer"), specification.get("pre_tokenizer")], ensure_ascii=False)
    )


def tokenizer_and_rules(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A folder's tokenizer, and its parsed `tokenizer.json` (made by transformers where only another form is there)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **template_settings(folder))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer, json.loads(backend.to_str()) if backend is not None else {"model": {"type": "none"}}


def takes_spaces_as_phi3(specification: Mapping[str, Any]) -> bool | None:
    """Whether spaces and line ends behind special tokens are dropped: False behind none of them, True as Phi-3's are,
    None in another way, which llama.cpp has no form of."""
    added = specification.get("added_tokens", [])
    known = NOT_STRIPPING | {"</s>"} <= {*specification["model"].get("vocab", ()), *(one["content"] for one in added)}
    stripping = {one["content"] for one in added if one.get("rstrip")}
    if not stripping:
        return False
    return True if known and stripping == {one["content"] for one in added} - NOT_STRIPPING else None


def model_name(name: str, specification: Mapping[str, Any]) -> str:
    """The name of a model in its file: llama.cpp drops spaces behind special tokens where it holds `phi-3` or `phi3`,
    and loads no file of such a name without Phi-3's special tokens."""
    other = re.sub("phi-?3", "phi_3", name, flags=re.IGNORECASE)
    if not takes_spaces_as_phi3(specification):
        return other
    return f"phi-3 {name}" if other == name else name


def refuse_tokenizer(folder: Path, name: str) -> None:
    """Raise `UserError` for a tokenizer that cannot be written so that llama.cpp splits text as it does."""
    specification = tokenizer_and_rules(folder)[1]
    if rule_name(specification) is None and not is_sentencepiece(specification):
        raise UserError(
            f"gguf: the tokenizer of {name} splits text by an unsupported rule (supported: "
            f"{', '.join(RULES)}, SentencePiece); export --to hf and use llama.cpp's convert_hf_to_gguf.py"
        )
    if takes_spaces_as_phi3(specification) is None:
        stripping = [one["content"] for one in specification["added_tokens"] if one.get("rstrip")]
        raise UserError(
            f"gguf: the tokenizer of {name} drops spaces after {', '.join(stripping[:3])}, and llama.cpp does that "
            f"for Phi-3's special tokens only; export --to fused"
        )


def write_tokenizer(writer: Any, folder: Path, raw: Mapping[str, Any], size: int, name: str) -> None:
    """Vocabulary of `size` tokens, rule, special tokens and chat template of a model folder into a GGUF writer, and the
    model's name, by which llama.cpp knows some of its rules. `raw` is the folder's config.json.
    """
    tokenizer, specification = tokenizer_and_rules(folder)
    writer.add_name(model_name(name, specification))
    tokens, kinds = vocabulary(specification, size)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in specification["model"]["merges"]]
    if (rule := rule_name(specification)) is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(piece_scores(tokens, merges))
        writer.add_add_space_prefix(puts_a_space_first(specification))
    _write_special(writer, tokenizer, folder, raw, size)


def _write_special(writer: Any, tokenizer: Any, folder: Path, raw: Mapping[str, Any], size: int) -> None:
    """The special tokens, the end of a turn beside the end of a text, and the template. llama.cpp loads no file that
    names an id beyond the vocabulary of `size` tokens, which a config.json may do."""
    for end, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        if (token := getattr(tokenizer, f"{end}_token_id")) is not None and token < size:
            add(token)
    generation = folder / "generation_config.json"
    ends = end_tokens(tokenizer, {**raw, **(read_json(generation) if generation.is_file() else {})})
    if others := sorted(end for end in ends - {tokenizer.eos_token_id} if end < size):
        writer.add_eot_token_id(turn if (turn := turn_end(tokenizer)) in others else others[0])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if template := tokenizer.chat_template:
        several = [{"name": n, "template": t} for n, t in template.items()] if isinstance(template, dict) else None
        writer.add_chat_template(several or template)


def vocabulary(specification: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(`size` tokens by id, their types). Ids that no token has, where the embedding is wider, are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    model = specification["model"]
    for text, i in model["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL
        if model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kinds[i] = BYTE
    for added in specification.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if (unknown := model.get("unk_token")) in model["vocab"]:
        kinds[model["vocab"][unknown]] = UNKNOWN
    return tokens, kinds


def piece_scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """A score for each of `tokens`: the highest is joined first, in the merges' order."""
    scores = dict.fromkeys(tokens, LAST)
    for rank, pair in enumerate(merges):
        made = "".join(pair)
        scores[made] = max(scores.get(made, LAST), -float(rank))
    return [scores[token] for token in tokens]


def puts_a_space_first(specification: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text that has none."""
    outer = [specification.get("normalizer") or {}, specification.get("pre_tokenizer") or {}]
    steps = [step for one in outer for step in one.get("normalizers", one.get("pretokenizers", [one]))]
    return any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
