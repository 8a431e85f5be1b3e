"""A round's merged reference: the start and the policies of earlier rounds, weighted by how they rank its new pairs.

With the last policy as reference, its errors add up from round to round; a merge of the policies on the way is
smoother (TPMM-DPO, arXiv 2605.23398, which learns the weights of the merge). We could not read its formulas; what is
learned here is ours. The implicit reward of policy k on a pair is r_k = beta * (its log-ratio of chosen to rejected,
less the start's), arXiv 2305.18290 section 5.1. To first order in the weights, a merge has the weighted sum of its
parts' log-probs, so the weights are those whose summed reward makes the new pairs likeliest under Bradley-Terry:

    minimise mean_i -log sigmoid(sum_k w_k r_k(i))  over w_k >= 0, sum_k w_k <= 1

a convex problem of a few numbers. What is left to 1 is the start's. The policies have not been trained on these pairs:
one that ranks them no better than chance gets a small weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.optimize import LinearConstraint, minimize
from scipy.special import expit

from mlxdpo.io.atomic import write_json
from mlxdpo.io.checksum import save_checksummed, write_checksummed_json
from mlxdpo.io.staging import publish_new, staging_folder
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, adapter_settings
from mlxdpo.model.strength import weighted_sum

MERGED, SHARES = "reference", "weights.json"
"""In a round's directory: the merged adapter, and in it the weight of each part."""
MOST_PAIRS = 256  # of a round's pairs, that weights are learned from: each is scored once by every earlier policy
LEAST = 0.005  # weights below are rounding


def learn_weights(rewards: np.ndarray) -> np.ndarray:
    """Weights (K,) of K policies in the merge, from their implicit reward margins (K, N) on N new pairs, in nats.

    They are 0 or more and sum to at most 1.
    """
    count, size = len(rewards), max(float(np.abs(rewards).mean()), 1e-12)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Value and gradient, divided by the size of rewards: the search stops at slopes that it takes for none."""
        margins = weights @ rewards
        return float(np.logaddexp(0, -margins).mean()) / size, -(rewards * expit(-margins)).mean(axis=1) / size

    most = LinearConstraint(np.ones((1, count)), -np.inf, 1)
    start = np.full(count, 1 / (count + 1))
    found = minimize(loss, start, jac=True, bounds=[(0, 1)] * count, constraints=[most], method="SLSQP", tol=1e-10).x
    return np.where(found < LEAST, 0.0, np.clip(found, 0, 1))


def write_merged(parts: Mapping[str, tuple[Path | None, float]], out: Path) -> None:
    """Write the merge of `parts`, name -> (adapter folder, weight), as an adapter folder `out`; whole or absent.

    A folder of None is the base model. Raises `UserError` as `weighted_sum`.
    """
    terms = [(folder, weight) for folder, weight in parts.values() if folder is not None]
    lora, arrays = weighted_sum([term for term in terms if term[1]] or terms[:1])
    with staging_folder(out.parent, f".{out.name}-draft-") as draft:
        save_checksummed(draft / WEIGHTS, arrays, {"format": "mlx"})
        write_checksummed_json(draft / SETTINGS, adapter_settings(lora))
        write_json(draft / SHARES, {name: weight for name, (_, weight) in parts.items()})
        publish_new(draft, out)
