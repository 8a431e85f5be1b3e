"""Twenty optimizer steps of our loop and of TRL's `DPOTrainer`: every logged number of every step within 1e-4.

The same tiny llama, pairs in the same order, float32, constant rate, no warm-up, the same clipping, no dropout. Full
fine-tuning, and LoRA through peft with our fresh matrices copied over. Tolerance 1e-4, absolute up to 1 and relative
above (seen: 1.2e-5): two libraries round differently, and each step starts from the last one's rounding.

Known differences, kept out of the comparison:
- `rewards/accuracies`: a tie counts 0.5 in ours and 0 in TRL (strict >), which is every pair of the first step; from
  the second on they are compared.
- Chat rows: TRL scores what a template prints after the end-of-turn token (ChatML's newline), ours does not: the rows
  here are plain text, and their token ids and masks are compared first.
- TRL averages metrics over micro-batches, ours over pairs: the same for micro-batches of one size, as here.
- transformers' Trainer spares norms from weight decay in full fine-tuning; ours decays every trained weight: weight
  decay is compared with LoRA, where both decay the matrices alone.
"""

import numpy as np
import pytest
from datasets import Dataset
from mlx.utils import tree_flatten
from peft import LoraConfig as PeftLoraConfig
from tiny_models import write_model
from tiny_tokenizers import base_tokenizer
from torch_side import PROJECTIONS, copy_adapter, load_torch
from trl import DPOConfig, DPOTrainer

from mlxdpo.config import Config, names_of
from mlxdpo.data.encode import encode_all
from mlxdpo.data.planning import outline, plan_epoch
from mlxdpo.forward.choose_forward import forward_fns
from mlxdpo.losses import resolve
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.loop import run_loop
from mlxdpo.training.plan import make_plan
from mlxdpo.training.preflight import with_details
from mlxdpo.training.reference import shared_rows, with_reference
from mlxdpo.training.stages import stage_of
from mlxdpo.training.step import ReferencedPairs, TrainState, make_optimizer, make_scorer
from mlxdpo.types import Preference

# transformers warns about a name that TRL still uses.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

TOLERANCE = 1e-4
STEPS, WINDOW = 20, 8
NAMES = ["loss", "grad_norm", "learning_rate"] + [
    f"{group}/{part}"
    for group, parts in {"rewards": ("chosen", "rejected", "margins"), "logps": ("chosen", "rejected")}.items()
    for part in parts
]
LR = {("adamw", "lora"): 3e-3, ("adamw", "full"): 3e-4, ("sgd", "lora"): 1e-1, ("sgd", "full"): 3e-3}
CLIP = 1.0


def plain_pairs(count):
    """Plain-text rows of unequal length; in every fourth the prompt's last space merges into the completion's word."""
    rng = np.random.default_rng(5)
    words = np.array(["the", "user", "blue", "red", "sings", "Löwe", "7", "answer\n\nthen", "ok."])

    def text(low, high):
        return " ".join(rng.choice(words, rng.integers(low, high)))

    return [
        Preference(text(2, 12) + (": " if i % 4 == 0 else ":"), text(1, 9), " " + text(1, 9), str(i))
        for i in range(count)
    ]


def recipe(folder, loss="sigmoid", method="lora", optimizer="adamw", batch=WINDOW, **knobs):
    betas = {"betas": (0.9, 0.99)} if optimizer == "adamw" else {}
    return Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "data": {"template": "plain", "group": "none"},
            "loss": {"name": loss, "beta": 0.2} | knobs,
            "lora": {"method": method, "rank": 4, "alpha": 6.0},
            "optim": {
                "name": optimizer,
                "lr": LR[optimizer, method],
                "schedule": "constant",
                "warmup": 0,
                "weight_decay": 0.1 if method == "lora" else 0.0,
                "max_grad_norm": CLIP,
            }
            | betas,
            "train": {"epochs": 1, "batch_size": batch, "gradient_accumulation": WINDOW // batch, "save_every": 1000},
        }
    )


def run_ours(config, examples, checkpoints):
    """Metrics of every step, and the fresh adapter matrices by name (empty for full fine-tuning)."""
    policy = load_policy(config.model)
    train = config.train
    plan = plan_epoch(
        outline(examples, config.data.group), train.batch_size, train.gradient_accumulation, train.seed, 0
    )
    batches = [batch for window in plan.windows for batch in window]
    loss = resolve(config.loss)
    ways = with_details(forward_fns(policy.model), loss, config)
    rows, scorer = shared_rows(examples) if "shared" in loss.needs else None, make_scorer(policy.model, ways.score)
    *_, (_, ref) = with_reference(examples, scorer, policy.identity, batches, train.batch_size, rows=rows)
    attach_lora(policy.model, config.lora, seed=1)
    fresh = {n: np.array(a) for n, a in tree_flatten(policy.model.trainable_parameters()) if ".lora_" in n}
    parts = ReferencedPairs(examples, ref), ReferencedPairs([], np.zeros((0, 2), np.float32))
    made = make_optimizer(config.optim), loss, make_plan(config, examples, [])
    state = TrainState(config, stage_of(config), policy.model, *made, *parts, checkpoints, ways)
    events = run_loop(state, Progress(), lambda: False)
    return [event.values for event in events if event.kind == "step"], fresh


def our_order(config, examples):
    """Indices in the order in which our loop takes the pairs."""
    plan = plan_epoch(
        outline(examples, config.data.group), config.train.batch_size, config.train.gradient_accumulation, 0, 0
    )
    return [i for window in plan.windows for batch in window for i in batch]


