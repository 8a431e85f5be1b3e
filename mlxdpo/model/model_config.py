"""The config of a model as mlx-lm must read it to compute what transformers computes.

transformers 5 and 4 write one model in two ways and mlx-lm reads a third; what it does not find it takes from
defaults without a word. So transformers' own config class reads the file first, and what it fills in, renames and nests
is brought under mlx-lm's names (`config_rules`). A key that is left over and changes numbers limits the rows, or
refuses the model.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.model.config_rules import ALIASES, REFUSED, REPLACED, RULES, Values
from mlxdpo.types import UserError


class ModelReading(NamedTuple):
    """`config` is the model's under mlx-lm's names; `notes` are sentences for the user.

    Rows of more than `longest` tokens are computed as another function than the model's, for the reason `why`. `within`
    replaces keys of `config` for rows up to there. `filled` are the keys that config.json leaves out and transformers
    has a default for.
    """

    config: Values
    longest: int | None = None
    why: str = ""
    within: Mapping[str, Any] = {}
    notes: tuple[str, ...] = ()
    filled: frozenset[str] = frozenset()

    @property
    def loaded(self) -> Values:
        """What mlx-lm is given."""
        if "text_config" in self.config:
            return {**self.config, "text_config": {**self.config["text_config"], **self.within}}
        return {**self.config, **self.within}

    def as_stored(self) -> ModelReading:
        """Without the shapes that transformers fills in: for weights that have others, as mlx-lm's own defaults may be.

        Such a config.json is no transformers model: it was written for mlx-lm, or cut short.
        """
        inner = "text_config" in self.config
        text = self.config["text_config"] if inner else self.config
        kept = {key: value for key, value in text.items() if key not in self.filled or NUMBERS.search(key)}
        config = {**self.config, "text_config": kept} if inner else kept
        note = (
            "config.json leaves out shapes and its weights are not those of transformers' defaults: mlx-lm's are used"
        )
        return self._replace(config=config, notes=(*self.notes, note), filled=frozenset())


def read_model_config(raw: Mapping[str, Any], name: str) -> ModelReading:
    """Read a config.json, whole, as transformers does, under mlx-lm's names; `name` is what messages call the model.

    Raises `UserError` for a model that mlx-lm computes as another function than transformers, with what differs.
    """
    kind = str(raw.get("model_type"))
    try:
        theirs = transformers_config(raw)
    except Exception as error:  # a config of mlx-lm's alone, or of code that comes with the model
        return ModelReading(dict(raw), notes=(f"transformers cannot read this config.json ({_first_line(error)})",))
    try:
        return _wrapped(raw, theirs, kind) if "text_config" in raw else _read_text(raw, theirs, kind)
    except UserError as error:
        raise UserError(f"{name}: {error}; docs/models.md lists the supported models") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def transformers_config(raw: Mapping[str, Any]) -> Any:
    """transformers' config object for a config.json; None for a `model_type` that it does not know."""
    from transformers import CONFIG_MAPPING

    if raw.get("model_type") not in CONFIG_MAPPING:
        return None
    left_out = ("quantization", "quantization_config", "model_type")  # packed weights are mlx-lm's business
    return CONFIG_MAPPING[raw["model_type"]].from_dict(
        json.loads(json.dumps({key: value for key, value in raw.items() if key not in left_out}))
    )


def _wrapped(raw: Mapping[str, Any], theirs: Any, kind: str) -> ModelReading:
    """A text tower with others around it (images, sound): its own config lies inside."""
    inner = None if theirs is None else theirs.get_text_config()
    own = raw["text_config"].get("model_type")
    if isinstance(inner, Mapping) or (inner is not None and own not in (None, inner.model_type)):
        inner = transformers_config(raw["text_config"])  # transformers has this name for another tower
    shared = {"vocab_size": raw["vocab_size"]} if "vocab_size" in raw else {}
    reading = _read_text({**shared, **raw["text_config"]}, inner, kind)
    text = reading.config
    if (tied := raw.get("tie_word_embeddings", getattr(theirs, "tie_word_embeddings", None))) is not None:
        text.setdefault("tie_word_embeddings", tied)
        if "tie_word_embeddings" in raw:
            text["tie_word_embeddings"] = tied
    top = {"vocab_size": text["vocab_size"]} if "vocab_size" in text else {}
    return reading._replace(config={**raw, **top, "model_type": ALIASES.get(kind, kind), "text_config": text})


