"""How much memory a run will need, from shapes alone: what MLX keeps for the backward pass, and what it holds beside.

A float32 array of the forward pass is kept when some gradient needs it. Token by token, in one block (D hidden,
F inner, H heads of d, K of them for keys and values):

    the inputs of its two norms                        2 D
    the input of each adapted (or trained) linear map  D before q, k, v; H d before o; D before gate, up; F before down
    the low-rank product of each adapter               rank, for the gradient of its second matrix
    gate and up of SwiGLU (arXiv 2002.05202 eq. 5)     2 F, from which the gradient computes the rest again
    queries, keys and values                           (H + 2 K) d, keys and values of a row with its prefix before it
    the softmax of the scores                          H per query and key, where attention's backward is not fused;
                                                       else its output and log-sum-exp, H (d + 1) per query

The head, fused, holds a chunk of logits and its exponentials and keeps N rows of D (`fused_head.py`). With a checkpoint
a block keeps its input alone, and one block at a time exists whole. Peak memory is the largest of the phases of a run,
each the sum of what exists in it. All sizes are bytes; shapes are those of `types.Batch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from mlxdpo.forward.fused_head import chunk_of
from mlxdpo.training.plan import BatchLayout
from mlxdpo.training.preflight import LONGEST

AHEAD = 3  # chunks whose arrays exist at once, where there are several: MLX allocates before it computes
LOGITS = 2  # float32 arrays of a chunk's logits that exist at once: themselves and their exponentials
UPDATE = 1  # times the trained arrays: what an optimizer holds beside its states while it writes new ones
FLOAT = 4  # adapters, logits, optimizer states and log-probs are float32


class Shape(NamedTuple):
    """A model: blocks, D, F, H, K, d, V; `item` bytes of an activation; extra norms of queries and keys or not."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    item: int
    normed_heads: int = 0


class Trained(NamedTuple):
    """What is trained: in how many `layers`, the bytes of its arrays, the ranks of a block's adapters added up.

    `inputs` names the linear maps' inputs that gradients need: attention, out, mlp, inner. `full` is every weight,
    `head` says that the head is among them, `tied` that it is the embedding.
    """

    layers: int
    size: int
    ranks: int
    inputs: frozenset[str]
    full: bool = False
    head: bool = False
    tied: bool = False


class AttentionCost(NamedTuple):
    """Which attention a machine computes (`forward.patch_mlx_lm`, `forward.metal_routing`).

    chunked_from   keys from which on it is differentiated without keeping its scores: 0 where MLX has a fused backward
                   pass, infinity where nothing but MLX's unfused one is there
    block          queries and keys at a time whose scores a fused backward pass holds; 0 where it holds none
    score_from     keys from which on it is scored without the (queries, keys) squares
    """

    chunked_from: float
    block: int = 0
    score_from: float = 0


class Setting(NamedTuple):
    """How it is run: checkpointed or not, states of the optimizer per trained element, batches of a window, which
    attention, and how many input elements of operations the GPU may be behind (`in_flight`)."""

    checkpoint: bool
    states: int
    accumulate: int
    attention: AttentionCost
    in_flight: int = 0


class Frozen(NamedTuple):
    """Bytes of all frozen arrays, of the arrays on their way to another dtype or to quantised codes when they are
    loaded, and of another reference model."""

    weights: int
    loading: int = 0
    other: int = 0


class Layouts(NamedTuple):
    """The distinct batch shapes of a run: trained on, only scored (reference, held-out), and the very first batch."""

    training: tuple[BatchLayout, ...]
    scoring: tuple[BatchLayout, ...]
    first: BatchLayout


@dataclass(frozen=True)
class Memory:
    """Bytes by part, and the total of each phase of a run; `peak` is the largest."""

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    reference: int
    in_flight: int
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment."""
        return max(self.phases.values())


def attention_kept(shape: Shape, at: BatchLayout, chunked_from: float) -> int:
    """Bytes that one block's attention keeps: queries, keys, values, and scores or what stands for them."""
    queries, pairs = _queries(at), _score_count(at)
    keys = queries + (0 if at.whole else at.attended[0] * at.shared)  # each row has its prompt's keys before its own
    kept = (shape.heads * queries + 2 * shape.kv_heads * keys) * shape.head_dim * shape.item
    kept += shape.normed_heads * shape.head_dim * at.tokens * shape.item
    if at.packed:
        # A position of its own for each token, so cosines and sines for queries and keys; and the prefix's queries,
        # keys and values are views, which keep those of all tokens alive.
        kept += 2 * shape.head_dim * at.tokens * FLOAT
        kept += at.rest * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * shape.item
    if chunked_from == math.inf:
        return kept + shape.heads * pairs * shape.item
    kept += shape.heads * queries * (shape.head_dim * shape.item + FLOAT)
    return kept if _keys_seen(at) >= chunked_from else kept + shape.heads * pairs * FLOAT


def _keys_seen(at: BatchLayout) -> int:
    """Keys that a row's last token sees."""
    return at.shared + at.attended[1]


