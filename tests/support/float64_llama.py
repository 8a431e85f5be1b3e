"""A llama with LoRA in float64 numpy, written from the papers and not from the package: makes the doctor's golden.

    python tests/support/float64_llama.py      writes mlxdpo/selfcheck/golden.json again

RMSNorm arXiv 1910.07467 eq. 4, rotary positions 2104.09864 eq. 34 (halves, as Llama's checkpoints are laid out),
SwiGLU 2002.05202 eq. 5, LoRA 2106.09685 eq. 3, DPO 2305.18290 eq. 7. Gradients are central differences.
"""

import functools
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[2] / "mlxdpo" / "selfcheck" / "golden.json"
V, D, F, H, K, DH, LAYERS, RANK, SCALE, THETA, EPS, BETA = 96, 32, 48, 4, 2, 8, 2, 4, 2.0, 10000.0, 1e-5, 0.1
LENGTHS = ((41, 7, 4), (41, 7, 12), (35, 9, 3), (50, 2, 16))
STEP = 1e-4  # of the central differences: their error is about STEP**2
PROBED = (0, 5, 17, 63)


def crc32(text):
    """CRC-32 (IEEE 802.3), bit by bit."""
    rest = 0xFFFFFFFF
    for byte in text.encode():
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0xEDB88320 if rest & 1 else 0)
    return rest ^ 0xFFFFFFFF


def drawn(name, count):
    """Integers of 0 to 255 in plain Python."""
    salt, out = crc32(name), []
    for i in range(1, count + 1):
        x = (i * 2654435761 + salt) % 2**32
        x = (x ^ x >> 15) * 739982445 % 2**32
        out.append((x ^ x >> 12) >> 24)
    return out


def array(name, *shape):
    whole = np.array(drawn(name, int(np.prod(shape))), np.float64).reshape(shape)
    if "norm" in name:
        return 1 + (whole // 8 - 16) / 128
    return (whole / 128 - 1) * (1 / 2 if "embed" in name else 1 / 8 if "lora" in name else 1 / 4)


def weights():
    """Every array by its name in a Hugging Face checkpoint, adapters beside them."""
    found = {"embed": array("model.embed_tokens.weight", V, D), "norm": array("model.norm.weight", D)}
    shapes = {"k_proj": (K * DH, D), "o_proj": (D, H * DH), "q_proj": (H * DH, D), "v_proj": (K * DH, D)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        for name, shape in shapes.items():
            found[i, name] = array(f"{at}.self_attn.{name}.weight", *shape)
            if name in ("q_proj", "v_proj"):
                found[i, name, "a"] = array(f"{at}.self_attn.{name}.lora_a", D, RANK)
                found[i, name, "b"] = array(f"{at}.self_attn.{name}.lora_b", RANK, shape[0])
        for name, shape in {"gate_proj": (F, D), "up_proj": (F, D), "down_proj": (D, F)}.items():
            found[i, name] = array(f"{at}.mlp.{name}.weight", *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[i, name] = array(f"{at}.{name}.weight", D)
    return found


def rms(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def rotate(x):
    """(T, heads, DH): pairs (i, i + DH/2) turn by position * THETA^(-2i/DH)."""
    angle = np.arange(len(x))[:, None] * THETA ** (-2 * np.arange(DH // 2) / DH)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    left, right = x[..., : DH // 2], x[..., DH // 2 :]
    return np.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


def linear(w, i, name, x, tuned):
    y = x @ w[i, name].T
    return y + SCALE * (x @ w[i, name, "a"] @ w[i, name, "b"]) if tuned and (i, name, "a") in w else y


def attention(w, i, x, tuned):
    q, k, v = (linear(w, i, n, x, tuned).reshape(len(x), -1, DH) for n in ("q_proj", "k_proj", "v_proj"))
    q, k = rotate(q), rotate(k)
    out = np.zeros_like(q)
    for head in range(H):
        scores = q[:, head] @ k[:, head // (H // K)].T / np.sqrt(DH)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = p / p.sum(-1, keepdims=True) @ v[:, head // (H // K)]
    return linear(w, i, "o_proj", out.reshape(len(x), -1), tuned)


def logp(w, prompt, completion, tuned):
    """Summed log-prob of a completion, nats."""
    row = [*prompt, *completion]
    x = w["embed"][row]
    for i in range(LAYERS):
        x = x + attention(w, i, rms(x, w[i, "input_layernorm"]), tuned)
        y = rms(x, w[i, "post_attention_layernorm"])
        gate, up = linear(w, i, "gate_proj", y, tuned), linear(w, i, "up_proj", y, tuned)
        x = x + linear(w, i, "down_proj", gate / (1 + np.exp(-gate)) * up, tuned)
    z = rms(x, w["norm"]) @ w["embed"].T
    z = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    return sum(z[t - 1, row[t]] for t in range(len(prompt), len(row)))


def pairs():
    """Token ids of the four pairs; the first two share prompt and chosen completion."""
    ids = lambda name, count: [b % (V - 1) + 1 for b in drawn(name, count)]  # noqa: E731
    for i, (prompt, chosen, rejected) in enumerate(LENGTHS):
        yield ids(f"prompt {max(i, 1)}", prompt), ids(f"chosen {max(i, 1)}", chosen), ids(f"rejected {i}", rejected)


def all_logps(w, tuned):
    return np.array([[logp(w, p, y, tuned) for y in (c, r)] for p, c, r in pairs()])


def loss(w, ref):
    """-log sigmoid(beta * (margin of the policy - margin of the reference)), mean over pairs."""
    moved = all_logps(w, True) - ref
    return np.logaddexp(0, -BETA * (moved[:, 0] - moved[:, 1])).mean()


def slope(w, ref, key, at):
    ends = []
    for sign in (1, -1):
        there = w[key].copy()
        there.flat[at] += sign * STEP
        ends.append(loss({**w, key: there}, ref))
    return (ends[0] - ends[1]) / (2 * STEP)


@functools.cache
def golden():
    """What golden.json holds."""
    w = weights()
    ref = all_logps(w, False)
    keys = [key for key in w if len(key) == 3]
    slopes = {f"{i} {name} {side}": [slope(w, ref, (i, name, side), at) for at in PROBED] for i, name, side in keys}
    return {
        "made_by": "tests/support/float64_llama.py",
        "policy": all_logps(w, True).tolist(),
        "reference": ref.tolist(),
        "loss": loss(w, ref),
        "probed": list(PROBED),
        "gradient": slopes,
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden(), indent=2) + "\n")
