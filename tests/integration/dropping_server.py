"""A server that drops every call, as one does that begins to stop while a call is on its way to it.

When gRPC's server does so is a race; this speaks just enough HTTP/2 to do nothing else (RFC 9113, 4.1 and 6).
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_PREFACE = 24
_HEADERS, _RST_STREAM, _SETTINGS, _PING = 1, 3, 4, 6
_ACK = 1
_LAST_OF_STREAM = 1 | 4  # END_STREAM | END_HEADERS
_CANCEL = 8


class DroppingServer:
    """Counts the calls that it drops.

    Args:
        resets: ends the call's stream by a reset, as other implementations do, and not by trailers, as gRPC's C core.

    Attributes:
        port: where it listens.
        calls: how many it has dropped.
    """

    def __init__(self, *, resets: bool) -> None:
        self._resets = resets
        self.port = 0
        self.calls = 0
        self._connections: dict[asyncio.StreamWriter, asyncio.Event] = {}

    async def close(self) -> None:
        """Ends every connection."""
        for writer, ended in list(self._connections.items()):
            writer.close()
            await ended.wait()

    def _drop(self, stream: int) -> bytes:
        if self._resets:
            return _frame(_RST_STREAM, stream=stream, payload=struct.pack(">I", _CANCEL))
        trailers = {b"content-type": b"application/grpc", b"grpc-status": b"1", b"grpc-message": b"CANCELLED"}
        # RFC 7541: ":status: 200" of the static table, then literals without indexing.
        block = b"\x88" + b"".join(b"\0%c%s%c%s" % (len(k), k, len(v), v) for k, v in trailers.items())
        return _frame(_HEADERS, _LAST_OF_STREAM, stream, block)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection."""
        ended = self._connections[writer] = asyncio.Event()
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readexactly(_PREFACE)
            writer.write(_frame(_SETTINGS))
            while True:
                header = await reader.readexactly(9)
                kind, flags = header[3], header[4]
                (stream,) = struct.unpack(">I", header[5:])
                payload = await reader.readexactly(int.from_bytes(header[:3], "big"))
                if kind == _SETTINGS and not flags & _ACK:
                    writer.write(_frame(_SETTINGS, _ACK))
                elif kind == _PING and not flags & _ACK:
                    writer.write(_frame(_PING, _ACK, payload=payload))
                elif kind == _HEADERS:
                    self.calls += 1
                    writer.write(self._drop(stream))
                await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        del self._connections[writer]
        ended.set()


@asynccontextmanager
async def dropping_server(*, resets: bool = False) -> AsyncIterator[DroppingServer]:
    """One that runs."""
    dropping = DroppingServer(resets=resets)
    server = await asyncio.start_server(dropping.serve, "127.0.0.1", 0)
    dropping.port = server.sockets[0].getsockname()[1]
    try:
        yield dropping
    finally:
        server.close()
        await dropping.close()


def _frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload
