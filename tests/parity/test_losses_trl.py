"""Every objective and modifier that the installed TRL has, against its own code, run and not copied: values and slopes.

`DPOTrainer._compute_loss` (15 objectives, f-divergences, LD-DPO, WPO, sums), `KTOTrainer._compute_loss`,
`CPOTrainer.cpo_loss` (CPO, SimPO, AlphaPO) and `ORPOTrainer.odds_ratio_loss` run unchanged on stand-in trainers whose
model returns the log-probs we prescribe, in float64. Ours is float32: relative error at most 1e-5, of the value and of
each slope of the sum over the pairs (of numbers that cross zero: see `worst`).

Where TRL differs by design, and what is compared then:
- `sigmoid` has no label smoothing in TRL 1.x: held to the formula in tests/losses/test_losses.py only.
- `ipo` and `sigmoid_norm` under LD-DPO: TRL divides a shortened sum by the full length; ours refuses.
- imitation (`sft`) beside WPO: TRL weighs it too, ours leaves it alone; compared without WPO.
- ORPO: TRL's likelihood term covers prompt tokens too; its odds-ratio term is compared, and ours less `sft`.
- hinge under WPO: TRL multiplies the output of `relu` in place, which torch cannot differentiate: its value alone.
- exponents: TRL bounds those of the alpha-divergence at 80 and the others not at all; ours all at 40. The numbers here
  stay below either.
"""

from collections import defaultdict
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from loss_pairs import TOLERANCE, on_device, random_pairs, slopes_of, worst
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from mlxdpo.config import LossConfig
from mlxdpo.losses import LOSSES, resolve

pytestmark = pytest.mark.parity

TOKENS = 12
ERRORS = {}  # worst relative error by TRL's function, told at the end

DPO_NAMES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
DIVERGENCES = [
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js_divergence"},
    {"f_divergence": "alpha_divergence", "f_alpha": 0.5},
    {"f_divergence": "alpha_divergence", "f_alpha": 1.3},
]


def named(name, beta, **knobs):
    return LossConfig(name=name, **({} if name == "sft" else {"beta": beta}), **knobs)


def taken(name, modifier):
    return modifier not in LOSSES[name].refuses


CASES = (
    [named(name, beta) for name in DPO_NAMES if name != "sft" for beta in (0.01, 0.1, 0.5)]
    + [LossConfig(name="sft")]
    + [named(name, 0.2, label_smoothing=0.3) for name in ("exo_pair", "robust", "aot", "aot_unpaired")]
    + [named("discopop", 0.3, discopop_tau=0.4)]
    + [named(name, 0.1, **knobs) for name in DPO_NAMES if taken(name, "f_divergence") for knobs in DIVERGENCES]
    + [named(name, 0.1, ld_alpha=a) for name in DPO_NAMES if taken(name, "ld_alpha") for a in (0.0, 0.6)]
    + [named(name, 0.1, wpo=True) for name in DPO_NAMES if taken(name, "wpo")]
    + [
        LossConfig(name="sigmoid+sft", weights=[1.0, 0.1]),
        LossConfig(name="sigmoid+bco_pair+sft", weights=[0.8, 0.2, 1.0]),
        LossConfig(name="sigmoid+sft", weights=[1.0, 0.5], ld_alpha=0.3),
        LossConfig(name="sigmoid+apo_zero", ld_alpha=0.3, wpo=True),
    ]
)


def told(what, got, want):
    ERRORS[what] = max(ERRORS.get(what, 0.0), worst(got, want))
    print(f"{what}: worst relative error {worst(got, want):.1e}")
    assert worst(got, want) <= TOLERANCE


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    print("\n" + "\n".join(f"{what}: worst relative error {error:.1e}" for what, error in ERRORS.items()))


def mean_and_slopes(loss, pairs):
    """Mean loss, and the slopes of the sum by the policy's log-probs, (B,) twice."""
    return [np.array(loss(pairs), np.float64).mean(), *slopes_of(loss, pairs)]


def slopes_of_sum(mean, policy):
    """Torch's slopes of the sum over the pairs whose mean is given."""
    return [s.numpy() * len(s) for s in torch.autograd.grad(mean, policy)]


def token_table(seed, count=32):
    """Float64 log-probs of (2B, T) completion tokens of policy and reference, whose sums float32 holds too, lengths,
    squares."""
    rng = np.random.default_rng(seed)
    exact = lambda a: np.round(a * 1024) / 1024  # noqa: E731
    lengths = rng.integers(1, TOKENS + 1, 2 * count)
    ref = exact(rng.normal(-4, 0.7, (2 * count, TOKENS)))
    policy = exact(ref + rng.normal(0, 0.9, ref.shape))
    return policy, ref, lengths, exact(-rng.uniform(0.5, 3, ref.shape))


