"""From a recipe to what it will cost: the model's shape without weights, the plan of batches, memory, and advice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxdpo.config import Config, LoraConfig, ModelConfig
from mlxdpo.data.dataset import Dataset, encode_split, read_split
from mlxdpo.data.examples import largest_token, longest_row
from mlxdpo.estimate.memory import (
    FLOAT,
    AttentionCost,
    Frozen,
    Layouts,
    Memory,
    Setting,
    Shape,
    Trained,
    predict,
)
from mlxdpo.forward.fused_head import is_frozen
from mlxdpo.forward.levels import Level, offered_levels
from mlxdpo.forward.metal_routing import BACKWARD_BLOCK, is_fused
from mlxdpo.forward.patch_mlx_lm import SHORT, UNFUSED_FROM, attention_files, unrolled_in
from mlxdpo.forward.shared_prefix import sliding_windows
from mlxdpo.machine.device import default_dtype, this_machine
from mlxdpo.model.adapters import read_settings
from mlxdpo.model.limits import check_ids, check_length
from mlxdpo.model.policy import load_tokenizer
from mlxdpo.model.skeleton import Skeleton, dora_extra, make_trainable, read_skeleton
from mlxdpo.training.plan import (
    BatchLayout,
    PlanSummary,
    checked_pairs,
    epochs_for,
    make_plan,
    planned_batches,
    settled,
    summarize_plan,
)
from mlxdpo.training.stages import stage_of
from mlxdpo.training.step import make_optimizer
from mlxdpo.types import UserError

PARTS = {
    "weights": "weights",
    "trained": "trained arrays",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations of a step",
    "head": "logits of a chunk",
    "reference": "reference pass (not simultaneous)",
    "in_flight": "operations in flight",
}


# Arrays that an optimizer keeps per trained one; MLX's SGD keeps a momentum even when it is 0.
STATES = {"adamw": 2, "adam": 2, "sgd": 1, "rmsprop": 1, "lion": 1, "muon": 1, "adafactor": 0}
INPUTS = {
    "attention": {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    "out": {"o_proj"},
    "mlp": {"gate_proj", "up_proj", "gate_up_proj", "c_fc"},
    "inner": {"down_proj", "c_proj"},
}
# Metal has about ten command buffers in flight, each of at most 40 M input elements.
IN_FLIGHT = 10 * 40_000_000
# Share of a machine's memory that a run may take: the system and other programs need the rest. What Metal recommends
# leaves them a quarter already.
FITS = {"metal": 0.95}
FITS_ELSEWHERE = 0.75


class CannotPlan(UserError):
    """A model's configuration does not say enough to plan its memory."""


class Parts(NamedTuple):
    """Everything a prediction is made of."""

    shape: Shape
    trained: Trained
    frozen: Frozen
    setting: Setting
    layouts: Layouts
    steps: int
    quantised: bool

    def memory(self) -> Memory:
        """The prediction."""
        return predict(*self[:4], self.steps, self.layouts)


class Forecast(NamedTuple):
    """What a run costs. `machine` is this machine's memory in bytes; `advice` is empty when it fits.

    `config` is the recipe with the epochs that it leaves open as a number, `data` its pairs.
    """

    config: Config
    data: Dataset
    memory: Memory
    summary: PlanSummary
    machine: int
    fits: bool
    advice: tuple[SettingChange, ...]


class SettingChange(NamedTuple):
    """What to change in the recipe, and the peak it leads to, bytes."""

    setting: str
    peak: int


def forecast(config: Config, machine: int | None = None) -> Forecast:
    """What the recipe will cost on a machine with `machine` bytes; None asks this one.

    Reads the data, the tokenizer and the shapes of the weights, never the weights. Raises the `UserError`s of a run.
    """
    stage = stage_of(config)
    loss = stage.loss(config)
    make_optimizer(config.optim)
    rows = read_split(config.data, config.train.seed, stage.transform(config, loss))
    skeleton = read_skeleton(config.model)
    tokenizer = load_tokenizer(skeleton.folder, config.model.path, config.model.trust_remote_code)
    data = encode_split(rows, config.data, tokenizer, frozenset(tokenizer.eos_token_ids))
    check_length(skeleton.reading, longest_row(data.train, data.heldout))
    check_ids(skeleton.model, largest_token(data.train, data.heldout), tokenizer)
    return _forecast(config, skeleton, data, machine)


def planned_steps(config: Config) -> int | None:
    """The optimizer steps of a run; None for a model whose memory cannot be planned."""
    try:
        return forecast(config).summary.steps
    except CannotPlan:
        return None


def _forecast(config: Config, skeleton: Skeleton, data: Dataset, machine: int | None = None) -> Forecast:
    parts, summary = gather(config, skeleton, data)
    memory, size = parts.memory(), machine or this_machine().memory
    fits = not size or memory.peak <= fitting_bytes(size)  # 0: unknown
    config = settled(config, stage_of(config).rate, epochs_for(config, data.train))
    return Forecast(config, data, memory, summary, size, fits, () if fits else advise(config, parts, data))


