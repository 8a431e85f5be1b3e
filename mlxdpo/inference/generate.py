"""Sampling from a loaded model, many prompts at once, with noise that belongs to the prompt.

The token at position t of a prompt is drawn with noise that depends on (seed, prompt tokens, how often the
prompt came before in the list, t) and on nothing else. So a prompt meets the same noise before and after
tuning (common random numbers: the difference of two runs is less noisy than either), whatever batch it is in
and whatever order the prompts have. Batching is mlx-lm's own: it holds for every cache that mlx-lm can batch,
and a finished row makes room for the next prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlxdpo.machine.device import wire_memory
from mlxdpo.model.limits import check_ids
from mlxdpo.types import UserError

# Prompt tokens of one prefill pass over the whole batch: bounds its memory whatever the prompts' lengths.
PREFILL_TOKENS = 16_384
# Of a continuation that takes turns with others: the longest that the others wait.
STEP_TOKENS = 512

Sampler = Callable[[mx.array], mx.array]
"""(1, V) log-probabilities -> (1,) token id."""


class Completion(NamedTuple):
    """A sampled continuation. `tokens` leaves out the stop token; `finish` says whether there was one."""

    tokens: list[int]
    finish: Literal["stop", "length"]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Completion]:
    """Continue each prompt (token ids) by up to `max_tokens` tokens; results in the order of `prompts`.

    Temperature 0 takes the likeliest token. A prompt given k times gets k different samples. A completion
    ends at any of `eos_ids`. Raises `UserError` for an empty prompt or a setting out of range.
    """
    done = dict(
        finished(
            model,
            prompts,
            max_tokens=max_tokens,
            eos_ids=eos_ids,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=batch_size,
        )
    )
    return [done[i] for i in range(len(prompts))]


def finished(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
) -> Iterator[tuple[int, Completion]]:
    """`generate`, one by one as they finish: (index into `prompts`, completion). For progress bars."""
    _check_sampling(prompts, max_tokens, temperature, top_p, batch_size)
    if not prompts:
        return
    check_ids(model, max(map(max, prompts)))
    samplers = [
        greedy if temperature == 0 else seeded_sampler(stream, temperature, top_p)
        for stream in noise_streams(prompts, seed)
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()  # dropout on the adapters would make the samples another model's
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in sorted(eos_ids)] or None,
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
        prefill_step_size=max(32, PREFILL_TOKENS // batch_size),
    )
    wire_memory()  # the generator has just wired all that Metal recommends: take back a share of it
    try:
        uids = generator.insert([list(prompts[i]) for i in order], samplers=[samplers[i] for i in order])
        yield from _collect(generator, dict(zip(uids, order, strict=True)))
    finally:
        generator.close()
        model.train(was_training)


def stepwise(
    enter: Callable[[], AbstractContextManager[Any]],
    prompt: Sequence[int],
    *,
    max_tokens: int,
    eos_ids: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    occurrence: int = 0,
) -> Generator[int | None, None, Literal["stop", "length"]]:
    """`generate` of one prompt, a token a step; what it returns at the end is the finish.

    Yields None while the prompt is read. `enter` gives the model for the duration of a step only, so that several
    continuations by the same weights with other adapters take turns. `occurrence` says which sample of the prompt
    this is: `generate` counts them from 0. The model must be in evaluation mode.
    """
    _check_sampling([prompt], max_tokens, temperature, top_p, 1)
    stream = (seed, occurrence, *noise_streams([prompt], seed)[0][2:])
    sample = greedy if temperature == 0 else seeded_sampler(stream, temperature, top_p)
    with enter() as model:
        check_ids(model, max(prompt))
        cache = make_prompt_cache(model)
    feed = list(prompt)
    for count in range(max_tokens):
        while len(feed) > STEP_TOKENS:
            with enter() as model:
                model(mx.array([feed[:STEP_TOKENS]]), cache=cache)
                mx.eval([layer.state for layer in cache])
            feed = feed[STEP_TOKENS:]
            yield None
        with enter() as model:
            logits = model(mx.array([feed]), cache=cache)[:, -1]
            token = int(sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).item())
        if token in eos_ids:
            return "stop"
        feed = [token]
        yield token
        if count % 256 == 255:
            mx.clear_cache()  # the growing caches leave buffers of every size behind
    return "length"


def _check_sampling(
    prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, top_p: float, size: int
) -> None:
    if empty := [i for i, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise UserError(f"prompt {empty[0] + 1} of {len(prompts)} is empty: there is nothing to continue; leave it out")
    if max_tokens < 1 or size < 1:
        raise UserError(f"max_tokens is {max_tokens} and batch_size {size}; both must be at least 1")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature is {temperature} and top_p {top_p}; expected temperature >= 0 and 0 < top_p <= 1")


def _collect(generator: BatchGenerator, index: dict[int, int]) -> Iterator[tuple[int, Completion]]:
    tokens: dict[int, list[int]] = {uid: [] for uid in index}
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                yield index[response.uid], Completion(tokens.pop(response.uid), response.finish_reason)


def noise_streams(prompts: Sequence[Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """The noise stream of each prompt: (seed, occurrence, digest of its tokens as eight 32-bit words)."""
    seen: Counter[bytes] = Counter()
    result = []
    for prompt in prompts:
        digest = hashlib.sha256(np.asarray(prompt, "<i8").tobytes()).digest()
        result.append((seed, seen[digest], *np.frombuffer(digest, "<u4").tolist()))
        seen[digest] += 1
    return result


def greedy(logps: mx.array) -> mx.array:
    """(1, V) -> (1,) the likeliest token."""
    return mx.argmax(logps, axis=-1)


def seeded_sampler(stream: tuple[int, ...], temperature: float, top_p: float) -> Sampler:
    """A sampler for one row that counts its own positions.

    Draws from softmax(logps / temperature) by the Gumbel-max trick: the argmax of logits plus independent
    Gumbel noise is a sample (arXiv 2110.01515). Two models that differ little then mostly agree.
    """
    position = 0

    def sample(logps: mx.array) -> mx.array:
        """(1, V) log-probs -> the token drawn at this position, (1,)."""
        nonlocal position
        words = np.random.SeedSequence([*stream, position]).generate_state(2)
        position += 1
        scaled = logps.astype(mx.float32) / temperature
        noise = mx.random.gumbel(scaled.shape, key=mx.array(words))
        return mx.argmax((nucleus(scaled, top_p) if top_p < 1 else scaled) + noise, axis=-1)

    return sample


def nucleus(logits: mx.array, top_p: float) -> mx.array:
    """(R, V) -> (R, V): the likeliest tokens that reach `top_p`, the rest -inf (arXiv 1904.09751, eq. 2)."""
    order = mx.argsort(-logits, axis=-1)
    probs = mx.take_along_axis(mx.softmax(logits, axis=-1), order, axis=-1)
    outside = mx.cumsum(probs, axis=-1) - probs >= top_p  # what came before a token already suffices
    ranked = mx.where(outside, -mx.inf, mx.take_along_axis(logits, order, axis=-1))
    return mx.put_along_axis(logits, order, ranked, axis=-1)