def _queries(at: BatchLayout) -> int:
    if at.whole:
        return at.tokens
    return at.prompts * at.shared + math.prod(at.attended)


def _score_count(at: BatchLayout) -> int:
    """Query-key pairs of one head, computed as whole squares."""
    if at.whole:
        return at.rows * (at.shared + at.width) ** 2
    return at.prompts * at.shared**2 + math.prod(at.attended) * _keys_seen(at)


def block_kept(shape: Shape, trained: Trained, at: BatchLayout, chunked_from: float) -> int:
    """Bytes that one trained block keeps for its backward pass."""
    sizes = {
        "attention": shape.hidden,
        "out": shape.heads * shape.head_dim,
        "mlp": shape.hidden,
        "inner": shape.inner,
    }
    floats = sum(sizes[name] for name in trained.inputs) + trained.ranks
    streams = (2 * shape.hidden + 2 * shape.inner) * shape.item
    if trained.full:  # the gradient of a norm's weights needs what they multiply
        streams += 2 * shape.hidden * shape.item
    return at.tokens * (streams + floats * FLOAT) + attention_kept(shape, at, chunked_from)


def idle(shape: Shape, trained: Trained, at: BatchLayout, chunked_from: float) -> int:
    """Bytes of `block_kept` that the uppermost block saves: of its prefix only keys and values are looked at."""
    if at.packed or at.whole:
        return 0
    count, queries = at.prompts * at.shared, shape.heads * shape.head_dim
    inputs = {"out": queries, "mlp": shape.hidden, "inner": shape.inner}
    floats = sum(size for name, size in inputs.items() if name in trained.inputs)
    token = (shape.hidden + 2 * shape.inner + queries) * shape.item + floats * FLOAT
    if _keys_seen(at) >= chunked_from:
        return count * token
    return count * (token + shape.heads * at.shared * shape.item)


def kept(shape: Shape, trained: Trained, at: BatchLayout, setting: Setting) -> int:
    """Bytes that all blocks keep together, and the scored states beside them."""
    stream = at.tokens * shape.hidden * shape.item
    states = 2 * at.scored * shape.hidden * FLOAT
    if setting.checkpoint:
        return trained.layers * stream + states
    block = block_kept(shape, trained, at, setting.attention.chunked_from)
    return trained.layers * block - idle(shape, trained, at, setting.attention.chunked_from) + states


def block_backward(shape: Shape, trained: Trained, at: BatchLayout, setting: Setting) -> int:
    """Bytes beside `kept` while the uppermost block is differentiated.

    Either its MLP, all of its activations still there: cotangents of the product, of gate and of up, and the sigmoid;
    or its attention, gate, up and product gone: cotangents of scores before and after the softmax. And the stream's.
    With a checkpoint, the block's own activations come on top.
    """
    stream = 5 * at.tokens * shape.hidden * shape.item
    mlp = 4 * at.tokens * shape.inner * shape.item
    freed = (2 + ("inner" in trained.inputs)) * at.tokens * shape.inner * shape.item
    if setting.attention.block and not setting.attention.chunked_from:
        freed, attention = 0, _blocked_backward(shape, at, setting.attention.block)
    elif _keys_seen(at) >= setting.attention.chunked_from:
        attention = 3 * _queries(at) * shape.heads * shape.head_dim * FLOAT
    else:
        attention = 2 * shape.heads * _score_count(at) * shape.item
    again = block_kept(shape, trained, at, setting.attention.chunked_from) if setting.checkpoint else 0
    return again + stream + max(mlp, attention - freed, 0)


def _blocked_backward(shape: Shape, at: BatchLayout, block: int) -> int:
    """Bytes of Metal's fused backward pass of attention, the larger of its two calls, prefix and rows.

    Three squares of scores in blocks of queries and keys, float32 accumulators of the gradients of queries, keys and
    values and the cotangent beside them, and those gradients in the model's dtype.
    """

    def call(rows: int, queries: int, keys: int) -> int:
        """Of one call."""
        squares = 3 * rows * shape.heads * min(block, queries) * min(block, keys) * shape.item
        gradients = rows * shape.head_dim * (shape.heads * queries + 2 * shape.kv_heads * keys)
        return squares + gradients * (FLOAT + shape.item) + rows * shape.heads * queries * shape.head_dim * FLOAT

    if at.whole:
        return call(at.rows, at.shared + at.width, at.shared + at.width)
    rows, width = at.attended
    return max(call(at.prompts, at.shared, at.shared), call(rows, width, at.shared + width))


def run_ahead(shape: Shape, trained: Trained, at: BatchLayout, setting: Setting) -> int:
    """Bytes that operations in flight keep beyond their use: at most what they read, and what a step makes at all."""
    made = shape.layers * block_backward(shape, trained, at, setting)
    return min(setting.in_flight * shape.item, made)


def head_forward(shape: Shape, at: BatchLayout) -> int:
    """Bytes of one chunk of logits, in the model's dtype and in float32, and of its exponentials."""
    if at.plain:
        return plain_logits_memory(shape, at)
    raw = shape.item if shape.item != FLOAT else 0
    chunk = min(at.scored, chunk_of(shape.vocabulary) * AHEAD * at.parts)
    return chunk * shape.vocabulary * (LOGITS * FLOAT + raw)


