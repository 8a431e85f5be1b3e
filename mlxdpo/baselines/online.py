"""PPO and RLOO as a run: draw completions, score them, update; a generator of events and a run directory like `train`.

    for event in tune_on_samples(load_config("recipe.yaml", {"stage": "rloo"}), Reward("mine", score)):
        ...

Prompts are those of the recipe's rows (pairs or single answers), held-out ones left out. A step is a function of seed
and number, so a run that was stopped goes on from its last checkpoint to the bit.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.baselines.rollouts import (
    Actor,
    Drawn,
    Reference,
    Reward,
    checked_scores,
    draw_completions,
    new_critic,
    score_completions,
)
from mlxdpo.baselines.updates import Metrics, WeightUpdate, ppo_update, rloo_update
from mlxdpo.config import Config
from mlxdpo.data.encode import encode_prompt
from mlxdpo.data.read import heldout_source, prompt_key, read_preferences, split_heldout
from mlxdpo.data.template import on_day, template_digest
from mlxdpo.distributed.launcher import process_count
from mlxdpo.forward.reward_head import normed_states
from mlxdpo.io.checksum import load_checksummed, save_checksummed
from mlxdpo.io.words import counted
from mlxdpo.model.adapters import adapters_off, attach_lora, load_adapter, save_adapter, with_adapter
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.runs import Run
from mlxdpo.training import checkpoint
from mlxdpo.training.checkpoint import Progress
from mlxdpo.training.manifest import check_same, describe_models
from mlxdpo.training.plan import learning_rate, settled, steps_asked
from mlxdpo.training.reference import find_reference
from mlxdpo.training.step import make_optimizer, make_update
from mlxdpo.types import Event, Text, UserError

UPDATES: dict[str, Callable[..., Metrics]] = {"ppo": ppo_update, "rloo": rloo_update}
CRITIC = "critic.safetensors"
IDLE = (
    "loss",
    "reward",
    "collect",
    "rounds",
    "reference.sync_every",
    "lora.dropout",
    "train.gradient_checkpointing",
    "train.router_aux_loss_coef",
    "train.patience",
    "train.keep_model",
    "data.on_long_prompt",
    "data.on_long_completion",
)
"""Settings without a meaning in these stages: refused when given, never ignored."""
RATE = 5e-6  # peak learning rate that optim.lr auto means here
PPO_ONLY = ("epochs", "minibatches", "clip", "value_clip", "value_coef", "gamma", "lam")


class EncodedPrompts(NamedTuple):
    """Distinct prompts and their token ids; `dropped` had no room for a completion within data.max_length."""

    texts: list[Text]
    ids: list[list[int]]
    dropped: int

    @property
    def digest(self) -> str:
        """SHA-256 over all ids, in order."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()


