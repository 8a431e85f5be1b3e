"""Sampling from a loaded model, many prompts at once, with noise that belongs to the prompt.

The token at position t of a prompt is drawn with noise that depends on (seed, prompt tokens, how often the
prompt came before in the list, t) and on nothing else. So a prompt meets the same noise before and after
tuning (common random numbers: the difference of two runs is less noisy than either), whatever batch it is in
and whatever order the prompts have. Batching is mlx-lm's own: it holds for every cache that mlx-lm can batch,
and a finished row makes room for the next prompt. All rows of a batch are drawn by the same few kernels; which noise is
whose, a row carries with it in mlx-lm's list of caches.
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

from mlxdpo.machine.device import limit_memory
from mlxdpo.model.limits import check_ids
from mlxdpo.types import UserError

# Prompt tokens of one prefill pass over the whole batch: bounds its memory whatever the prompts' lengths.
PREFILL_TOKENS = 16_384
# Of a continuation that takes turns with others: the longest that the others wait.
STEP_TOKENS = 512


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
    count: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[int, Completion]]:
    """`generate`, one by one as they finish: (index into `prompts`, completion). For progress bars.

    `count` is told after every step how many tokens it sampled.
    """
    _check_sampling(prompts, max_tokens, temperature, top_p, batch_size)
    if not prompts:
        return
    check_ids(model, max(map(max, prompts)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()  # dropout on the adapters would make the samples another model's
    batched = _NoisyBatch(model)
    generator = BatchGenerator(
        batched,  # type: ignore[arg-type]  # it is only called
        sampler=lambda logps: draw(logps, temperature, top_p, batched.noise),
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in sorted(eos_ids)] or None,
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
        prefill_step_size=max(32, PREFILL_TOKENS // batch_size),
    )
    limit_memory()  # the generator has just wired all that Metal recommends: take back a share of it
    try:
        streams = noise_streams(prompts, seed)
        caches = [[*make_prompt_cache(model), _RowNoise([NoiseStream(streams[i])])] for i in order]
        uids = generator.insert([list(prompts[i]) for i in order], caches=caches)
        yield from _collect(generator, dict(zip(uids, order, strict=True)), count)
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
    noise = NoiseStream((seed, occurrence, *noise_streams([prompt], seed)[0][2:]))
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
            logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            token = int(draw(logps, temperature, top_p, [noise]).item())
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
        raise UserError(f"prompt {empty[0] + 1} of {len(prompts)} is empty; remove it")
    if max_tokens < 1 or size < 1:
        raise UserError(f"max_tokens is {max_tokens} and batch_size {size}; both must be at least 1")
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise UserError(f"temperature is {temperature} and top_p {top_p}; expected temperature >= 0 and 0 < top_p <= 1")


def _collect(
    generator: BatchGenerator, index: dict[int, int], count: Callable[[int], None]
) -> Iterator[tuple[int, Completion]]:
    tokens: dict[int, list[int]] = {uid: [] for uid in index}
    while responses := generator.next_generated():
        count(len(responses))
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


class NoiseStream:
    """The noise of one row: a key for each position, in turn."""

    def __init__(self, stream: tuple[int, ...]):
        # As SeedSequence would cut these numbers up itself, three times as slowly; the last word is the position.
        words = [(number >> shift) & 0xFFFFFFFF for number in stream for shift in range(0, _bit_length(number), 32)]
        self._entropy = np.array([*words, 0], np.uint32)

    def key(self) -> np.ndarray:
        """The next position's key, (2,) uint32."""
        words = np.random.SeedSequence(self._entropy).generate_state(2)
        self._entropy[-1] += 1
        return words


def _bit_length(number: int) -> int:
    return max(1, number.bit_length())


class _RowNoise:
    """The noise of the rows of a batch, in their order: a cache to mlx-lm, which moves, drops and joins it with them.

    Its methods are what mlx-lm asks of a cache that is batched; it is the last one of the list.
    """

    state = ()
    nbytes = 0

    def __init__(self, rows: list[NoiseStream]):
        self.rows = rows

    @classmethod
    def merge(cls, caches: Sequence[_RowNoise]) -> _RowNoise:
        """The rows of several, in one."""
        return cls([row for cache in caches for row in cache.rows])

    def extend(self, other: _RowNoise) -> None:
        """Take in more rows, behind these."""
        self.rows = self.rows + other.rows

    def filter(self, keep: Sequence[int]) -> None:
        """Keep these rows."""
        self.rows = [self.rows[i] for i in keep]

    def extract(self, row: int) -> _RowNoise:
        """One row, by itself."""
        return _RowNoise([self.rows[row]])

    def prepare(self, **padding: Any) -> None:
        """Padding is no matter here."""

    def finalize(self) -> None:
        """Nor is its end."""


class _NoisyBatch:
    """The model as mlx-lm calls it, with the rows' noise behind their caches; `noise` is that of the last call.

    mlx-lm draws right after it has called the model, so those are the rows that it draws for.
    """

    def __init__(self, model: Any):
        self._model, self.noise = model, list[NoiseStream]()

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits, (R, T, V)."""
        *layers, last = cache
        self.noise = last.rows
        return self._model(tokens, cache=layers)


def draw(logps: mx.array, temperature: float, top_p: float, noise: Sequence[NoiseStream]) -> mx.array:
    """(R, V) log-probs of R rows and their noise -> the tokens drawn, (R,); the likeliest ones at temperature 0.

    Draws from softmax(logps / temperature) by the Gumbel-max trick: the argmax of logits plus independent
    Gumbel noise is a sample (arXiv 2110.01515). Two models that differ little then mostly agree.
    """
    if temperature == 0:
        return mx.argmax(logps, axis=-1)
    scaled = logps.astype(mx.float32) / temperature
    keys = mx.array(np.stack([stream.key() for stream in noise]))
    gumbel = mx.vmap(lambda key: mx.random.gumbel(scaled.shape[1:], key=key))(keys)
    return mx.argmax((nucleus(scaled, top_p) if top_p < 1 else scaled) + gumbel, axis=-1)


def nucleus(logits: mx.array, top_p: float) -> mx.array:
    """(R, V) -> (R, V): the likeliest tokens that reach `top_p`, the rest -inf (arXiv 1904.09751, eq. 2)."""
    order = mx.argsort(-logits, axis=-1)
    probs = mx.take_along_axis(mx.softmax(logits, axis=-1), order, axis=-1)
    outside = mx.cumsum(probs, axis=-1) - probs >= top_p  # what came before a token already suffices
    ranked = mx.where(outside, -mx.inf, mx.take_along_axis(logits, order, axis=-1))
    return mx.put_along_axis(logits, order, ranked, axis=-1)