def _read_text(raw: Mapping[str, Any], theirs: Any, file_of: str) -> ModelReading:
    kind = theirs.model_type if theirs is not None else str(raw.get("model_type") or file_of)
    if file_of in REFUSED and (why := REFUSED[file_of](raw, theirs)):
        raise UserError(why)
    read = names_read(module_of(file_of if file_of != raw.get("model_type") else kind))
    if theirs is None:
        return ModelReading(dict(raw), notes=_unread(raw, {}, read, kind))
    config = dict(raw)
    rope = _rope(theirs, read, kind)
    config |= rope.keys
    longest, why = rope.longest, rope.why
    known = theirs.to_dict()
    known |= {name: getattr(theirs, name) for name in theirs.attribute_map if hasattr(theirs, name)}
    filled = frozenset(known.keys() - config.keys())
    config |= {key: known[key] for key in filled}
    if config.get("head_dim") is None and {"hidden_size", "num_attention_heads"} <= config.keys():
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    ruled = RULES[kind](config, theirs) if kind in RULES else {}
    config |= {key: value for key, value in ruled.items() if key not in raw or key in REPLACED}
    config["model_type"] = ALIASES.get(kind, config.get("model_type", kind))
    window = _ignored_window(theirs, read, kind)
    if window is not None and (longest is None or window < longest):
        longest, why = window, f"mlx-lm computes {kind} without its sliding window"
    if "wpe" in read and (longest is None or theirs.n_positions < longest):
        longest, why = theirs.n_positions, f"{kind} has no learned position"
    notes = _unread(raw, type(theirs)().to_dict(), read | _aliases(theirs, read), kind)
    return ModelReading(config, longest, why, rope.within, notes, filled)


def _aliases(theirs: Any, read: frozenset[str]) -> set[str]:
    """Names of transformers for what mlx-lm reads under another one."""
    pairs = theirs.attribute_map.items()
    return {b for a, b in pairs if a in read} | {a for a, b in pairs if b in read}


def module_of(kind: str) -> str:
    """mlx-lm's module for a `model_type`."""
    from mlx_lm.utils import MODEL_REMAPPING

    return "mlx_lm.models." + MODEL_REMAPPING.get(ALIASES.get(kind, kind), ALIASES.get(kind, kind))


SHARED = {"base", "cache", "switch_layers", "activations", "ssm", "gated_delta", "pipeline", "rope_utils"}


