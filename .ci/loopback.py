"""Switch the loopback device on (`python .ci/loopback.py`), or see that nothing but it can be reached (`--check`).

A fresh network namespace has its loopback down, and the tool that switches it on is not on every machine.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import urllib.error
import urllib.request

READ_FLAGS, WRITE_FLAGS, UP = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP of Linux
ELSEWHERE = "https://example.com"


def switch_on() -> None:
    """Set the device's IFF_UP flag."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        asked = fcntl.ioctl(handle, READ_FLAGS, struct.pack("16sh", b"lo", 0) + bytes(22))
        (flags,) = struct.unpack_from("h", asked, 16)
        fcntl.ioctl(handle, WRITE_FLAGS, struct.pack("16sh", b"lo", flags | UP) + bytes(22))


def check() -> int:
    """0 when loopback works and the outside does not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    try:
        urllib.request.urlopen(ELSEWHERE, timeout=5)
    except (urllib.error.URLError, OSError) as error:
        print(
            f"bare: outside is out of reach ({error}); git {'is' if os.path.exists('.git') else 'history is not'} here"
        )
        return 0
    print(f"bare: {ELSEWHERE} can still be reached")
    return 1


if __name__ == "__main__":
    sys.exit(check() if sys.argv[1:] == ["--check"] else switch_on())
