"""The same steps in float64, by transformers' llama on torch: it tells whose float32 losses are nearer the truth.

No trainer and no figure of speed. Each row is computed alone and whole, with nothing of this project's step. What
transformers rounds to float32 whatever the model's type (the norms, the angles of the positions) is float64 here too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.peers.sides.protocol import Channel, Job, peak_rss, serve

CHUNK = 512  # scored positions whose logits exist at once


def run(job: Job, channel: Channel) -> None:
    """Load, then a step of AdamW for each command."""
    import torch

    torch.set_num_threads(job.threads)
    model, trained = _model(job)
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    pairs, references = job.read_pairs(), {}
    channel.loaded(["torch", "transformers"], ["float64"])
    for batch in job.batches:
        channel.go()
        optimizer.zero_grad()
        loss = 0.0
        for i in batch:
            if i not in references:
                references[i] = _reference_margin(model, pairs[i])
            loss += _backward(model, pairs[i], references[i], job.beta, len(batch)) / len(batch)
        optimizer.step()
        channel.done(loss, peak_rss())


def _model(job: Job) -> tuple[Any, list[Any]]:
    """A llama in float64 with the job's adapters, checkpointed, and what is trained."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).double()
    if model.config.model_type != "llama":
        raise RuntimeError(f"a {model.config.model_type} is not computed in float64 here; give a llama")
    _all_in_float64(model)
    model.requires_grad_(False)
    arrays, trained = load_file(job.adapter), []
    for number, block in enumerate(model.model.layers):
        for key in job.keys:
            path, name = key.rsplit(".", 1)
            a, b = (arrays[f"model.layers.{number}.{key}.lora_{kind}"].double().requires_grad_() for kind in "ab")
            block.get_submodule(path).get_submodule(name).register_forward_hook(_adapter(model, a, b, job.scale))
            trained += [a, b]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), trained


def _adapter(model: Any, a: Any, b: Any, scale: float) -> Any:
    """LoRA (arXiv 2106.09685 eq. 3) as a hook of a linear map; `model.adapted` switches it off for the reference."""
    model.adapted = True
    return lambda module, inputs, out: out + scale * (inputs[0] @ a @ b) if model.adapted else out


def _all_in_float64(model: Any) -> None:
    """RMSNorm (arXiv 1910.07467 eq. 4) and rotary angles (2104.09864 eq. 34) without transformers' float32."""
    import torch
    from transformers.models.llama import modeling_llama

    def norm(self: Any, x: Any) -> Any:
        """Whatever the type of x."""
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def angles(self: Any, x: Any, position_ids: Any) -> tuple[Any, Any]:
        """Cosines and sines, (1, T, Dh) each."""
        angle = position_ids[..., None].double() * theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        both = torch.cat([angle, angle], -1)
        return both.cos(), both.sin()

    config = model.config
    theta = float(config.rope_parameters["rope_theta"])
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    modeling_llama.LlamaRMSNorm.forward = norm
    modeling_llama.LlamaRotaryEmbedding.forward = angles


def _logp(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Any:
    """log p(completion | prompt), nats, ()."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def of_chunk(h: Any, y: Any) -> Any:
        """The same of some positions; its logits are computed again in the backward pass."""
        return -torch.nn.functional.cross_entropy(model.lm_head(h), y, reduction="sum")

    row, y = torch.tensor([[*prompt, *completion]]), torch.tensor(completion)
    states = model.model(input_ids=row, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
    parts = zip(states.split(CHUNK), y.split(CHUNK), strict=True)
    return sum(checkpoint(of_chunk, h, at, use_reentrant=False) for h, at in parts)


def _logps(model: Any, pair: dict[str, list[int]]) -> tuple[float, float]:
    """(log p(chosen), log p(rejected)), without gradients."""
    import torch

    with torch.no_grad():
        chosen, rejected = (float(_logp(model, pair["prompt"], pair[name])) for name in ("chosen", "rejected"))
    return chosen, rejected


def _reference_margin(model: Any, pair: dict[str, list[int]]) -> float:
    """The reference's log p(chosen) - log p(rejected), nats."""
    model.adapted = False
    chosen, rejected = _logps(model, pair)
    model.adapted = True
    return chosen - rejected


def _backward(model: Any, pair: dict[str, list[int]], reference: float, beta: float, count: int) -> float:
    """The pair's loss (arXiv 2305.18290 eq. 7), nats; adds a `count`th of its gradient, one row after the other."""
    chosen, rejected = _logps(model, pair)
    z = beta * (chosen - rejected - reference)
    slope = -beta / (1 + math.exp(z))
    for name, sign in (("chosen", 1), ("rejected", -1)):
        (_logp(model, pair["prompt"], pair[name]) * sign * slope / count).backward()
    return math.log1p(math.exp(-z))


if __name__ == "__main__":
    serve(run)
