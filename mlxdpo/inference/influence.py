"""Which training pairs taught an answer: inner products of gradients of what was trained.

A step on pair z moves the trained arrays by -eta grad loss(z), and so changes log p of an answer by -eta <grad loss(z),
grad log p>, to first order (TracIn, arXiv 2002.08484 section 3.2; here at the weights that the run ended with).
Here both gradients have length 1, as in LESS (arXiv 2402.04333 section 4.1): a pair that is learnt by now has a small
gradient, a short answer has a large one, and neither says what was taught.

Gradients are kept by their random projections. Each array is multiplied by random signs and folded to `WIDTH` numbers:
inner products stay right on average, with an error of about 1 / sqrt(WIDTH) (feature hashing, arXiv 0902.2206 lemma 2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.data.batching import collate
from mlxdpo.data.encode import encode
from mlxdpo.data.examples import Examples
from mlxdpo.data.planning import outline, plan_straight
from mlxdpo.data.read import heldout_source, read_pairs, split_heldout
from mlxdpo.data.report import Report
from mlxdpo.forward.choose_forward import ForwardFns, forward_fns
from mlxdpo.forward.logprobs import Forward, score_pairs
from mlxdpo.inference.trained_run import TrainedRun
from mlxdpo.io.checksum import DamagedError, load_checksummed, save_checksummed
from mlxdpo.io.digest import folder_digest, json_digest
from mlxdpo.io.words import counted
from mlxdpo.losses import Loss
from mlxdpo.machine.device import cache_folder, this_machine, versions
from mlxdpo.model.adapters import dropout_off
from mlxdpo.training.preflight import with_details
from mlxdpo.training.reference import identity_of, shared_rows, with_reference
from mlxdpo.training.stages import stage_of
from mlxdpo.training.step import gradient_norm, make_scorer
from mlxdpo.types import Batch, Example, Pairs, Preference, Text, UnpairedExample, UserError

WIDTH = 4096  # numbers that are kept of a gradient: an error of 1/64 of a cosine, 8 KB a pair
BLOCK = 32  # pairs in a file of the cache, and so what an interruption costs


def training_pairs(trained: TrainedRun) -> list[Preference]:
    """The rows that a run was trained on, those held out not among them. Raises `UserError` where they are gone."""
    data = trained.config.data
    trained.run.need("data.path")
    rows, _ = read_pairs(data)
    if heldout_source(data) is None:
        rows, _ = split_heldout(rows, data.eval_fraction, trained.config.train.seed)
    return rows


class AnswerPart(NamedTuple):
    """Tokens of an answer to a prompt that are asked about; `example` scores them alone, as its chosen completion."""

    example: Example
    text: str


def answer_part(
    trained: TrainedRun, prompt: Text, completion: str, part: str | None = None, occurrence: int = 1
) -> AnswerPart:
    """The tokens of `completion` in which `part` occurs, for the first time or that `occurrence`; without a part all,
    with the end of the turn.

    Raises `UserError` for a part that the completion does not contain so often, and for texts that cannot be encoded.
    """
    row = UnpairedExample(prompt, completion, True, "completion")
    data, tokenizer = trained.config.data.model_copy(update={"on_bad_row": "stop"}), trained.policy.tokenizer
    example = encode(row, tokenizer, data, Report(), eos_ids=trained.policy.eos_ids)
    if example is None:
        raise UserError(f"the answer does not fit data.max_length {data.max_length}; ask about a shorter one")
    if part is None:
        return AnswerPart(example, completion)
    places = [found.start() for found in re.finditer(re.escape(part), completion)] if part else []
    if len(places) < occurrence:
        times = f"occurs {counted(len(places), 'time')}" if places else "does not occur"
        raise UserError(f'"{part}" {times} in the answer; it is: {completion}')
    start = places[occurrence - 1]
    ends = token_ends(tokenizer, example, completion)
    asked = (ends > start) & (np.concatenate([[0], ends[:-1]]) < start + len(part))
    return AnswerPart(replace(example, chosen_mask=asked, rejected_mask=asked), part)


def token_ends(tokenizer: Any, example: Example, completion: str) -> np.ndarray:
    """(T,) how many characters of the completion are written after each of its tokens."""
    decode = lambda ids: tokenizer.decode([int(i) for i in ids]).rstrip("\N{REPLACEMENT CHARACTER}")  # noqa: E731
    before, whole = decode(example.prompt), np.concatenate([example.prompt, example.chosen])
    written = [len(decode(whole[: len(example.prompt) + n + 1])) - len(before) for n in range(len(example.chosen))]
    # What stands between prompt and answer, such as a space that the template adds, is not of the answer.
    shown = decode(whole)[len(before) :]
    return np.array(written) - max(0, shown.find(completion))


def trained_gradient(model: nn.Module, batch: Batch, forward: Forward, value: Callable[[Pairs], mx.array]) -> Any:
    """The gradient of a sum of values of pairs, (B,), by the trained arrays of a model: a tree as they are."""
    return nn.value_and_grad(model, lambda: value(score_pairs(model, batch, forward)).sum())()[1]


def projected(gradients: Any, width: int = WIDTH, seed: int = 0) -> mx.array:
    """(width,) float32: a gradient of length 1, projected at random; zeros for one that is zero.

    The same seed projects every gradient alike.
    """
    found = mx.zeros(width)
    for number, (_, array) in enumerate(sorted(tree_flatten(gradients))):
        signs, place = mx.random.split(mx.random.key(seed * 1_000_003 + number))
        flat = array.astype(mx.float32).reshape(-1)
        flat = mx.where(mx.random.bernoulli(0.5, flat.shape, signs), flat, -flat)
        folded = mx.pad(flat, (0, -flat.size % width)).reshape(-1, width).sum(axis=0)
        # Arrays start at different places, or columns with large gradients would fall on one another.
        found = found + mx.roll(folded, mx.random.randint(0, width, (), key=place).item())
    return found / mx.maximum(gradient_norm(gradients), 1e-30)


def answer_gradient(trained: TrainedRun, asked: AnswerPart) -> np.ndarray:
    """(WIDTH,) the direction in which log p of an answer's tokens rises fastest, projected."""
    model = trained.policy.model
    with dropout_off(model):
        batch = collate([asked.example], (0,), 1)
        gradients = trained_gradient(model, batch, forward_fns(model).train, lambda pairs: pairs.chosen)
        return np.array(projected(gradients))


def pair_gradients(trained: TrainedRun, examples: Sequence[Example]) -> Generator[int, None, np.ndarray]:
    """(N, WIDTH) float16: for each pair the direction of a step on it, projected. Yields pairs done, as they are.

    Kept in the cache, `BLOCK` pairs a file: asked again, and after an interruption, nothing is computed twice. Raises
    `UserError` for a run that was not trained on pairs.
    """
    loss = pair_loss(trained)
    parts = [examples[at : at + BLOCK] for at in range(0, len(examples), BLOCK)]
    found, done = [], 0
    for part in parts:
        file = _cache_file(trained, part)
        rows = _cached(file)
        if rows is None:
            rows = _block_gradients(trained, loss, part)
            save_checksummed(file, {"gradients": mx.array(rows)})
        found.append(rows)
        done += len(part)
        yield done
    return np.concatenate(found)


def influences(gradients: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """(N,) float32, about -1 to 1: how far a step on each pair, (N, W), goes towards the answer, (W,). Above 0 it makes
    the answer likelier."""
    return gradients.astype(np.float32) @ answer.astype(np.float32)


def pair_loss(trained: TrainedRun) -> Loss:
    """What the run minimised. Raises `UserError` for a run that was not trained on pairs."""
    if trained.config.stage != "dpo":
        raise UserError(f"{trained.run.path} is of stage {trained.config.stage}; influence is asked of runs on pairs")
    loss = stage_of(trained.config).loss(trained.config)
    if not loss.paired:
        raise UserError(f"{trained.run.path} was trained on thumbs ({loss.config.name}); influence is asked of pairs")
    return loss


def _cache_file(trained: TrainedRun, examples: Sequence[Example]) -> Path:
    """The file of a block, named by all that its gradients depend on."""
    rows = Examples.of(examples)
    identity = {
        "reference": trained.run.manifest()["reference"],
        "policy": [trained.policy.identity["digest"], folder_digest(trained.run.adapter)],
        "loss": [trained.config.loss.model_dump(), trained.config.data.columns],
        "made by": [versions(), this_machine().kind, WIDTH],
        "pairs": rows.rows.tobytes().hex() + rows.extras.tobytes().hex(),
    }
    return cache_folder() / "influence" / f"{json_digest(identity, str)[:32]}.safetensors"


def _cached(file: Path) -> np.ndarray | None:
    """The gradients in a file of the cache; None where there is none, or it is damaged: it is made again."""
    try:
        return np.array(load_checksummed(file)["gradients"]) if file.exists() else None
    except DamagedError:
        return None


def _block_gradients(trained: TrainedRun, loss: Loss, examples: Sequence[Example]) -> np.ndarray:
    """One pair at a time: what is wanted are the gradients of each, and not their sum."""
    model, config = trained.policy.model, trained.config
    ref = _logps_of_reference(trained, loss, examples)
    forward = with_details(forward_fns(model, config.train.gradient_checkpointing), loss, config).train
    rows = []
    with dropout_off(model):
        for i in range(len(examples)):
            batch = collate(examples, (i,), 1, ref)
            row = projected(trained_gradient(model, batch, forward, lambda pairs: -loss(pairs)))
            mx.eval(row)
            rows.append(np.array(row.astype(mx.float16)))
    return np.stack(rows)


def _logps_of_reference(trained: TrainedRun, loss: Loss, examples: Sequence[Example]) -> np.ndarray | None:
    """(N, 2), or (N, 4) for LD-DPO: from the cache in which training left them, where they are still there."""
    if "reference" not in loss.needs:
        return None
    then = trained.run.manifest()["reference"]
    rows = shared_rows(examples) if "shared" in loss.needs else None
    batches = plan_straight(outline(examples, trained.config.data.group), trained.config.train.batch_size)
    with trained.reference() as model, dropout_off(model):
        ways: ForwardFns = with_details(forward_fns(model), loss, trained.config)
        scorer, identity = make_scorer(model, ways.score), identity_of(then, then["adapter"])
        scoring = with_reference(examples, scorer, identity, batches, trained.config.train.batch_size, rows=rows)
        *_, (_, logps) = scoring
    assert logps is not None
    return logps
