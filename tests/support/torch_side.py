"""The other side of the comparison: a Hugging Face folder in transformers, float32, one unpadded row at a time."""

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()
datasets.disable_progress_bars()

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_NAMES = {
    "lora_a": "lora_A.default.weight",
    "lora_b": "lora_B.default.weight",
    "m": "lora_magnitude_vector.default.weight",
}


def load_torch(folder, **changes):
    """The model of a folder, float32, plain attention (the only kind with gemma2's soft caps), no dropout."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **changes)
    return model.eval()


def completion_logps(model, prompt, completion):
    """log p of each completion token after `prompt`, float64, nats: transformers' logits, torch's log-softmax."""
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))[None]
    count = len(completion)
    with torch.no_grad():
        logits = model(ids, logits_to_keep=count + 1, use_cache=False).logits[0, :-1]
    logps = torch.log_softmax(logits.double(), dim=-1)
    return logps.gather(1, ids[0, -count:, None])[:, 0].numpy()


def copy_adapter(model, arrays):
    """Our trainable arrays by name (`x.lora_a` (in, r), `x.lora_b` (r, out), DoRA's `x.m`) into a peft model.

    Every trainable array of the peft model must be met.
    """
    with torch.no_grad():
        for name, array in arrays.items():
            peft_parameter(model, name).copy_(torch.tensor(array.T))
    assert len(arrays) == sum(p.requires_grad for p in model.parameters())


def peft_parameter(model, name):
    """The parameter of a peft model that our array `name` is; matrices are transposed there."""
    path, kind = name.rsplit(".", 1)
    return model.get_parameter(f"base_model.model.{path}.{PEFT_NAMES[kind]}")