def tune_on_samples(
    config: Config, reward: Reward, *, resume: Run | None = None, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Tune by PPO or RLOO (`config.stage`) against `reward`; yields "start", "note", "step", "checkpoint", "done".

    Raises `UserError` for a setting without meaning here, unusable data, or a changed input of a resumed run.
    """
    if process_count() > 1:
        raise UserError(f"stage {config.stage} runs in one process; start it without mlx.launch")
    check_rollout_settings(config)
    config = settled(config, RATE, 1.0)
    optimizer = make_optimizer(config.optim)
    policy = load_policy(config.model)
    config = with_adapter(config, policy.model)
    if resume is None:
        config = config.model_copy(update={"data": on_day(config.data, policy.tokenizer, datetime.date.today())})
    prompts = encode_prompts(config, policy)
    reference, penalised = _kl_reference(config, policy)
    manifest = _manifest(config, policy, prompts, reward, penalised)
    run = resume or Run.create(config)
    yield Event("start", 0, {"run": run, "config": config, "prompts": len(prompts.ids)})
    if resume and (run.path / "manifest.json").exists():
        check_same(run.manifest(), manifest, run.path)
    if prompts.dropped:
        yield Event(
            "note", 0, {"text": f"left out {counted(prompts.dropped, 'prompt')}: no room for rollout.max_tokens"}
        )
    with run.exclusive():
        run.write_manifest(manifest)
        if config.model.adapter is None:
            attach_lora(policy.model, config.lora, config.train.seed)
        actor = Actor(policy.model, _critic(config, policy.model))
        checkpoint.remove_unfinished(run.path)
        progress = _restored(run, actor, optimizer) if resume else Progress()
        mover = WeightUpdate(make_update(actor, optimizer), config.optim.max_grad_norm, config.train.batch_size)
        work = _Work(config, policy, actor, reference, reward, prompts, mover)
        save = partial(checkpoint.save, run.checkpoints, actor.model, config.lora, optimizer)
        for event in _steps(work, progress, run, save, should_stop):
            yield event
            if event.kind == "interrupted":
                return
        save_adapter(actor.model, config.lora, run.adapter)
        yield Event("done", work.total, {"run": run, "adapter": run.adapter, "from": f"step-{work.total:06d}"})


def check_rollout_settings(config: Config) -> None:
    """Raise `UserError` for another stage, a setting without meaning in it, or samples that have no siblings."""
    if config.stage not in ("ppo", "rloo"):
        raise UserError(f"stage {config.stage} does not train on samples; set stage to ppo or rloo")
    idle = [*IDLE, *(f"rollout.{knob}" for knob in PPO_ONLY if config.stage == "rloo")]
    given, plain = config.model_dump(), Config().model_dump()
    for name in idle:
        section, _, knob = name.partition(".")
        for key in (knob,) if knob else plain[section]:
            if given[section][key] != plain[section][key]:
                what = f"{section}.{key} {given[section][key]}"
                raise UserError(f"{what} has no effect in stage {config.stage}; drop it")
    if config.train.eval_every not in (0, Config().train.eval_every):
        raise UserError(f"train.eval_every {config.train.eval_every} has no effect in stage {config.stage}; drop it")
    if config.stage == "rloo" and config.rollout.samples < 2:
        raise UserError("rollout.samples is 1, but rloo compares the completions of a prompt; set it to 2 or more")


def encode_prompts(config: Config, policy: Policy) -> EncodedPrompts:
    """The distinct prompts of `data.path` that are not held out, as token ids. Raises `UserError` when none is left."""
    rows: list[Any] = list(read_preferences(config.data)[0])
    if heldout_source(config.data) is None:
        rows = split_heldout(rows, config.data.eval_fraction, config.train.seed)[0]
    first = {prompt_key(row.prompt): row for row in reversed(rows)}
    room = config.data.max_length - config.rollout.max_tokens
    encoded = [
        (row.prompt, encode_prompt(row.prompt, policy.tokenizer, config.data, row.tools).tolist())
        for row in reversed(first.values())
    ]
    kept = [(text, ids) for text, ids in encoded if len(ids) <= room]
    if not kept:
        raise UserError(
            f"{config.data.path}: no prompt leaves room for rollout.max_tokens {config.rollout.max_tokens} within "
            f"data.max_length {config.data.max_length}; raise it, or hold out fewer"
        )
    return EncodedPrompts([text for text, _ in kept], [ids for _, ids in kept], len(encoded) - len(kept))


class _Work(NamedTuple):
    """Everything a step needs; step N is a function of it, N and the weights."""

    config: Config
    policy: Policy
    actor: Actor
    reference: Reference
    reward: Reward
    prompts: EncodedPrompts
    mover: WeightUpdate

    @property
    def per_step(self) -> int:
        """Prompts of a step."""
        return self.config.train.batch_size * self.config.train.gradient_accumulation

    @property
    def total(self) -> int:
        """Steps of the run."""
        return steps_asked(self.config.train, len(self.prompts.ids) / self.per_step)

    def chosen(self, step: int) -> list[int]:
        """The prompts of a step, each `rollout.samples` times: every pass over them in an order of its own."""
        count, seed = len(self.prompts.ids), self.config.train.seed
        places = range(step * self.per_step, (step + 1) * self.per_step)
        passes = range(places[0] // count, places[-1] // count + 1)
        order = {number: np.random.default_rng([seed, number]).permutation(count) for number in passes}
        return [int(order[at // count][at % count]) for at in places for _ in range(self.config.rollout.samples)]

    def step(self, step: int) -> tuple[Metrics, Drawn]:
        """Draw, score, look, update. Returns what to report and what was drawn."""
        config, knobs, size = self.config, self.config.rollout, self.config.train.batch_size
        chosen = self.chosen(step)
        noise, order = np.random.SeedSequence([config.train.seed, step]).generate_state(2)
        ids = [self.prompts.ids[i] for i in chosen]
        drawn = draw_completions(
            self.actor.model, ids, knobs.max_tokens, self.policy.eos_ids, int(noise), max(32, size)
        )
        answers = [self._decoded(one) for one in drawn.completions]
        given = self.reward.score([self.prompts.texts[i] for i in chosen], answers)
        scores, unjudged = checked_scores(self.reward.name, given, len(answers))
        rollouts = score_completions(self.actor, self.reference, drawn, scores, size)
        lr = learning_rate(config.optim, step, self.total)
        update = UPDATES[config.stage]
        found = update(self.actor, self.mover, rollouts, knobs, np.random.default_rng(int(order)), lr)
        return found | {"learning_rate": lr, "completions/unjudged": unjudged}, drawn

    def _decoded(self, completion: list[int]) -> str:
        """The text without the token that ends it."""
        ended = completion[-1] in self.policy.eos_ids
        return self.policy.tokenizer.decode(completion[:-1] if ended else completion)


def _steps(
    work: _Work, progress: Progress, run: Run, save: Callable[..., Path], should_stop: Callable[[], bool]
) -> Iterator[Event]:
    train = work.config.train
    clock = checkpoint.SaveClock(train.save_minutes)

    def keep(progress: Progress) -> Event:
        """Save a checkpoint with the critic beside it."""
        path = save(progress, lambda draft: _save_critic(work.actor, draft))
        checkpoint.prune(run.checkpoints, train.keep_checkpoints, (), train.save_every)
        clock.restart()
        return Event("checkpoint", progress.step, {"path": str(path)})

    while progress.step < work.total:
        if should_stop():
            yield Event("interrupted", progress.step, {"path": keep(progress).values["path"]})
            return
        began = time.perf_counter()
        values, drawn = work.step(progress.step)
        tokens = sum(map(len, drawn.prompts)) + sum(map(len, drawn.completions))
        progress = replace(
            progress,
            step=progress.step + 1,
            pairs=progress.pairs + len(drawn.completions),
            tokens=progress.tokens + tokens,
            seconds=progress.seconds + time.perf_counter() - began,
        )
        left = progress.seconds / progress.step * (work.total - progress.step)
        values = values | {"num_tokens": progress.tokens, "seconds_left": left, "episodes": progress.pairs}
        run.log({"step": progress.step, **values})
        yield Event("step", progress.step, values)
        if progress.step % train.save_every == 0 or progress.step == work.total or clock.due():
            yield keep(progress)


def _kl_reference(config: Config, policy: Policy) -> tuple[Reference, tuple[Policy, str | None]]:
    """What the KL penalty holds the policy at, and whose it is: the frozen weights below the adapter, or a second
    model where there are none."""
    other, adapter = find_reference(config, policy)
    if other is policy:
        if config.model.adapter is None and config.lora.method != "full":
            return Reference(partial(adapters_off, policy.model), shares=True), (policy, None)
        other = load_policy(config.model)
        if adapter is not None:
            load_adapter(other.model, Path(adapter))
    return Reference(partial(contextlib.nullcontext, other.model), shares=False), (other, adapter)


def _critic(config: Config, model: nn.Module) -> nn.Linear | None:
    if config.stage != "ppo":
        return None
    return new_critic(normed_states(model, mx.zeros((1, 1), mx.int32)).shape[-1])


def _save_critic(actor: Actor, draft: Path) -> None:
    if "critic" in actor:
        arrays = dict(actor.critic.parameters())
        save_checksummed(draft / CRITIC, arrays, {"format": "mlx"})


def _restored(run: Run, actor: Actor, optimizer: Any) -> Progress:
    """Weights, critic and optimizer of the last checkpoint, if there is one."""
    saved, progress = checkpoint.steps(run.checkpoints), Progress()
    if saved:
        progress = checkpoint.restore(saved[-1], actor.model, optimizer)
        if "critic" in actor:
            actor.critic.load_weights(list(load_checksummed(saved[-1] / CRITIC).items()))
    run.log({"resumed_from": progress.step})
    return progress


def _manifest(
    config: Config, policy: Policy, prompts: EncodedPrompts, reward: Reward, penalised: tuple[Policy, str | None]
) -> dict[str, Any]:
    """The manifest, with the same parts as that of a run on pairs."""
    return describe_models(config, policy, *penalised) | {
        "template": template_digest(policy.tokenizer, config.data),
        "data": {
            "source": config.data.path,
            "digest": prompts.digest,
            "pairs": 0,
            "prompts": len(prompts.ids),
            "heldout": 0,
            "reports": {},
        },
        "reward": reward.name,
    }
