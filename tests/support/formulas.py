"""Every objective and modifier once more, from the papers, in NumPy float64 and in the plainest form; slopes by central
differences. Nothing here comes from the package: an error would have to be made twice.

A formula gets the pairs `p`, and `fixed`, the same pairs before a slope was asked for: what has no gradient is
computed from those. It returns one number per pair; of objectives that sort, in some order.
"""

import numpy as np

POLICY = ("chosen", "rejected")


def s(x):
    return 1 / (1 + np.exp(-x))


def ls(x):
    return -np.logaddexp(0, -x)


def a_b(p):
    return p.chosen - p.ref_chosen, p.rejected - p.ref_rejected


def d(p):
    a, b = a_b(p)
    return a - b


def cross(x, e):
    return -(1 - e) * ls(x) - e * ls(-x)


def lead(p, beta):
    return beta * d(p) - p.margin


def token_lead(p, beta):
    a, b = a_b(p)
    return beta * (a / p.chosen_len - b / p.rejected_len) - p.margin


def nll(p):
    """Minus the mean log-prob of all chosen tokens, as one share for each pair."""
    return -p.chosen * len(p.chosen) / p.chosen_len.sum()


def log_odds(mean):
    return mean - np.log(1 - np.exp(mean))


def alpha_reward(mean, alpha):
    return (1 - np.exp(mean) ** -alpha) / alpha if alpha else mean


def penalised(p, beta, weight):
    return beta * (d(p) - weight * np.maximum(0, p.ref_chosen - p.chosen)) - p.margin


def right(p, k):
    """The probability that a label is right, under FA-DPO."""
    return (1 - k.label_smoothing) * p.label + k.label_smoothing * (1 - p.label)


def discopop(x, tau):
    m = s(x / tau)
    return -(1 - m) * ls(x) + m * np.exp(-x)


def exo(x, e):
    q, r = s(x), s(-x)
    return q * (np.log(q) - np.log(1 - e)) + r * (np.log(r) - np.log(e))


def kto(p, fixed, beta, up, down):
    z = max(0.0, (fixed.rejected - fixed.ref_rejected).mean())
    r = p.chosen - p.ref_chosen
    return np.where(p.desirable == 1, up * (1 - s(beta * (r - z))), down * (1 - s(beta * (z - r))))


def simpo_logit(p, k, alpha):
    w, low = (alpha_reward(m, alpha) for m in (p.chosen / p.chosen_len, p.rejected / p.rejected_len))
    return k.beta * (w - low) - k.gamma - p.margin


def wdpo(p, k, fixed):
    """Pair by pair as the paper's two stages describe it; sparsemax by bisection for its threshold."""
    z, n = k.beta * d(fixed), len(fixed.chosen)
    score = [max(0.0, -value) for value in z]
    low, high = min(score) - 1, max(score)
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if sum(max(0.0, v - tau) for v in score) > 1 else (low, tau)
    share = np.array([max(0.0, v - tau) for v in score])
    whole = k.flip_budget * n if max(score) > 0 else 0.0
    q = np.minimum(1, whole * share)
    open_ = q < 1
    if (left := whole - q.sum()) > 1e-9 and share[open_].sum() > 0:
        q[open_] = np.minimum(1, q[open_] + left * share[open_] / share[open_].sum())
    mixed = lambda x: -(1 - q) * ls(x) - q * ls(-x)  # noqa: E731
    cut = np.quantile(mixed(z), 0.7)
    size = abs(z).mean()
    w = 0.02 + (max(0.02, k.winsor_budget) - 0.02) * (s(-z / size).mean() if size else 0.5)
    excess = np.maximum(0, mixed(z) - cut)
    r = np.minimum(1, w * n * excess / excess.sum()) if excess.sum() > 1e-12 else 0 * excess
    return (1 - r) * mixed(k.beta * d(p)) + r * cut