def trl_trainer(config, rows, fresh, folder):
    """TRL's trainer set up as `config` says, on `rows` in the order given."""
    optim, full = config.optim, config.lora.method == "full"
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=WINDOW,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        learning_rate=optim.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim={"adamw": "adamw_torch", "sgd": "sgd"}[optim.name],
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=1e-8,
        max_grad_norm=optim.max_grad_norm,
        loss_type=names_of(config.loss.name),
        loss_weights=config.loss.weights or None,
        beta=config.loss.beta,
        f_divergence_type=config.loss.f_divergence,
        ld_alpha=config.loss.ld_alpha,
        use_weighting=config.loss.wpo,
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    lora = PeftLoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=PROJECTIONS)
    trainer = DPOTrainer(
        model=load_torch(config.model.path),
        ref_model=load_torch(config.model.path) if full else None,
        args=arguments,
        train_dataset=Dataset.from_list([{k: getattr(r, k) for k in ("prompt", "chosen", "rejected")} for r in rows]),
        processing_class=base_tokenizer(),
        peft_config=None if full else lora,
    )
    if not full:
        copy_adapter(trainer.model, fresh)
    return trainer


@pytest.fixture
def ready(tmp_path, cache):
    """A folder and the encoded pairs, as many as the steps take."""
    folder = write_model(tmp_path / "model", base_tokenizer(), "llama", seed=3)
    config = recipe(folder)
    policy, rows = load_policy(config.model), plain_pairs(STEPS * WINDOW)
    examples, report = encode_all(rows, policy.tokenizer, config.data, eos_ids=policy.eos_ids)
    assert report.kept == len(rows)
    return folder, rows, examples


def compare(ours, theirs, what, names=tuple(NAMES)):
    """Every number of every step; each curve must have moved, or agreement would say nothing."""
    worst = {}
    for name in names:
        left, right = (np.array([step[name] for step in steps]) for steps in (ours, theirs))
        assert left.shape == right.shape == (STEPS,)
        worst[name] = float((abs(left - right) / np.maximum(abs(right), 1)).max())
    print(f"{what}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    losses, norms = (np.array([step[name] for step in ours]) for name in ("loss", "grad_norm"))
    assert np.ptp(losses) > 200 * TOLERANCE and abs(ours[-1]["rewards/margins"]) > 200 * TOLERANCE
    assert (norms > CLIP).any()
    assert max(worst.values()) <= TOLERANCE
    if set(names) != set(NAMES):
        return
    left, right = ([step["rewards/accuracies"] for step in steps] for steps in (ours, theirs))
    assert (left[0], right[0]) == (0.5, 0.0) and left[1:] == pytest.approx(right[1:], abs=1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_twenty_steps(ready, tmp_path, loss, optimizer, method):
    folder, rows, examples = ready
    config = recipe(folder, loss, method, optimizer)
    ours, fresh = run_ours(config, examples, tmp_path / "checkpoints")
    trainer = trl_trainer(config, [rows[i] for i in our_order(config, examples)], fresh, tmp_path)
    trainer.train()
    compare(ours, trainer.state.log_history[:STEPS], f"{loss} {optimizer} {method}")


@pytest.mark.parametrize(
    ("loss", "knobs"),
    [
        ("aot", {}),
        ("apo_zero", {}),
        ("sigmoid+sft", {"weights": [1.0, 0.5]}),
        ("sigmoid", {"wpo": True, "weights": [1000.0]}),  # a random model's weights are near 1e-3
        ("sigmoid", {"f_divergence": "js_divergence"}),
        ("sigmoid", {"ld_alpha": 0.4}),
    ],
    ids=str,
)
def test_twenty_steps_of_other_objectives_and_modifiers(ready, tmp_path, loss, knobs):
    """WPO's weights come out of two fused heads, LD-DPO's beginnings out of two maskings. Under LD-DPO TRL reports
    rewards of shortened sums and ours of whole ones: there loss and gradient are compared."""
    folder, rows, examples = ready
    config = recipe(folder, loss, **knobs)
    ours, fresh = run_ours(config, examples, tmp_path / "checkpoints")
    trainer = trl_trainer(config, [rows[i] for i in our_order(config, examples)], fresh, tmp_path)
    trainer.train()
    names = ("loss", "grad_norm", "learning_rate") if "ld_alpha" in knobs else NAMES
    compare(ours, trainer.state.log_history[:STEPS], f"{loss} {knobs}", names)


def test_token_ids_and_masks(ready, tmp_path):
    folder, rows, examples = ready
    trainer = trl_trainer(recipe(folder, method="full"), rows, {}, tmp_path)
    assert len(trainer.train_dataset) == len(examples)
    merged = 0
    for row, theirs, ours in zip(rows, trainer.train_dataset, examples, strict=True):
        assert theirs["prompt_ids"] == ours.prompt.tolist(), row
        assert theirs["chosen_ids"] == ours.chosen.tolist() and theirs["rejected_ids"] == ours.rejected.tolist(), row
        merged += trainer.processing_class(row.prompt)["input_ids"] != theirs["prompt_ids"]
    assert merged > 5  # rows whose boundary had to move back are among them


@pytest.mark.parametrize("batch", [8, 1])
def test_accumulation(ready, tmp_path, batch):
    """Windows of 8 pairs cut into batches of 8 or of 1 are TRL's batches of 8."""
    folder, rows, examples = ready
    config = recipe(folder, batch=batch)
    ours, fresh = run_ours(config, examples, tmp_path / "checkpoints")
    trainer = trl_trainer(config, [rows[i] for i in our_order(config, examples)], fresh, tmp_path)
    trainer.train()
    compare(ours, trainer.state.log_history[:STEPS], f"{batch} x {WINDOW // batch}")
