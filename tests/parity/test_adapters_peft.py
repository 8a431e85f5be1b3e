"""LoRA and DoRA with the same matrices compute the same function, and the same gradients, as peft's.

Our multiplier is peft's lora_alpha / r. Tolerance 1e-4 nats and 1e-4 of the largest gradient: float32 rounding in
another order (seen: 1.1e-5 of both).
"""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tiny_models import write_model
from tiny_tokenizers import base_tokenizer
from torch_side import PROJECTIONS, copy_adapter, load_torch, peft_parameter

from mlxdpo.config import LoraConfig, ModelConfig
from mlxdpo.forward.logprobs import next_token_logps
from mlxdpo.model.adapters import adapters_off, attach_lora
from mlxdpo.model.policy import load_policy

# transformers warns about a name that peft and TRL still use.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

TOLERANCE = 1e-4
IDS = np.random.default_rng(0).integers(3, 250, (2, 40))


@pytest.fixture(
    params=[("lora", None, 2.5), ("dora", None, 2.5), ("lora", ["self_attn.q_proj", "mlp.up_proj"], 0.5)], ids=str
)
def both(request, tmp_path, cache):
    """Our model and peft's, with the same random adapter, no matrix zero."""
    method, keys, scale = request.param
    folder = write_model(tmp_path / "model", base_tokenizer(), "llama", seed=3, tie_word_embeddings=False)
    model = load_policy(ModelConfig(path=str(folder), dtype="float32")).model
    attach_lora(model, LoraConfig(method=method, rank=4, scale=scale, keys=keys))
    rng = np.random.default_rng(1)
    arrays = {
        name: np.array(a) + rng.normal(0, 0.05, a.shape).astype(np.float32)
        for name, a in tree_flatten(model.trainable_parameters())
    }
    model.load_weights([(n, mx.array(a)) for n, a in arrays.items()], strict=False)
    targets = [key.split(".")[-1] for key in keys] if keys else PROJECTIONS
    lora = PeftLoraConfig(r=4, lora_alpha=4 * scale, target_modules=targets, use_dora=method == "dora")
    theirs = get_peft_model(load_torch(folder), lora)
    copy_adapter(theirs, arrays)
    return model, theirs, arrays


def torch_token_logps(model):
    ids = torch.tensor(IDS)
    return torch.log_softmax(model(ids, use_cache=False).logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]


def test_log_probs(both):
    model, theirs, _ = both
    ours = np.array(next_token_logps(model, mx.array(IDS)))
    with adapters_off(model):
        bare = np.array(next_token_logps(model, mx.array(IDS)))
    with torch.no_grad():
        worst = abs(ours - torch_token_logps(theirs).numpy()).max()
        with theirs.disable_adapter():
            worst_off = abs(bare - torch_token_logps(theirs).numpy()).max()
    moved = abs(ours - bare).max()
    print(f"worst {worst:.1e} nats with the adapter, {worst_off:.1e} without; the adapter moves {moved:.1f}")
    assert moved > 1000 * TOLERANCE
    assert worst <= TOLERANCE and worst_off <= TOLERANCE


def test_gradients(both):
    model, theirs, arrays = both

    def total(parameters):
        model.update(parameters)
        return next_token_logps(model, mx.array(IDS)).mean()

    gradients = dict(tree_flatten(mx.grad(total)(model.trainable_parameters())))
    torch_token_logps(theirs).mean().backward()
    assert gradients.keys() == arrays.keys()
    worst = {}
    for name, ours in gradients.items():
        want = peft_parameter(theirs, name).grad.numpy().T
        kind = name.rsplit(".", 1)[1]
        worst[kind] = max(worst.get(kind, 0), float(abs(np.array(ours) - want).max() / abs(want).max()))
    print("worst of the largest gradient: " + ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items()))
    assert max(worst.values()) <= TOLERANCE