FORMULAS = {
    "sigmoid": lambda p, k, _: cross(lead(p, k.beta), k.label_smoothing),
    "ipo": lambda p, k, _: (token_lead(p, 1) + p.margin - 1 / (2 * k.beta)) ** 2,
    "hinge": lambda p, k, _: np.maximum(0, 1 - lead(p, k.beta)),
    "sigmoid_norm": lambda p, k, _: -ls(token_lead(p, k.beta)),
    "exo_pair": lambda p, k, _: exo(lead(p, k.beta), k.label_smoothing),
    "robust": lambda p, k, _: (
        (-(1 - k.label_smoothing) * ls(lead(p, k.beta)) + k.label_smoothing * ls(-lead(p, k.beta)))
        / (1 - 2 * k.label_smoothing)
    ),
    "fa_dpo": lambda p, k, _: -np.log(right(p, k) * s(lead(p, k.beta)) + (1 - right(p, k)) * s(-lead(p, k.beta))),
    "wdpo": wdpo,
    "discopop": lambda p, k, _: discopop(lead(p, k.beta), k.discopop_tau),
    "dpop": lambda p, k, _: -ls(penalised(p, k.beta, k.dpop_lambda)),
    "r_dpo": lambda p, k, _: -ls(lead(p, k.beta) + k.length_alpha * (p.chosen_len - p.rejected_len)),
    "nca_pair": lambda p, k, _: -ls(k.beta * a_b(p)[0]) - ls(-k.beta * a_b(p)[0]) / 2 - ls(-k.beta * a_b(p)[1]) / 2,
    "bco_pair": lambda p, k, _: -ls(k.beta * a_b(p)[0]) - ls(-k.beta * a_b(p)[1]),
    "sppo_hard": lambda p, k, _: (a_b(p)[0] - 1 / (2 * k.beta)) ** 2 + (a_b(p)[1] + 1 / (2 * k.beta)) ** 2,
    "apo_zero": lambda p, k, _: 1 - s(k.beta * a_b(p)[0]) + s(k.beta * a_b(p)[1]),
    "apo_down": lambda p, k, _: s(k.beta * a_b(p)[0]) + 1 - s(k.beta * d(p)),
    "aot": lambda p, k, _: cross(
        k.beta * (np.sort(p.chosen - p.rejected) - np.sort(p.ref_chosen - p.ref_rejected)), k.label_smoothing
    ),
    "aot_unpaired": lambda p, k, _: cross(
        k.beta * (np.sort(p.chosen - p.ref_chosen) - np.sort(p.rejected - p.ref_rejected)), k.label_smoothing
    ),
    "sft": lambda p, k, _: nll(p),
    "cpo": lambda p, k, _: cross(k.beta * (p.chosen - p.rejected) - p.margin, k.label_smoothing) + k.cpo_alpha * nll(p),
    "orpo": lambda p, k, _: (
        nll(p) - k.beta * ls(log_odds(p.chosen / p.chosen_len) - log_odds(p.rejected / p.rejected_len))
    ),
    "simpo": lambda p, k, _: cross(simpo_logit(p, k, 0), k.label_smoothing),
    "alphapo": lambda p, k, _: cross(simpo_logit(p, k, k.alphapo_alpha), k.label_smoothing),
    "kto": lambda p, k, fixed: kto(p, fixed, k.beta, k.desirable_weight, k.undesirable_weight),
    "apo_zero_unpaired": lambda p, k, _: np.where(
        p.desirable == 1,
        k.desirable_weight * (1 - s(k.beta * a_b(p)[0])),
        k.undesirable_weight * s(k.beta * a_b(p)[0]),
    ),
}

SCORES = {
    "reverse_kl": lambda x, al: x,
    "forward_kl": lambda x, al: 1 - 1 / np.exp(x),
    "js_divergence": lambda x, al: np.log(2 * np.exp(x) / (np.exp(x) + 1)),
    "alpha_divergence": lambda x, al: x if al == 1 else (np.exp(x) ** (al - 1) - 1) / (al - 1),
}


def viewed(p, k):
    """The pairs under LD-DPO, a uniform reference, an f-divergence."""
    if k.ld_alpha is not None:
        part = lambda sums, whole, i: sums[i] + k.ld_alpha * (whole - sums[i])  # noqa: E731
        p = p._replace(
            chosen=part(p.shared, p.chosen, 0),
            rejected=part(p.shared, p.rejected, 1),
            ref_chosen=part(p.ref_shared, p.ref_chosen, 0),
            ref_rejected=part(p.ref_shared, p.ref_rejected, 1),
        )
    nothing = np.zeros_like(p.chosen)
    if k.reference_free:
        p = p._replace(ref_chosen=nothing, ref_rejected=nothing)
    if k.f_divergence != "reverse_kl":
        a, b = (SCORES[k.f_divergence](x, k.f_alpha) for x in a_b(p))
        p = p._replace(chosen=a, rejected=b, ref_chosen=nothing, ref_rejected=nothing)
    return p


def exchanged(p):
    return p._replace(
        chosen=p.rejected, rejected=p.chosen, ref_chosen=p.ref_rejected, ref_rejected=p.ref_chosen,
        chosen_len=p.rejected_len, rejected_len=p.chosen_len, margin=-p.margin,
    )  # fmt: skip


def term(name, p, k, fixed, said):
    if name == "sft":
        return FORMULAS[name](p, k, fixed)
    seen, frozen = viewed(p, k), viewed(fixed, k)
    value = FORMULAS[name](seen, k, frozen)
    if "probability" in said and name != "fa_dpo":  # whose formula has the probability in it
        value = p.label * value + (1 - p.label) * FORMULAS[name](exchanged(seen), k, exchanged(frozen))
    if k.wpo:
        w = np.exp((fixed.chosen - fixed.squares[0]) / fixed.chosen_len)
        value = value * w * np.exp((fixed.rejected - fixed.squares[1]) / fixed.rejected_len)
    return value


def total(p, k, fixed, said=()):
    """The whole loss of a recipe, one number per pair."""
    if "margin" not in said:
        p, fixed = (x._replace(margin=np.zeros_like(x.chosen)) for x in (p, fixed))
    if "probability" not in said:
        p, fixed = (x._replace(label=np.ones_like(x.chosen)) for x in (p, fixed))
    names = k.name.split("+")
    value = sum(w * term(n, p, k, fixed, said) for n, w in zip(names, k.weights or [1] * len(names), strict=True))
    return value * p.weight if "weight" in said else value


def slopes(p, k, said=(), step=3e-4):
    """Derivatives of the sum by the policy's log-probs, (B,) twice; what does not move drops out."""
    found = []
    for name in POLICY:
        column = np.zeros(len(p.chosen))
        for i in range(len(column)):
            up, down, far_up, far_down = (total(_moved(p, name, i, n * step), k, p, said) for n in (1, -1, 2, -2))
            column[i] = (8 * (up - down) - (far_up - far_down)).sum() / (12 * step)  # error of fourth order
        found.append(column)
    return found


def _moved(p, name, i, step):
    column = np.array(getattr(p, name))
    column[i] += step
    return p._replace(**{name: column})