def head_backward(shape: Shape, trained: Trained, at: BatchLayout) -> int:
    """Bytes for a trained head: its chunk again with the logits' cotangent, and the gradient of its weights; every
    further part of the batch has a chunk, and gradients of head and embedding, of its own."""
    if not trained.head:
        return 0
    chunk = min(at.scored, chunk_of(shape.vocabulary) * at.parts) * shape.vocabulary * 3 * FLOAT
    gradients = 1 + trained.tied + 2 * (at.parts - 1)
    return chunk + gradients * trained.full * shape.vocabulary * shape.hidden * FLOAT


def plain_logits_memory(shape: Shape, at: BatchLayout) -> int:
    """Bytes of full rows' logits and of their part behind the shared prefix, in the model's dtype, and of the scored
    ones in float32, twice."""
    full = at.rows * (at.shared + 2 * at.width) * shape.vocabulary * shape.item
    return full + 2 * at.scored * shape.vocabulary * FLOAT


def start_check(shape: Shape, at: BatchLayout, attention: AttentionCost) -> int:
    """Bytes of the start's comparison of the fast way with the plain one, on one pair or two, before it attends in
    chunks of its own: of the largest pass, log-probs in float32 and so with the embedding, or gradients."""
    table = shape.vocabulary * shape.hidden * FLOAT if shape.item != FLOAT else 0
    given, shape, whole = shape, shape._replace(item=FLOAT), at._replace(level="plain", tree=0)
    unfused = attention._replace(score_from=0 if attention.chunked_from == 0 else math.inf)
    logps = table + max(forward_memory(shape, whole, unfused), forward_memory(shape, at, attention))
    return max(logps, _gradient_check(given, at, attention))


def _gradient_check(shape: Shape, first: BatchLayout, attention: AttentionCost) -> int:
    """Bytes of a backward pass through full rows and full logits of the beginning of one pair, every layer kept."""
    length = min(sum(LONGEST), first.shared + first.width)
    at = BatchLayout(1, 0, 2, length, 2 * length, min(2 * LONGEST[1], first.scored), "plain")
    vectors = Trained(shape.layers, 0, 0, frozenset())
    setting = Setting(False, 0, 1, attention._replace(chunked_from=math.inf))
    backward = max(block_backward(shape, vectors, at, setting), plain_logits_memory(shape, at))
    return kept(shape, vectors, at, setting) + plain_logits_memory(shape, at) + backward


def forward_memory(shape: Shape, at: BatchLayout, attention: AttentionCost) -> int:
    """Bytes beside the weights of a pass without gradients: one block's insides, or a chunk of the head."""
    tokens = at.tokens
    stream = 2 * tokens * shape.hidden * shape.item
    scores = 0 if _keys_seen(at) >= attention.score_from else 2 * shape.heads * _score_count(at) * shape.item
    projections = (shape.heads + 2 * shape.kv_heads) * shape.head_dim * _queries(at) * shape.item
    block = max(3 * tokens * shape.inner * shape.item, projections + scores)
    return stream + max(block, head_forward(shape, at))


def step_memory(shape: Shape, trained: Trained, at: BatchLayout, setting: Setting) -> int:
    """Bytes beside weights, states and gradients at the worst moment of a batch."""
    backward = max(block_backward(shape, trained, at, setting), head_backward(shape, trained, at))
    return kept(shape, trained, at, setting) + max(head_forward(shape, at), backward)


def predict(shape: Shape, trained: Trained, frozen: Frozen, setting: Setting, steps: int, layouts: Layouts) -> Memory:
    """The parts and phases of a run."""
    size, states = trained.size, setting.states * trained.size
    worst = max(layouts.training, key=lambda at: step_memory(shape, trained, at, setting))
    activations = kept(shape, trained, worst, setting)
    backward = block_backward(shape, trained, worst, setting)
    head, head_again = head_forward(shape, worst), head_backward(shape, trained, worst)
    reference = max(forward_memory(shape, at, setting.attention) for at in layouts.scoring)
    check = start_check(shape, layouts.first, setting.attention)
    ahead = run_ahead(shape, trained, worst, setting)
    start = frozen.weights + trained.full * size  # adapters come later
    resting = frozen.weights + size + states
    # While a window is computed, the loop still holds the gradients of the one before, and the sum of this one's.
    carried = size * ((steps > 1) + (setting.accumulate > 1))
    phases = {
        "loading": start + frozen.loading,
        "self-check": start + check,
        "reference": start + frozen.other + reference,
        "evaluation": resting + reference,
        "forward": resting + carried + activations + head + ahead,
        "backward": resting + carried + activations + max(backward, head_again) + ahead,
        "gradients": resting + carried + size + head_again,
        "update": resting + size + UPDATE * trained.full * size,
    }
    weights = start if trained.full else frozen.weights
    return Memory(weights, size, size + carried, states, activations + backward, head, reference, ahead, phases)