def summed(table):
    """Our pairs out of the same tokens; sums in float64, so that only the loss is compared."""
    policy, ref, lengths, squares = table
    count, tokens = len(lengths) // 2, np.arange(TOKENS)[None]
    whole = tokens < lengths[:, None]
    part = tokens < np.tile(np.minimum(lengths[:count], lengths[count:]), 2)[:, None]
    halves = lambda a, mask: (a * mask).sum(axis=1).reshape(2, count)  # noqa: E731
    columns = [*halves(policy, whole), *halves(ref, whole), *lengths.reshape(2, count).astype(float)]
    pairs = random_pairs(0, count)._replace(
        shared=halves(policy, part), ref_shared=halves(ref, part), squares=halves(squares, whole)
    )
    return pairs._replace(**dict(zip(pairs._fields[:6], columns, strict=True)))


def dpo_loss(config, table):
    """TRL's mean loss and its slopes by each completion's tokens, (2B, T)."""
    policy, ref, lengths, squares = table
    # TRL's alpha-divergence knows a bound for exponents of 32 and 16 bits only.
    kind = torch.float32 if config.f_divergence == "alpha_divergence" else torch.float64
    positions = torch.arange(TOKENS + 1)[None]
    mask = ((positions > 0) & (positions <= torch.tensor(lengths)[:, None])).long()  # one prompt token
    real = mask[:, 1:].to(kind)
    tokens = torch.tensor(policy, dtype=kind, requires_grad=True)
    filler = torch.zeros_like(real)
    outputs = SimpleNamespace(
        log_probs=tokens * real, entropy=filler, mean_logits=filler, is_top1=filler.bool(),
        log_sum_sq_probs=torch.tensor(squares, dtype=kind),
    )  # fmt: skip
    ref_outputs = SimpleNamespace(log_probs=torch.tensor(ref, dtype=kind) * real)
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    trainer = stand_in(config, lambda **_: ref_outputs)
    if config.wpo and "hinge" in config.name:
        with torch.no_grad():
            return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item(), None
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss.item(), torch.autograd.grad(loss, tokens)[0].numpy() * (len(lengths) // 2)


def stand_in(config, ref_model):
    """What TRL's `_compute_loss` reads of a trainer, on one process."""

    class Policy(torch.nn.Identity):
        is_gradient_checkpointing = False

    class Reference(torch.nn.Module):
        def forward(self, **inputs):
            return ref_model(**inputs)

    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        model=Policy(),
        ref_model=Reference(),
        accelerator=accelerator,
        args=SimpleNamespace(discopop_tau=config.discopop_tau, gradient_checkpointing_kwargs=None),
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        loss_types=config.name.split("+"),
        loss_weights=config.weights or [1.0] * len(config.name.split("+")),
        precompute_ref_logps=False,
        f_divergence_type=config.f_divergence,
        f_alpha_divergence_coef=config.f_alpha,
        ld_alpha=config.ld_alpha,
        use_weighting=config.wpo,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


@pytest.mark.parametrize("config", CASES, ids=lambda c: " ".join(map(str, c.model_dump(exclude_unset=True).values())))
def test_dpo_trainer(config):
    """Slopes by tokens: of a beginning that both completions have, and of the tail that LD-DPO weighs less."""
    table = token_table(seed=2)
    value, by_token = dpo_loss(config, table)
    loss, pairs = resolve(config), on_device(summed(table))
    lengths, count = table[2], len(table[2]) // 2
    shorter = np.tile(np.minimum(lengths[:count], lengths[count:]), 2)

    def by_part(chosen, rejected, shared):
        return loss(pairs._replace(chosen=chosen, rejected=rejected, shared=shared)).sum()

    chosen, rejected, shared = mx.grad(by_part, argnums=(0, 1, 2))(pairs.chosen, pairs.rejected, pairs.shared)
    tail = np.concatenate([np.array(chosen, np.float64), np.array(rejected, np.float64)])
    beginning = tail + np.array(shared, np.float64).reshape(-1)
    rank = np.arange(TOKENS)[None]
    got = np.where(rank < shorter[:, None], beginning[:, None], tail[:, None]) * (rank < lengths[:, None])
    slopes = ([], []) if by_token is None else ([got], [by_token])
    told("DPOTrainer._compute_loss", [np.array(loss(pairs).mean().item()), *slopes[0]], [np.array(value), *slopes[1]])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.4, 0.6)])
