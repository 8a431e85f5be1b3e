"""One batch of each stage in TRL's own trainers and in ours: loss and every gradient, full fine-tuning, float32.

`RewardTrainer` (with margins and centring), `SFTTrainer` (completion only) and `KTOTrainer` (KL completions that it
rotates itself) get the same tiny llama and the same token ids. Tolerance 1e-5 of the largest entry of a gradient; seen:
a tenth of that. Known differences: our means over tokens and KL terms are those of the whole optimizer step, TRL's
those of a micro-batch (SFT: of the step, too): here both are one batch.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from datasets import Dataset
from levels_of import rewards_at
from mlx.utils import tree_flatten
from tiny_models import write_model
from tiny_tokenizers import base_tokenizer
from torch_side import load_torch
from transformers import AutoModelForSequenceClassification
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from mlxdpo.config import DataConfig, LoraConfig, LossConfig, ModelConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.report import Report
from mlxdpo.data.transforms import with_end
from mlxdpo.forward.logprobs import plain_forward, score_pairs
from mlxdpo.forward.reward_head import NAME, attach_head
from mlxdpo.losses import resolve
from mlxdpo.losses.reward import reward_loss
from mlxdpo.model.adapters import attach_lora
from mlxdpo.model.policy import load_policy
from mlxdpo.types import Example, Extras

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
COUNT, TOLERANCE = 6, 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", base_tokenizer())


@pytest.fixture(scope="module")
def examples():
    """Pairs of unequal lengths with margins and thumbs."""
    draw = np.random.default_rng(4)
    ids = lambda low, high: draw.integers(3, 290, draw.integers(low, high)).astype(np.int32)  # noqa: E731
    return [
        Example(ids(3, 12), ids(2, 9), ids(2, 9), str(i), Extras(margin=0.25 * (i % 3), desirable=float(i % 3 > 0)))
        for i in range(COUNT)
    ]


def trainer_of(kind, model, arguments, rows, folder, **more):
    """A trainer of TRL's on one batch of rows, as they stand."""
    common = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": COUNT,
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    setup = {RewardTrainer: RewardConfig, SFTTrainer: SFTConfig, KTOTrainer: KTOConfig}[kind]
    tokenizer = base_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return kind(
        model,
        args=setup(**common | arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **more,
    )


def theirs(trainer, batch, **more):
    """Loss and gradients by name of one batch, with dropout off."""
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), **more)
    loss.backward()
    return loss.item(), {n: p.grad.numpy() for n, p in trainer.model.named_parameters() if p.grad is not None}


def ours(model, batch, loss, forward=plain_forward):
    def value(model):
        return (loss(score_pairs(model, batch, forward)) * batch.weight).sum() / batch.weight.sum()

    found, gradients = nn.value_and_grad(model, value)(model)
    return found.item(), {name: np.array(g) for name, g in tree_flatten(gradients)}


def assert_equal(own, other, rename=lambda name: name):
    """Values and every gradient that TRL has; those it has not are zero in ours."""
    assert own[0] == pytest.approx(other[0], rel=1e-5)
    met = set()
    for name, gradient in other[1].items():
        mine = own[1][rename(name)]
        assert abs(mine - gradient).max() < TOLERANCE * abs(gradient).max() + 1e-7, name
        met.add(rename(name))
    assert all(not own[1][name].any() for name in own[1].keys() - met)


def full(folder):
    return attach_lora(load_policy(ModelConfig(path=str(folder), dtype="float32")).model, LoraConfig(method="full"))


def test_reward_model(folder, examples, tmp_path):
    head = np.random.default_rng(0).normal(0, 0.2, (1, 32)).astype(np.float32)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    model.config.pad_token_id = base_tokenizer().eos_token_id
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(head))
    rows = [
        {f"{side}_ids": np.concatenate([e.prompt, getattr(e, side)]).tolist() for side in ("chosen", "rejected")}
        | {"margin": e.extras.margin}
        for e in examples
    ]
    trainer = trainer_of(RewardTrainer, model, {"center_rewards_coefficient": 0.05}, rows, tmp_path)
    other = theirs(trainer, trainer.data_collator(rows))
    policy = attach_head(full(folder))
    policy[NAME].weight = mx.array(head)
    batch = collate(list(with_end(examples, DataConfig(), Report())), tuple(range(COUNT)), COUNT)
    own = ours(policy, batch, reward_loss(0.0, 0.05, ["margin"]), rewards_at())
    assert_equal(own, other, lambda name: f"{NAME}.weight" if name == "score.weight" else name)


def test_supervised(folder, examples, tmp_path):
    rows = [
        {
            "input_ids": np.concatenate([e.prompt, e.chosen]).tolist(),
            "completion_mask": [0] * len(e.prompt) + [1] * len(e.chosen),
        }
        for e in examples
    ]
    trainer = trainer_of(SFTTrainer, load_torch(folder), {"completion_only_loss": True}, rows, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    other = theirs(trainer, batch)
    imitated = [Example(e.prompt, e.chosen, e.chosen, e.where) for e in examples]
    own = ours(full(folder), collate(imitated, tuple(range(COUNT)), COUNT), resolve(LossConfig(name="sft")))
    assert_equal(own, other)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_thumbs(folder, examples, tmp_path, name):
    """TRL's rows, its rotation and all: what it scores is read off its batch, prompt and completion by its masks."""
    moved, reference = load_torch(folder), load_torch(folder)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.02)
    texts = [
        ("the user", " red"),
        ("blue:", " answer then ok."),
        ("a", " user ing"),
        ("red or", " the"),
        ("7", " sings 7"),
    ]
    rows = [{"prompt": p, "completion": c, "label": i % 2 == 0} for i, (p, c) in enumerate(texts)]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3}
    trainer = trainer_of(KTOTrainer, moved, weights | {"loss_type": name}, rows, tmp_path, ref_model=reference)
    batch = next(iter(trainer.get_train_dataloader()))
    other = theirs(trainer, dict(batch))
    made = [_example(batch, i, name == "kto") for i in range(len(rows))]
    base, policy = full(folder), full(folder)
    arrays = {n: mx.array(p.detach().numpy()) for n, p in moved.named_parameters() if n != "lm_head.weight"}
    policy.load_weights(list(arrays.items()), strict=False)
    laid = collate(made, tuple(range(len(made))), len(made))
    scored = score_pairs(base, laid)
    ref = np.stack([np.array(scored.chosen), np.array(scored.rejected)], axis=1)
    loss = resolve(LossConfig(name=name, **weights))
    assert_equal(ours(policy, collate(made, tuple(range(len(made))), len(made), ref), loss), other)


def _example(batch, i, kl):
    """Row `i` of TRL's batch, with the completion that it rotated there for the KL term."""

    def parts(prefix):
        ids, mask = batch[f"{prefix}input_ids"][i], batch[f"{prefix}completion_mask"][i].bool()
        seen = batch[f"{prefix}attention_mask"][i].bool()
        return ids[seen & ~mask].numpy().astype(np.int32), ids[mask].numpy().astype(np.int32)

    prompt, completion = parts("")
    other = parts("KL_")[1] if kl else completion
    return Example(prompt, completion, other, str(i), Extras(desirable=float(batch["label"][i])))
