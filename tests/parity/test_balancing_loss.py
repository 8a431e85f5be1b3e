"""The routers' balancing loss is transformers' `load_balancing_loss_func`: value, gradient, and on a saved model."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from tiny_tokenizers import base_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mlxdpo.config import ModelConfig
from mlxdpo.forward.router_balance import Routed, balancing_loss, check_routers, watched_routers
from mlxdpo.model.policy import load_policy

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("experts", "k"), [(4, 2), (16, 1), (32, 8)])
def test_value_and_gradient(experts, k):
    draw = np.random.default_rng(experts)
    layers = [draw.normal(size=(3 * 11, experts)).astype(np.float32) for _ in range(3)]
    mask = (np.arange(11)[None] < np.array([[11], [4], [7]])).astype(np.float32)
    theirs = [torch.tensor(a, requires_grad=True) for a in layers]
    wanted = load_balancing_loss_func(tuple(theirs), experts, k, torch.tensor(mask))
    wanted.backward()

    def ours(*logits):
        routed = [Routed(a, mx.argsort(-a, axis=-1)[:, :k]) for a in logits]
        return balancing_loss(routed, mx.array(np.tile(mask.reshape(-1), len(logits))))

    value, found = mx.value_and_grad(ours, argnums=(0, 1, 2))(*map(mx.array, layers))
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    for got, want in zip(found, theirs, strict=True):
        assert np.abs(np.array(got) - want.grad.numpy()).max() < 1e-7


@pytest.mark.parametrize(("config", "kind"), [(MixtralConfig, MixtralForCausalLM), (OlmoeConfig, OlmoeForCausalLM)])
def test_a_saved_model_has_the_aux_loss_of_transformers(tmp_path, config, kind):
    tokenizer = base_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    experts = {"num_local_experts": 4} if config is MixtralConfig else {"num_experts": 4}
    torch.manual_seed(0)
    model = kind(
        config(
            vocab_size=max(300, len(tokenizer)), num_key_value_heads=2, num_experts_per_tok=2, sliding_window=None,
            **sizes, **experts,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(3, 200, (2, 17))
    with torch.no_grad():
        wanted = model.eval()(torch.tensor(tokens), output_router_logits=True).aux_loss.item()
    ours = load_policy(ModelConfig(path=str(tmp_path), dtype="float32")).model
    check_routers(ours)
    with watched_routers(ours) as routed:
        ours(mx.array(tokens))
    found = balancing_loss(routed, mx.ones(len(routed) * tokens.size)).item()
    assert found == pytest.approx(wanted, abs=1e-5) and abs(wanted - 2) > 1e-3
