"""The processes of a data-parallel run: which batches each computes, and the operation they share, a sum of arrays.

Every process holds the whole model, reads the whole data and makes the same plan. The batches of an optimizer step are
dealt out; what is computed of them is summed once. Everything else a process needs of the others (a flag, a text, a
value of each pair) is a sum as well, of arrays that are zero where it has nothing to say.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxdpo.distributed import heartbeat, launcher
from mlxdpo.distributed.heartbeat import Heartbeat, Wire
from mlxdpo.types import UserError

CHUNK = 32 << 20  # bytes summed at once: large enough for a network, small beside a model
GRACE = 3.0  # seconds in which a lost process may still say why


class PeerLost(Exception):
    """Another process of the run is not there any more; what was to be computed with it is void."""


@dataclass(frozen=True)
class Group:
    """The process `rank` of `size`. `all_sum` adds up an evaluated array over all of them and gives it evaluated."""

    rank: int
    size: int
    all_sum: Callable[[mx.array], mx.array]

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def mine(self, costs: Sequence[float]) -> list[bool]:
        """Which of the pieces with these costs this process computes; each is some process's."""
        return [owner == self.rank for owner in deal(costs, self.size)]

    def sum(self, tree: Any) -> Any:
        """A tree of arrays, summed over the processes, in few buffers; alone the tree itself."""
        if self.size == 1:
            return tree
        named = tree_flatten(tree)
        arrays, summed = [array for _, array in named], {}
        for numbers in _buffers(arrays):
            total = self.all_sum(_evaluated(mx.concatenate([arrays[n].reshape(-1) for n in numbers])))
            ends = np.cumsum([arrays[n].size for n in numbers])[:-1].tolist()
            for n, part in zip(numbers, mx.split(total, ends), strict=True):
                summed[n] = part.reshape(arrays[n].shape)
        return tree_unflatten([(name, summed[n]) for n, (name, _) in enumerate(named)])

    def agree(self, flag: bool) -> bool:
        """Whether any process says yes; all get the same answer."""
        return flag if self.size == 1 else bool(self.all_sum(mx.array([int(flag)])).item())

    def share(self, data: bytes) -> bytes:
        """Process 0's bytes, whatever the others give."""
        if self.size == 1:
            return data
        own = data if self.first else b""
        length = int(self.all_sum(mx.array([len(own)], mx.int64)).item())
        return b"".join(self._shared(own[at : at + CHUNK], min(CHUNK, length - at)) for at in range(0, length, CHUNK))

    def _shared(self, own: bytes, length: int) -> bytes:
        piece = np.frombuffer(own, np.uint8) if self.first else np.zeros(length, np.uint8)
        return np.array(self.all_sum(mx.array(piece))).tobytes()

    def each(self, data: bytes) -> list[bytes]:
        """What each process gave, all of one length, in order of rank."""
        table = np.zeros((self.size, len(data)), np.uint8)
        table[self.rank] = np.frombuffer(data, np.uint8)
        return [row.tobytes() for row in np.array(self.sum(mx.array(table)))]


ALONE = Group(0, 1, lambda array: array)


