"""The endpoint that Prometheus scrapes, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
from collections.abc import Awaitable, Callable

from mesh_client.addresses import parse_host_port
from mesh_client.core.errors import ConfigError
from mesh_client.core.http_answer import MAX_HEAD, Request, answer, parse_head

log = logging.getLogger(__name__)

VARIABLE = "MESH_METRICS"
PATH = "/metrics"
TIMEOUT = 5.0
"""Seconds that a client has to say what it wants, and to take the answer."""
Leave = Callable[[], Awaitable[None]]
MAX_CONNECTIONS = 20
"""At once; further ones are closed. A scraper needs one."""


class MetricsServer:
    """Serves the metrics of this process until it is closed. Bound to the event loop that started it."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    async def start(self, address: str) -> str:
        """Listens; the address, with the real port.

        Raises:
            ConfigError: the address cannot be used, or the ``metrics`` extra is not installed.
        """
        if importlib.util.find_spec("prometheus_client") is None:
            raise ConfigError("prometheus_client is not installed; install 'grpc-mesh[metrics]'")
        where = parse_host_port(address, "metrics", lowest_port=0)
        try:
            self._server = await asyncio.start_server(self._serve, where.host, where.port, limit=MAX_HEAD)
        except OSError as error:
            raise ConfigError(f"metrics: cannot listen on {address!r}: {error.strerror}") from error
        port = self._server.sockets[0].getsockname()[1]
        host = f"[{where.host}]" if ":" in where.host else where.host
        log.info("metrics are at http://%s:%d%s", host, port, PATH)
        return f"{host}:{port}"

    async def close(self) -> None:
        """Stops listening, and ends what is open."""
        if self._server is not None:
            self._server.close()
            for writer in tuple(self._connections):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(writer)
        try:
            async with asyncio.timeout(TIMEOUT):
                writer.write(await self._answer(reader))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self._connections.discard(writer)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return answer(400, b"the request is too long\n")
        request = parse_head(head.removesuffix(b"\r\n\r\n"))
        return answer(400, b"this is no HTTP/1.1 request\n") if request is None else await _answer_to(request)


async def _answer_to(request: Request) -> bytes:
    head = request.method == "HEAD"
    if request.method not in ("GET", "HEAD"):
        return answer(405, b"metrics are only read\n")
    if request.path != PATH:
        return answer(404, f"metrics are at {PATH}\n".encode(), head=head)
    # Imported late: it is an extra.
    from mesh_client.metrics import Collected, MeshCollector, exposition

    try:
        # Collected at one moment, between two steps of this loop; written elsewhere, so that calls need not wait.
        collected = Collected(MeshCollector().collect())
        body, content_type = await asyncio.to_thread(exposition, collected, request.accept)
    except Exception:
        # A defect of ours. It must not look as if there was nothing to count.
        log.exception("metrics cannot be written")
        return answer(500, b"metrics cannot be written; the log says why\n", head=head)
    return answer(200, body, content_type, head=head)


class SharedMetrics:
    """The endpoint that MESH_METRICS asks for: one for all mesh clients and servers of the process."""

    def __init__(self) -> None:
        self._server: MetricsServer | None = None
        self._users = 0

    async def enter(self) -> Leave:
        """Serves while somebody has entered, if the environment asks for it. That it cannot fails nobody.

        Returns what leaves; to be called once, in the same event loop.
        """
        address = os.environ.get(VARIABLE, "")
        if not address:
            return _nothing
        self._users += 1
        if self._users == 1:
            self._server = server = MetricsServer()
            try:
                await server.start(address)
            except ConfigError as error:
                log.error("%s: no metrics are served: %s", VARIABLE, error)
        return self._leave

    async def _leave(self) -> None:
        self._users -= 1
        if not self._users and self._server is not None:
            server, self._server = self._server, None
            await server.close()


async def _nothing() -> None:
    """Nobody entered."""


SHARED = SharedMetrics()