@functools.cache
def names_read(module: str) -> frozenset[str]:
    """Every attribute and text that mlx-lm's model file mentions: what it does not mention it does not read.

    A field of its arguments that nothing asks for is not among them. Empty for a file that is not there.
    """
    file = Path(str(sys.modules["mlx_lm"].__file__)).parent / "models" / f"{module.rpartition('.')[2]}.py"
    if not file.is_file():
        return frozenset()
    tree, found = ast.parse(file.read_text("utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                if name not in SHARED:
                    found |= names_read(f"mlx_lm.models.{name}")
    return frozenset(found)


WINDOWS = {"sliding_window", "sliding_window_size", "attention_window_size", "window_size"}


def _ignored_window(theirs: Any, read: frozenset[str], kind: str) -> int | None:
    """The sliding window, in tokens, that transformers computes with and mlx-lm does not."""
    window = getattr(theirs, "sliding_window", None)
    if not window or getattr(theirs, "use_sliding_window", True) is False:
        return None
    kinds = getattr(theirs, "layer_types", None)
    if kinds is not None and not any("sliding" in one for one in kinds):
        return None
    # mlx-lm's llama, which Mistral is, knows windows but fails where every layer has one.
    return window if kind in ("mistral", "ministral3") or not read & WINDOWS else None


BY_INITIALIZE = {"default", "linear", "dynamic", "llama3", "yarn", "longrope", "mrope", "proportional"}
BY_HAND = {
    "phi3": {"linear", "longrope", "dynamic"},
    "deepseek_v2": {"yarn"},
    "minicpm3": {"longrope"},
    "phimoe": {"longrope"},
}


class RopeKeys(NamedTuple):
    """Keys under mlx-lm's names, and the other fields of `ModelReading` as far as they follow from them."""

    keys: Values
    longest: int | None = None
    why: str = ""
    within: Mapping[str, Any] = {}


def _rope(theirs: Any, read: frozenset[str], kind: str) -> RopeKeys:
    """Rotary positions. Raises `UserError` for those that mlx-lm's file of this `model_type` does not compute."""
    found = getattr(theirs, "rope_parameters", None)
    rope = (found or {}).get("full_attention", found)
    if not rope or (rope is not found and "rope_parameters" in read):  # for each kind of layer, and read so
        return RopeKeys({})
    way = rope.get("rope_type", "default")
    keys = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in keys} | {"type": way}
    if way == "default":
        return RopeKeys(keys | {"rope_scaling": None})
    if way == "yarn" and rope.get("attention_factor") is not None:
        raise UserError(f"it sets attention_factor {rope['attention_factor']}, which mlx-lm does not read")
    reads = "rope_parameters" in read or {"initialize_rope", "rope_scaling"} <= read
    if way not in BY_HAND.get(kind, BY_INITIALIZE if reads else {"dynamic"}):
        raise UserError(f"its rotary positions are of type {way}, which mlx-lm's {kind} does not compute")
    keys["rope_scaling"] = scaling
    if way not in ("dynamic", "longrope"):
        return RopeKeys(keys)
    if way == "longrope":
        keys["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        stretched = theirs.max_position_embeddings / rope["original_max_position_embeddings"]
        if rope.get("attention_factor") is not None or rope.get("factor", stretched) != stretched:
            raise UserError("its longrope scales attention by another factor than that of its lengths, as mlx-lm does")
    # Both change with the length of the row; up to the original length transformers has one form of them.
    longest = rope.get("original_max_position_embeddings") or theirs.max_position_embeddings
    short = {**rope, "long_factor": rope["short_factor"]} if way == "longrope" else {**rope, "rope_type": "default"}
    within = {"rope_scaling": scaling | {"long_factor": rope["short_factor"]} if way == "longrope" else None}
    if "rope_parameters" in read:
        within["rope_parameters"] = {**short, "type": short["rope_type"]}
    return RopeKeys(keys, longest, f"mlx-lm keeps one form of {way} rotary positions for every length", within)


# Keys that change numbers and no array's shape: shapes are compared when the weights are loaded.
NUMBERS = re.compile(
    r"rope|rotary|window|act$|act_|activation|softcap|soft_cap|multiplier|_scale$|scale_|scaling|clip|norm|eps$|epsilon"
    r"|parallel|top_?k|per_tok|group|bidirectional|swiglu|alpha|beta|_factor$|temperature|limit|interleave"
)
# Of training, generation, other towers and where files came from, or of shapes.
HARMLESS = re.compile(
    r"dropout|pdrop|initializer|_init|init_|jitter|aux|output_|_token|token_|^use_cache|dtype|^architectures|^transformers"
    r"|_version|^auto_map|quantiz|name_or_path|label|problem_type|vision|audio|image|video|_idx$|mtp|nextn|chunk|kernels"
    r"|time_step|pretraining_tp|max_position|max_seq_len|model_max_length|logits_to_keep|^is_|^summary_|^return_dict"
    r"|^task_spec|^tokenizer|^text_config|^model_type|^tie_|per_layer_config|residual_in_fp32|^rope_parameters|mambapy"
    r"|associative_scan|rescale|layer_types$|_attn_impl|^moe_layer|max_window_layers|^use_sliding|^sliding_window|fp32"
    r"|cross_attention|^license|^language|n_positions|^id2|2id$|^num_|^n_|_size$|_dim$|_rank$|bias$|heads|layers|experts?$"
)


def _unread(raw: Mapping[str, Any], defaults: Mapping[str, Any], read: frozenset[str], kind: str) -> tuple[str, ...]:
    """A sentence on keys that nobody reads. Raises `UserError` for one that changes numbers and is not the default.

    The default itself is what `make parity` proves.
    """
    named = []
    for key, value in raw.items():
        if key in read or key.startswith("_") or HARMLESS.search(key) or value in (None, False):
            continue
        if key in defaults and defaults[key] == value:
            continue
        if key in defaults and NUMBERS.search(key):
            raise UserError(f"its config.json sets {key} {json.dumps(value)[:60]}, which mlx-lm's {kind} does not read")
        if key not in defaults or not NUMBERS.search(key):
            named.append(key)
    return (f"config.json sets what mlx-lm does not read: {', '.join(sorted(named)[:12])}",) if named else ()