def deal(costs: Sequence[float], size: int) -> list[int]:
    """The process (0 to size - 1) of each piece: the costliest first, each to the process with least so far.

    With positive costs none goes empty while there are pieces (Graham 1969: within 4/3 of the best possible end).
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += costs[piece]
    return owners


def recut(batch_size: int, accumulate: int, size: int) -> tuple[int, int]:
    """The same pairs a step in batches enough that each process has one: the largest batch that divides the step.

    Windows follow from batch_size * accumulate alone, so this changes no step (`data.planning`).
    """
    pairs = batch_size * accumulate
    most = min(batch_size, max(1, pairs // size))
    batch = next(b for b in range(most, 0, -1) if pairs % b == 0)
    return batch, pairs // batch


def _buffers(arrays: Sequence[mx.array]) -> Iterator[list[int]]:
    """Numbers of arrays of one dtype that come to at most a chunk together; a larger array stands alone."""
    held: dict[mx.Dtype, tuple[list[int], int]] = {}
    for number, array in enumerate(arrays):
        numbers, filled = held.get(array.dtype, ([], 0))
        if numbers and filled + array.nbytes > CHUNK:
            yield numbers
            numbers, filled = [], 0
        held[array.dtype] = [*numbers, number], filled + array.nbytes
    yield from (numbers for numbers, _ in held.values())


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


class Caller:
    """`all_sum` in a thread of its own, so that who waits can be told that nobody will answer, and can be interrupted.

    On the CPU stream: a GPU gives up on a command that waits for a slower machine (mlx-lm #1185, mlx-vlm #2179).
    """

    def __init__(self, group: mx.distributed.Group):
        self.group = group
        self.line: Heartbeat | None = None
        self.asked: queue.SimpleQueue[mx.array] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[mx.array | Exception] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True, name="all_sum").start()

    def _answer(self) -> None:
        while True:
            array = self.asked.get()
            try:
                self.answers.put(_evaluated(mx.distributed.all_sum(array, group=self.group, stream=mx.cpu)))
            except Exception as error:
                self.answers.put(error)

    def __call__(self, array: mx.array) -> mx.array:
        mx.eval(array)
        self.asked.put(array)
        patience = heartbeat.PATIENCE
        while True:
            try:
                answer = self.answers.get(timeout=0.2)
                break
            except queue.Empty:
                patience -= 0.2
                if self.line is None and patience < 0:
                    raise PeerLost(f"no answer from the other processes for {heartbeat.PATIENCE:g} seconds") from None
            if self.line is not None and (wire := self.line.ended()):
                answer = self._last(wire)
                break
        if isinstance(answer, Exception):
            raise self._reason(answer)
        return answer

    def _last(self, wire: Wire) -> mx.array | Exception:
        """An answer that was on its way when a process left."""
        try:
            return self.answers.get(timeout=GRACE)
        except queue.Empty:
            return RuntimeError(f"lost connection to {wire.name}")

    def _reason(self, error: Exception) -> Exception:
        """What to raise: a process that stopped for a reason of the user's is reported as that."""
        wire = self.line.wait(GRACE) if self.line else None
        if wire is None:
            return PeerLost(f"the connection to another process was lost ({error})")
        if wire.ended == "refused":
            return UserError(*(f"{wire.name}: {sentence}" for sentence in wire.words.splitlines()))
        return PeerLost(f"lost connection to {wire.name}" + (f": {wire.words}" if wire.words else ""))


@contextlib.contextmanager
def joined(error_message: Callable[[BaseException], str | None] = lambda error: None) -> Iterator[Group]:
    """The group that `mlx.launch` started this process in; `ALONE` where it did not.

    While it lasts process 0 speaks for all: another one that must stop hands over its reason, and ends after it.
    `error_message` makes a sentence of an error that has one; of another, its traceback is shown where it happened.
    A group that ends otherwise than well ends the process here and now (status 2 for what the user can mend, 130
    interrupted, else 1): an `all_sum` that nobody answers would hold up an orderly exit for good.
    """
    if launcher.process_count() == 1:
        yield ALONE
        return
    group, line = _connect()
    try:
        yield group
    except UserError as error:
        _end(group, line, "refused", str(error), 2)
    except PeerLost as error:
        _end(group, line, "gone", str(error), 1)
    except KeyboardInterrupt:
        _end(group, line, "failed", "interrupted", 130)
    except Exception as error:
        if (sentence := error_message(error)) is None:
            traceback.print_exc()
        _end(group, line, "failed", sentence or f"{type(error).__name__}: {error}", 1)
    else:
        line.close("left")


def _connect() -> tuple[Group, Heartbeat]:
    """The group, and the lines to it. Raises `UserError` when the processes do not reach each other."""
    try:
        caller = Caller(mx.distributed.init(strict=True))
        group = Group(caller.group.rank(), caller.group.size(), caller)
        address = launcher.address_of_first()
        server, token = (heartbeat.listen(address) if group.first else None), secrets.token_hex(16)
        where = (address or socket.gethostname(), server.getsockname()[1] if server else 0, token)
        address, port, token = json.loads(group.share(json.dumps(where).encode()))
        if server is not None:
            caller.line = heartbeat.accept(server, group.size, token)
        else:
            caller.line = heartbeat.call(address, port, group.rank, group.size, token)
    except (OSError, RuntimeError, PeerLost) as error:
        raise UserError(
            f"process {launcher.process_rank()} of {launcher.process_count()} does not reach the others ({error}); "
            f"is another run using the ports of mlx.launch (--starting-port), or a firewall in between?"
        ) from None
    return group, caller.line


def _end(group: Group, line: Heartbeat, end: str, reason: str, status: int) -> None:
    """Let process 0 say why, or, when it is the one that is gone, process 1; then end the process."""
    if group.first:
        print("interrupted" if status == 130 else f"error: {reason}", file=sys.stderr)
        line.close("left")
    else:
        line.wires[0].send(end=end, words=reason)
        wire = line.wait(heartbeat.SILENCE)
        if group.rank == 1 and end == "gone" and wire is not None and wire.ended == "gone":
            print(f"error: {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
