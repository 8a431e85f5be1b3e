"""A thin wire from every process of a group to process 0, beside MLX's own: who is still there, and why one is not.

MLX's ring notices a process that dies, not one that falls silent (a cable, a lid), and it cannot say why. So each
process sends process 0 a beat every few seconds and gets one back; one that must end on its own says its reason first.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import selectors
import socket
import threading
import time
from typing import Any

BEAT = 5.0  # seconds between two beats
SILENCE = 60.0  # seconds without one after which a process counts as gone
PATIENCE = 60.0  # seconds that processes may come apart at the start
LONGEST = 1 << 16  # bytes of a line


class Wire:
    """One connection: whole lines of JSON go in and out. Only the watching thread reads; any thread may send."""

    def __init__(self, connection: socket.socket, name: str):
        self.connection, self.name = connection, name
        self.rest, self.heard = b"", time.monotonic()
        self.ended: str | None = None  # why nothing more will come: "left", "failed: ..." or "gone"
        self.words = ""
        self.lock = threading.Lock()

    def send(self, **values: Any) -> None:
        """Send one line, if the other side is still there."""
        with contextlib.suppress(OSError), self.lock:
            self.connection.sendall(json.dumps(values).encode() + b"\n")

    def receive(self) -> None:
        """Take what has come. Its last words stay when the connection ends."""
        try:
            data = self.connection.recv(LONGEST)
        except OSError:
            data = b""
        if not data:
            self.ended = self.ended or "gone"
            return
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data)[-2 * LONGEST :].split(b"\n")
        for line in lines:
            message = json.loads(line)
            self.ended, self.words = message.get("end", self.ended), message.get("words", self.words)


class Heartbeat:
    """The wires of one process: to all others in process 0, to process 0 in the others."""

    def __init__(self, wires: list[Wire]):
        self.wires = wires
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._watch, daemon=True, name="heartbeat")
        self.thread.start()

    def _watch(self) -> None:
        beaten, selector = 0.0, selectors.DefaultSelector()
        for wire in self.wires:
            selector.register(wire.connection, selectors.EVENT_READ, wire)
        while not self.closing:
            if time.monotonic() - beaten > BEAT:
                beaten = time.monotonic()
                for wire in self.wires:
                    wire.send()
            for key, _ in selector.select(0.2):
                key.data.receive()
                if key.data.ended:
                    selector.unregister(key.fileobj)
            for wire in self.wires:
                if wire.ended is None and time.monotonic() - wire.heard > SILENCE:
                    wire.ended, wire.words = "gone", f"no heartbeat for {SILENCE:g} seconds"
            with self.changed:
                self.changed.notify_all()

    def ended(self) -> Wire | None:
        """A wire whose other end is not there any more: first one that ended for a reason, then one that is just gone,
        then one that says that it has lost another."""
        over = [wire for wire in self.wires if wire.ended]

        def order(wire: Wire) -> int:
            """The first is what is told."""
            if wire.ended != "gone":
                return 0 if wire.words else 3
            return 2 if wire.words else 1

        return min(over, key=order, default=None)

    def wait(self, seconds: float) -> Wire | None:
        """The same, after waiting for it at most so long."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended() is not None, seconds)
        return self.ended()

    def close(self, end: str, words: str = "") -> None:
        """Say how this process ends, and hang up."""
        for wire in self.wires:
            wire.send(end=end, words=words[: LONGEST // 2])
        self.closing = True
        self.thread.join()
        for wire in self.wires:
            wire.connection.close()


def listen(address: str) -> socket.socket:
    """Process 0's side, on a free port."""
    server = socket.create_server((address, 0))
    server.settimeout(1.0)
    return server


def accept(server: socket.socket, size: int, token: str) -> Heartbeat:
    """Wait for the `size` - 1 others. Who does not know the token is hung up on. Raises `TimeoutError`."""
    found: dict[int, Wire] = {}
    until = time.monotonic() + PATIENCE
    while len(found) < size - 1:
        if time.monotonic() > until:
            missing = sorted(set(range(1, size)) - found.keys())
            raise TimeoutError(f"process {missing[0]} did not call back within {PATIENCE:g} seconds")
        with contextlib.suppress(TimeoutError):
            connection, _ = server.accept()
            if (message := _hello(connection)) and hmac.compare_digest(message["token"], token):
                name = f"process {message['rank']} of {size} ({message['host']})"
                found[int(message["rank"])] = Wire(connection, name)
            else:
                connection.close()
    server.close()
    return Heartbeat([found[rank] for rank in sorted(found)])


def _hello(connection: socket.socket) -> dict[str, Any] | None:
    connection.settimeout(5.0)
    try:
        line = b""
        while not line.endswith(b"\n") and len(line) < 1024:  # no byte more: what follows is the watching thread's
            line += connection.recv(1) or b"\n"
        message = json.loads(line)
        return {"rank": int(message["rank"]), "token": str(message["token"]), "host": str(message["host"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def call(address: str, port: int, rank: int, size: int, token: str) -> Heartbeat:
    """The side of the others. Raises `OSError` when process 0 cannot be reached."""
    connection = socket.create_connection((address, port), timeout=PATIENCE / 2)
    connection.settimeout(5.0)
    wire = Wire(connection, f"process 0 of {size} ({address})")
    wire.send(rank=rank, token=token, host=socket.gethostname())
    return Heartbeat([wire])