@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_kto_trainer(name, beta, weights, shift):
    """`shift` makes the KL term positive; without it, it is clamped at zero."""
    wide = random_pairs(11)
    wide = wide._replace(ref_rejected=wide.rejected + 1 - shift)
    logps = torch.tensor(wide.chosen, requires_grad=True)
    mask = torch.ones(len(logps), 2, dtype=torch.long)
    filler = torch.zeros(len(logps), 1)
    outputs = SimpleNamespace(
        log_probs=logps[:, None], entropy=filler, mean_logits=filler, is_top1=filler.bool(), aux_loss=None
    )
    config = LossConfig(name=name, beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    trainer = stand_in(config, None)
    trainer.__dict__.update(
        loss_type=name,
        calculate_KL=name == "kto",
        precompute_ref_logps=True,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda model, batch: torch.tensor(wide.rejected),
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "label": torch.tensor(wide.desirable == 1),
        "ref_logps": torch.tensor(wide.ref_chosen),
        "ref_KL_logps": torch.tensor(wide.ref_rejected),
    }
    loss = KTOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    slopes = slopes_of_sum(loss, [logps])
    got = mean_and_slopes(resolve(config), on_device(wide))
    assert not got[2].any()  # the other prompts' completions have no slope
    told("KTOTrainer._compute_loss", got[:2], [loss.detach().numpy(), *slopes])


@pytest.mark.parametrize(
    "config",
    [LossConfig(name="cpo", beta=beta, label_smoothing=e) for beta in (0.1, 0.5) for e in (0.0, 0.2)]
    + [LossConfig(name="simpo", beta=beta, gamma=g) for beta in (2.0, 2.5) for g in (0.0, 1.0)]
    + [LossConfig(name="simpo", label_smoothing=0.1)]
    + [LossConfig(name="alphapo", alphapo_alpha=a, beta=b) for a in (-0.3, 0.1, 0.25) for b in (2.0, 2.5)],
    ids=lambda c: " ".join(map(str, c.model_dump(exclude_unset=True).values())),
)
def test_cpo_trainer(config):
    wide = random_pairs(12)
    policy = [torch.tensor(a, requires_grad=True) for a in (wide.chosen, wide.rejected)]
    lengths = [torch.tensor(a) for a in (wide.chosen_len, wide.rejected_len)]
    means = config.name != "cpo"
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=config.alphapo_alpha if config.name == "alphapo" else 0.0,
        loss_type="simpo" if means else "sigmoid",
        beta=config.beta,
        simpo_gamma=config.gamma,
        label_smoothing=config.label_smoothing,
    )
    seen = [p / n for p, n in zip(policy, lengths, strict=True)] if means else policy
    loss = CPOTrainer.cpo_loss(trainer, *seen)[0].mean()
    if not means:  # the likelihood term that CPOTrainer adds: cross entropy over the chosen completions' tokens
        loss = loss + config.cpo_alpha * -policy[0].sum() / lengths[0].sum()
    slopes = slopes_of_sum(loss, policy)
    told("CPOTrainer.cpo_loss", mean_and_slopes(resolve(config), on_device(wide)), [loss.detach().numpy(), *slopes])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_orpo_trainer(beta):
    """TRL computes this in float32 whatever it is given."""
    wide = random_pairs(13)
    policy = [torch.tensor(a, requires_grad=True) for a in (wide.chosen, wide.rejected)]
    means = [p / torch.tensor(n) for p, n in zip(policy, (wide.chosen_len, wide.rejected_len), strict=True)]
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=beta)
    loss = -ORPOTrainer.odds_ratio_loss(trainer, *means)[0].mean()
    slopes = slopes_of_sum(loss, policy)
    whole, imitation = resolve(LossConfig(name="orpo", beta=beta)), resolve(LossConfig(name="sft"))
    got = mean_and_slopes(lambda p: whole(p) - imitation(p), on_device(wide))
    told("ORPOTrainer.odds_ratio_loss", got, [loss.detach().numpy(), *slopes])


def test_every_objective_that_trl_has_is_compared():
    """By TRL's own lists: what it does not have is compared with the formulas of tests/support/formulas.py alone."""
    import inspect
    import re

    dpo = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    kto = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(KTOTrainer._compute_loss)))
    assert dpo == set(DPO_NAMES) and kto == {"kto", "apo_zero_unpaired"}
    assert set(LOSSES) - dpo - kto == {"dpop", "fa_dpo", "wdpo", "r_dpo", "cpo", "orpo", "simpo", "alphapo"}
