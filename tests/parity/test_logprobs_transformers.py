"""Log-probs of completions, per token and summed, equal transformers' on torch for the same folder.

Ours come from right-padded batches, theirs from single unpadded rows, so padding, masks and the shift by one are
under test as well. 1e-4 nats per token is for float32 rounding in another order of summation through three layers of
random weights (seen: 2e-5); 1e-3 for sums, which lie near -500, where float32 numbers are 3e-5 apart (seen: 1.1e-4).
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import write_model
from tiny_tokenizers import base_tokenizer
from torch_side import completion_logps as torch_logps
from torch_side import load_torch

from mlxdpo.config import DataConfig, ModelConfig
from mlxdpo.data.batching import collate
from mlxdpo.data.encode import encode_all
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import outline, plan_straight
from mlxdpo.forward.logprobs import next_token_logps, score_pairs
from mlxdpo.model.policy import load_policy
from mlxdpo.types import Preference

pytestmark = pytest.mark.parity

PER_TOKEN, SUMMED = 1e-4, 1e-3
MODELS = {
    "llama-tied": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    # mlx-lm's gemma2 has no sliding window, so the rows stay inside it here.
    "gemma2": ("gemma2", {"sliding_window": 512}),
    # mlx-lm rounds gemma3's embedding scale sqrt(hidden_size) to bfloat16 in every dtype, torch to the weights' dtype
    # (the released sizes differ by up to 0.2 % in float32): 8 is exact in both.
    "gemma3_text": ("gemma3_text", {"hidden_size": 64}),
}
# What makes an architecture what it is: with it switched off in torch, the numbers must not agree any more.
TRAITS = {
    "gemma2": [{"attn_logit_softcapping": None}, {"final_logit_softcapping": None}],
    "gemma3_text": [{"sliding_window": 512}],
}
PAIRS = [
    Preference("What colour is the sky?", " It is blue.", " It is red, of course, as everybody knows.", "1"),
    Preference("Say hi", "!", " no", "2"),
    Preference("A long prompt, " * 6, " then a longer answer" * 5 + ".", " the", "3"),
    Preference("Löwe 7?", " ja\n\nund nein", " 好", "4"),
    Preference("x", " blue red", " red blue", "5"),
]


@pytest.fixture(params=MODELS)
def scored(request, tmp_path, cache):
    """Name, folder, examples, and ours per row: (per-token log-probs, summed log-prob)."""
    kind, changes = MODELS[request.param]
    folder = write_model(tmp_path / "model", base_tokenizer(), kind, seed=3, **changes)
    policy = load_policy(ModelConfig(path=str(folder), dtype="float32"))
    examples, report = encode_all(PAIRS, policy.tokenizer, DataConfig(template="plain"), eos_ids=policy.eos_ids)
    assert report.kept == len(PAIRS)
    ours = {}
    for indices in plan_straight(outline(examples, "prompt"), 2):
        summed = score_pairs(policy.model, collate(examples, indices, 2))
        for slot, i in enumerate(indices):
            for name in ("chosen", "rejected"):
                row = np.concatenate([examples[i].prompt, getattr(examples[i], name)])
                tokens = np.array(next_token_logps(policy.model, mx.array(row[None])))[0, len(examples[i].prompt) - 1 :]
                ours[i, name] = (tokens, getattr(summed, name)[slot].item())
    return request.param, folder, examples, ours


def test_per_token_and_summed(scored):
    name, folder, examples, ours = scored
    model, worst, worst_sum, spread = load_torch(folder), 0.0, 0.0, []
    for (i, side), (tokens, total) in ours.items():
        theirs = torch_logps(model, examples[i].prompt, getattr(examples[i], side))
        assert tokens.shape == theirs.shape
        worst, worst_sum = max(worst, abs(tokens - theirs).max()), max(worst_sum, abs(total - theirs.sum()))
        spread += theirs.tolist()
    print(f"{name}: worst per token {worst:.1e}, summed {worst_sum:.1e} nats")
    assert len(ours) == 2 * len(PAIRS) and np.std(spread) > 0.3  # not a uniform model, whose log-probs say nothing
    assert worst <= PER_TOKEN and worst_sum <= SUMMED
    if name == "gemma3_text":
        assert Examples.of(examples).row_lengths.max() > 4 * model.config.sliding_window


@pytest.mark.parametrize("scored", TRAITS, indirect=True)
def test_the_comparison_sees_every_trait(scored):
    name, folder, examples, ours = scored
    longest = int(Examples.of(examples).row_lengths.argmax())
    for change in TRAITS[name]:
        theirs = torch_logps(load_torch(folder, **change), examples[longest].prompt, examples[longest].chosen)
        assert abs(ours[longest, "chosen"][0] - theirs).max() > 100 * PER_TOKEN, change


def test_gemma2_beyond_its_window_is_another_function_in_mlx_lm(tmp_path, cache):
    """A known difference: mlx-lm attends to everything, so rows beyond `sliding_window` (4096 in the released models)
    score otherwise. When mlx-lm learns it, this fails, and the guard on long rows can go."""
    folder = write_model(tmp_path / "model", base_tokenizer(), "gemma2", sliding_window=16)
    policy = load_policy(ModelConfig(path=str(folder), dtype="float32"))
    ids = np.random.default_rng(0).integers(3, 250, 60).astype(np.int32)
    ours = np.array(next_token_logps(policy.model, mx.array(ids[None])))[0, -30:]
    theirs, unlimited = (
        torch_logps(load_torch(folder, **c), ids[:30], ids[30:]) for c in ({}, {"sliding_window": 512})
    )
    assert abs(ours - unlimited).max() <= PER_TOKEN < 0.01 < abs(ours - theirs).max()