def fitting_bytes(machine: int) -> float:
    """How much of a machine's memory a run may take."""
    return FITS.get(this_machine().kind, FITS_ELSEWHERE) * machine


def check_fits(config: Config, data: Dataset) -> None:
    """Raise `UserError` for a run that this machine's memory will not hold, with what would make it fit; no weight
    is read. A model whose memory cannot be planned passes, and `train.allow_over_memory` lets any pass."""
    if config.train.allow_over_memory:
        return
    try:
        found = _forecast(config, read_skeleton(config.model), data)
    except CannotPlan:
        return
    if found.fits:
        return
    enough = [change for change in found.advice if change.peak <= fitting_bytes(found.machine)]
    helps = " or ".join(f"{change.setting} ({change.peak / 1e9:.1f} GB)" for change in (enough or found.advice)[:3])
    ways = f"set {helps}{'' if enough else ', not enough alone'}, or " if helps else ""
    raise UserError(
        f"this run needs about {found.memory.peak / 1e9:.1f} GB, and this machine has {found.machine / 1e9:.1f} GB for "
        f"it and everything else; {ways}try anyway with --train.allow_over_memory true"
    )


def gather(config: Config, skeleton: Skeleton, data: Dataset) -> tuple[Parts, PlanSummary]:
    """The parts of a prediction and the numbers of its plan. Makes the skeleton trainable."""
    model = skeleton.model
    lora = config.lora if config.model.adapter is None else read_settings(Path(config.model.adapter))
    level = offered_levels(model)[0]
    make_trainable(model, lora)
    plan = make_plan(config, data.train, data.heldout)
    found = planned_batches(data.train, plan.training, level, plan.shapes)
    heldout = planned_batches(data.heldout, plan.heldout, level, plan.heldout_shapes)
    summary = summarize_plan(plan, data.train, found)
    training = tuple({one.layout: None for one in found})
    checked = planned_batches(data.train, [checked_pairs(plan, data.train)], level)
    layouts = Layouts(training, (*training, *{one.layout: None for one in heldout}), checked[0].layout)
    train = config.train
    trained = trained_of(model, lora, level)
    frozen = _frozen(config, skeleton, trained)
    quantised = bool(config.model.quantize or skeleton.config.get("quantization"))
    shape = shape_of(skeleton, config.model)
    narrow = any(window is not None and window < summary.longest for window in sliding_windows(model))
    setting = Setting(
        train.gradient_checkpointing,
        STATES[config.optim.name],
        train.gradient_accumulation,
        attention_cost(model, shape, narrow),
        IN_FLIGHT if this_machine().kind == "metal" else 0,
    )
    return Parts(shape, trained, frozen, setting, layouts, summary.steps, quantised), summary


def attention_cost(model: Any, shape: Shape, windowed: bool) -> AttentionCost:
    """Which attention this machine computes for a model; `windowed` says that layers see less than the longest row."""
    kind = this_machine().kind
    if not attention_files(model):  # written out in mlx-lm's own operations
        return AttentionCost(math.inf, score_from=math.inf)
    if kind == "cpu":
        return AttentionCost(SHORT + 1, score_from=SHORT + 1)
    if kind == "cuda":
        return AttentionCost(UNFUSED_FROM if windowed else 0)
    length, mask = UNFUSED_FROM, "array" if windowed else "causal"
    dtype = mx.float32 if shape.item == FLOAT else mx.bfloat16
    sizes = shape.head_dim, shape.head_dim, length, length, shape.heads // shape.kv_heads, dtype, mask
    trained, scored = (is_fused(*sizes, training=training) for training in (True, False))  # type: ignore[arg-type]
    later = UNFUSED_FROM if not trained else math.inf  # where MLX's own is left for chunks, scoring is in chunks too
    return AttentionCost(0 if trained else UNFUSED_FROM, BACKWARD_BLOCK if trained else 0, 0 if scored else later)


