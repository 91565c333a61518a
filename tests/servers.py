"""Plain gRPC servers of tests, in the test's own loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio


@asynccontextmanager
async def serving(
    add: Callable[[grpc.aio.Server], object], credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[str]:
    """A server's target. ``add`` gives it its handlers; it speaks plaintext without credentials."""
    server = grpc.aio.server()
    add(server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
