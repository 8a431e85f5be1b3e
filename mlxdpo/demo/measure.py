"""What the demo measures before and after, with the same noise and one loaded model, and with intervals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.config import Config
from mlxdpo.data.batching import collate
from mlxdpo.data.encode import encode_all, encode_prompt
from mlxdpo.data.planning import outline, plan_straight
from mlxdpo.data.read import heldout_source, read_pairs
from mlxdpo.demo.rewards import REWARDS
from mlxdpo.forward.layer_plan import evaluate_batch
from mlxdpo.forward.logprobs import forward_fns, score_pairs
from mlxdpo.inference.generate import Completion, generate
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import read_lines
from mlxdpo.model.adapters import adapters_off, load_run
from mlxdpo.model.policy import Policy
from mlxdpo.runs import Run
from mlxdpo_eval.metrics.drift import TextStats, sequence_kl, text_stats
from mlxdpo_eval.metrics.intervals import Interval, cluster_bootstrap, paired_difference

OPENINGS = 80  # the first of the held-out ones: enough for the intervals, in less than four minutes
SAMPLES, MAX_TOKENS, BATCH = 2, 24, 80
PAIRS = 8  # held-out pairs computed at once
ROWS = 16  # rows of a forward pass whose (R, T, V) logits are held


class Samples(NamedTuple):
    """Continuations of the held-out openings, `SAMPLES` of each: opening ids, text and tokens of each one."""

    prompts: list[str]
    ids: list[list[int]]
    texts: list[str]
    completions: list[Completion]

    def stats(self) -> TextStats:
        """Length, repetition and diversity."""
        done = self.completions
        return text_stats([c.tokens for c in done], [c.finish == "stop" for c in done])


class Result(NamedTuple):
    """What the demo found. Intervals are 95 %, clustered by opening; None where the data cannot carry one."""

    rewards: dict[str, dict[str, Interval | None]]
    accuracy: Interval | None
    margin: Interval | None
    kl: Interval | None
    before: TextStats
    after: TextStats


def measure(run: Run, seed: int) -> tuple[Result, Samples, Samples]:
    """Sample before and after, judge, score the held-out pairs; writes `eval/demo.json` and `samples/`."""
    config, policy = run.config(), load_run(run)
    prompts = [row["prompt"] for row in read_lines(run.path / "data" / "prompts.jsonl")][:OPENINGS]
    with adapters_off(policy.model):
        before = sample(policy, config, prompts, seed)
    after = sample(policy, config, prompts, seed)
    margins, openings = heldout_margins(policy, config)
    result = Result(
        {name: compare(name, before, after) for name in REWARDS},
        cluster_bootstrap([0.5 * (1 + np.sign(margin)) for margin in margins], openings),
        cluster_bootstrap(margins, openings),
        cluster_bootstrap(on_policy_kl(policy, after), after.prompts),
        before.stats(),
        after.stats(),
    )
    save(run, result, before, after)
    return result, before, after


def sample(policy: Policy, config: Config, prompts: Sequence[str], seed: int) -> Samples:
    """Continue every opening `SAMPLES` times at temperature 1, with noise that belongs to opening and seed."""
    encoded = [encode_prompt(prompt, policy.tokenizer, config.data).tolist() for prompt in prompts]
    ids = [one for one in encoded for _ in range(SAMPLES)]
    settings: dict[str, Any] = {"max_tokens": MAX_TOKENS, "seed": seed, "batch_size": BATCH}
    done = generate(policy.model, ids, eos_ids=policy.eos_ids, **settings)
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES)]
    return Samples(repeated, ids, [policy.tokenizer.decode(c.tokens) for c in done], done)


def compare(name: str, before: Samples, after: Samples) -> dict[str, Interval | None]:
    """A judge's mean reward before and after and its paired change, clustered by opening."""
    old, new = ([REWARDS[name](p + t) for p, t in zip(s.prompts, s.texts, strict=True)] for s in (before, after))
    clusters = before.prompts
    return {
        "before": cluster_bootstrap(old, clusters),
        "after": cluster_bootstrap(new, clusters),
        "change": paired_difference(old, new, clusters),
    }


def heldout_margins(policy: Policy, config: Config) -> tuple[list[float], list[str]]:
    """Implicit reward margin of each held-out pair, beta * d, and the opening it belongs to."""
    source = heldout_source(config.data)
    rows, _ = read_pairs(config.data, *(source or ()))
    examples, _ = encode_all(rows, policy.tokenizer, config.data, eos_ids=policy.eos_ids)
    margins, ways = np.zeros(len(examples)), forward_fns(policy.model)
    for indices in plan_straight(outline(examples, config.data.group), PAIRS):
        batch = collate(examples, indices, PAIRS)
        tuned = score_pairs(policy.model, batch, ways.score)
        with adapters_off(policy.model):
            start = score_pairs(policy.model, batch, ways.score)
        evaluate_batch(batch, tuned, start)
        chosen, rejected = tuned.chosen - start.chosen, tuned.rejected - start.rejected
        margins[list(indices)] = np.array(chosen - rejected)[: len(indices)]
    return (config.loss.beta * margins).tolist(), [str(row.prompt) for row in rows]


def on_policy_kl(policy: Policy, samples: Samples) -> list[float]:
    """KL(policy || reference) of each of the tuned policy's own samples: nats, at temperature 1."""
    result = [0.0] * len(samples.ids)
    for indices, tokens, mask in _rows(samples):
        tuned = policy.model(tokens)
        with adapters_off(policy.model):
            start = policy.model(tokens)
        mx.eval(tuned, start)
        first = min(len(samples.ids[i]) for i in indices) - 1  # before it there is only prompt
        tuned, start, mask = tuned[:, first:], start[:, first:], mask[:, first:]
        divergence = sequence_kl(lambda at, t=tuned: t[:, at], lambda at, s=start: s[:, at], mask)
        for i, nats in zip(indices, divergence.tolist(), strict=True):
            result[i] = nats
    return result


def _rows(samples: Samples) -> Iterator[tuple[list[int], mx.array, mx.array]]:
    """Padded (R, T) rows and masks, 1 where the position's next token was sampled (a stop token included)."""
    order = sorted(range(len(samples.ids)), key=lambda i: len(samples.ids[i]) + len(samples.completions[i].tokens))
    for start in range(0, len(order), ROWS):
        indices = order[start : start + ROWS]
        rows = [samples.ids[i] + samples.completions[i].tokens for i in indices]
        width = max(map(len, rows))
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.float32)
        for row, (i, ids) in enumerate(zip(indices, rows, strict=True)):
            tokens[row, : len(ids)] = ids
            drawn = len(samples.completions[i].tokens) + (samples.completions[i].finish == "stop")
            mask[row, len(samples.ids[i]) - 1 : len(samples.ids[i]) - 1 + drawn] = 1
        yield indices, mx.array(tokens), mx.array(mask)


def save(run: Run, result: Result, before: Samples, after: Samples) -> None:
    """Write the figures and every sample."""
    values = result._asdict() | {"before": result.before._asdict(), "after": result.after._asdict()}
    write_json(run.path / "eval" / "demo.json", _plain(values))
    for name, samples in (("before", before), ("after", after)):
        rows = [
            {"prompt": prompt, "text": text, "finish": completion.finish}
            for prompt, text, completion in zip(samples.prompts, samples.texts, samples.completions, strict=True)
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(run.path / "samples" / f"{name}.jsonl", lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value._asdict()
    return {name: _plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value
