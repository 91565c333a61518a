"""Ports of the loopback address that are a test's own, although nobody listens on them for a while.

A port that is asked from the system and given back may be given to somebody else, another test's server say, before the
program for which it was meant has bound it, or while that program is being restarted.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


def hold_port(port: int = 0) -> socket.socket:
    """Holds a port until the socket is closed.

    The socket is bound and never listens: who connects is refused. The system gives the port to nobody who asks for any
    port, nor to outgoing connections; a server that asks for this very one and sets SO_REUSEADDR, as gRPC's, asyncio's
    and Go's do, can listen on it.

    Args:
        port: which one, while nobody listens there; by default any that is free.

    Raises:
        OSError: somebody has it.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", port))
    except BaseException:
        held.close()
        raise
    return held


@contextmanager
def held_address(port: int = 0) -> Iterator[str]:
    """``host:port`` of a port that is held for the length of the block."""
    with hold_port(port) as held:
        yield f"127.0.0.1:{held.getsockname()[1]}"


def hold_ports(stack: ExitStack, count: int) -> list[int]:
    """Ports that are held until the stack is left, and that nobody has for UDP at present."""
    ports: list[int] = []
    with ExitStack() as refused:
        while len(ports) < count:
            held = hold_port()
            port = int(held.getsockname()[1])
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagram:
                try:
                    datagram.bind(("127.0.0.1", port))
                except OSError:
                    refused.enter_context(held)
                    continue
            stack.enter_context(held)
            ports.append(port)
    return ports