def shape_of(skeleton: Skeleton, config: ModelConfig) -> Shape:
    """The dimensions in config.json. Raises `UserError` when one is missing, or says too little of the memory."""
    if slow := unrolled_in(skeleton.model):
        raise CannotPlan(
            f"{config.path}: mlx-lm computes the recurrence of {slow} token by token, and what it keeps of each token "
            f"cannot be planned; try a training with a small data.max_length and watch its memory"
        )
    raw: Mapping[str, Any] = {**skeleton.config, **(skeleton.config.get("text_config") or {})}

    def number(name: str) -> int:
        """One of them, as the model's own arguments or the file have it."""
        value = getattr(skeleton.model.args, name, None) or raw.get(name)
        if value is None:
            raise CannotPlan(f"{config.path}: its config.json has no {name}, so its memory cannot be estimated")
        return int(value)

    heads, hidden, block = number("num_attention_heads"), number("hidden_size"), skeleton.model.layers[-1]
    head_dim = int(getattr(skeleton.model.args, "head_dim", None) or raw.get("head_dim") or hidden // heads)
    kv_heads = int(raw.get("num_key_value_heads") or heads)
    inner = number("intermediate_size")
    if experts := int(raw.get("num_experts_per_tok") or 0):
        inner = experts * int(raw.get("moe_intermediate_size") or inner)
    normed = heads + kv_heads if any(name.endswith("q_norm") for name, _ in block.named_modules()) else 0
    item = (default_dtype() if config.dtype == "auto" else getattr(mx, config.dtype)).size
    return Shape(
        number("num_hidden_layers"), hidden, inner, heads, kv_heads, head_dim, number("vocab_size"), item, normed
    )


def trained_of(model: Any, lora: LoraConfig, level: Level) -> Trained:
    """What a model that was made trainable trains."""
    size = sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters()))
    if lora.method == "dora":
        size += 4 * dora_extra(model)
    lowest = [i for i, block in enumerate(model.layers) if tree_flatten(block.trainable_parameters())]
    block, full = model.layers[-1], lora.method == "full"
    adapted = {name.rsplit(".", 1)[-1]: m for name, m in block.named_modules() if full or "lora_a" in m}
    inputs = frozenset(name for name, maps in INPUTS.items() if maps & adapted.keys())
    ranks = sum(min(m.lora_a.shape[-2:]) for m in adapted.values() if "lora_a" in m)
    tied = "lm_head" not in model
    head = level.head is not None and not is_frozen(level.head)
    return Trained(len(model.layers) - min(lowest, default=len(model.layers)), size, ranks, inputs, full, head, tied)


def _frozen(config: Config, skeleton: Skeleton, trained: Trained) -> Frozen:
    weights = _readable_bytes(skeleton.model) - _size_trained(skeleton.model)
    largest = max((math.prod(one.shape) for one in skeleton.stored.values()), default=0)
    loading = 4 * largest if config.model.quantize else 0
    named = config.reference.model
    other = _readable_bytes(read_skeleton(ModelConfig(path=named, dtype=config.model.dtype)).model) if named else 0
    return Frozen(weights, loading, other)


def _readable_bytes(model: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def _size_trained(model: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.trainable_parameters()))


def advise(config: Config, parts: Parts, data: Dataset) -> tuple[SettingChange, ...]:
    """Changes that lower the peak, the one that gains most first, each alone on top of the recipe."""
    now, changes = parts.memory().peak, []
    for setting, sections in _setting_changes(config, parts):
        changed = config
        for name, values in sections.items():
            changed = changed.model_copy(update={name: getattr(changed, name).model_copy(update=values)})
        changes.append(SettingChange(setting, gather(changed, read_skeleton(changed.model), data)[0].memory().peak))
    half = max(at.shared + at.width for at in parts.layouts.scoring) // 2
    if half >= 8:
        changes.append(
            SettingChange(
                f"data.max_length {half}", parts._replace(layouts=shortened(parts.layouts, half)).memory().peak
            )
        )
    return tuple(sorted((change for change in changes if change.peak < now), key=lambda change: change.peak))


def _setting_changes(config: Config, parts: Parts) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Settings that could be lowered, as they are written and as sections of a recipe."""
    train, blocks, found = config.train, parts.shape.layers, []
    if not train.gradient_checkpointing:
        found.append(("train.gradient_checkpointing true", {"train": {"gradient_checkpointing": True}}))
    if train.batch_size > 1:
        size, accumulate = train.batch_size // 2, train.gradient_accumulation * 2
        words = f"train.batch_size {size} with train.gradient_accumulation {accumulate}"
        found.append((words, {"train": {"batch_size": size, "gradient_accumulation": accumulate}}))
    if not parts.trained.full and not parts.quantised:
        found.append(("model.quantize 4", {"model": {"quantize": 4}}))
    if not parts.trained.full and config.model.adapter is None and parts.trained.layers > 1:
        layers = min(parts.trained.layers, blocks) // 2
        found.append((f"lora.layers {layers}", {"lora": {"layers": layers}}))
    return found


def shortened(layouts: Layouts, longest: int) -> Layouts:
    """About what rows of at most `longest` tokens would give: longer batches scaled down in every dimension."""

    def scaled(at: BatchLayout) -> BatchLayout:
        """One batch."""
        share = min(1.0, longest / (at.shared + at.width))
        names = ("shared", "width", "rest", "scored", "tree")
        return at._replace(**{name: round(getattr(at, name) * share) for name in names})

    return Layouts(tuple(map(scaled, layouts.training)), tuple(map(scaled, layouts.scoring)), scaled(layouts.first))
