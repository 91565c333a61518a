"""A service as calls reach it: the core's state joined to connections and to the calls that wait for it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Iterable
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from mesh_client.connection import Connection
from mesh_client.context import inbound
from mesh_client.core.balancer import Node
from mesh_client.core.handshake import explain
from mesh_client.core.policy import HashSource
from mesh_client.core.service import Service
from mesh_client.transport import Transport

if TYPE_CHECKING:
    from mesh_client.tracing import Tracing

log = logging.getLogger(__name__)

REPLACED_AT_ONCE = 8
"""Connections of one service that are replaced at once when credentials have changed."""
REPLACE_TIMEOUT = 5.0
"""Seconds for which an old connection is used while the new one cannot be made."""

_hash_key: ContextVar[str | None] = ContextVar("mesh_hash_key", default=None)


@contextmanager
def hash_key(key: str) -> Any:
    """Within the ``with`` block, calls to services that balance by RING_HASH with source EXPLICIT hash this key."""
    token = _hash_key.set(key)
    try:
        yield
    finally:
        _hash_key.reset(token)


class Waiter(Protocol):
    """A call that waits for endpoints."""

    def endpoints_changed(self) -> None:
        """Something about the service changed."""


class Target:
    """One service of one mesh client.

    Args:
        service: the core's state.
        metadata: sent with every call.
        loop: the event loop that all its channels and calls belong to.
        spawn: starts a background task that lives as long as the mesh client.
        clock: seconds, monotonic; what the core is told as ``now``.
        transport: opens its channels.
        tracing: makes the spans of its calls; None for none.
    """

    def __init__(
        self,
        service: Service,
        metadata: tuple[tuple[str, str], ...],
        loop: asyncio.AbstractEventLoop,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        clock: Callable[[], float],
        transport: Transport,
        tracing: Tracing | None = None,
    ) -> None:
        self.service = service
        self.tracing = tracing
        self.metadata = metadata
        self.loop = loop
        self.clock = clock
        self.waiters: set[Waiter] = set()
        self._options = () if tracing is None else tracing.channel_options
        self._spawn = spawn
        self._transport = transport
        self._listeners: set[asyncio.Event] = set()
        self._method_keys: dict[tuple[Any, ...], int] = {}
        self._connections: set[Connection] = set()
        """All that are open, those of endpoints that have left included."""
        self._replacing: set[Connection] = set()
        self._handshakes = asyncio.Semaphore(REPLACED_AT_ONCE)

    def method_key(self, *parts: Any) -> int:
        """A small number for what sets one grpc multicallable apart from others; equal parts, equal numbers."""
        return self._method_keys.setdefault(parts, len(self._method_keys))

    def connect(self, node: Node) -> Connection:
        """The connection to a node, made on first use."""
        connection = node.connection
        if not isinstance(connection, Connection):
            connection = node.connection = self._open(node)
        return connection

    def _open(self, node: Node) -> Connection:
        channel = self._transport.open_channel(node.endpoint.target, self.service.name, self._options)
        connection = Connection(node, channel)
        self._connections.add(connection)
        return connection

    def changed(self, gone: Iterable[Node]) -> None:
        """The service has changed: pickers are swapped, so what is gone may close, and who waits may look again."""
        self._disconnect(gone)
        for waiter in list(self.waiters):
            waiter.endpoints_changed()
        self._notify()

    def reconnect(self) -> None:
        """Credentials have changed: every connection is replaced.

        One that calls can use at once is used until the new one is there, so that no call waits for a handshake; only
        a few are made at a time. In place of the others the next pick opens a new one.
        """
        unused = []
        for node in self.service.nodes:
            connection = node.connection
            if not isinstance(connection, Connection) or connection in self._replacing:
                continue
            if connection.channel.get_state() is grpc.ChannelConnectivity.READY:
                self._replacing.add(connection)
                self._spawn(self._replace(node, connection))
            else:
                unused.append(node)
        self._disconnect(unused)
        self._notify()

    async def _replace(self, node: Node, old: Connection) -> None:
        try:
            async with self._handshakes:
                while node.connection is old:
                    generation = self._transport.generation
                    new = self._open(node)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(REPLACE_TIMEOUT):
                            await new.channel.channel_ready()
                    if node.connection is old and generation == self._transport.generation:
                        node.connection, retired = new, old
                    else:  # the endpoint has left, or credentials have changed again
                        retired = new
                    self._spawn(self._retire(retired))
        finally:
            self._replacing.discard(old)
        self._notify()

    def unreached(self, node: Node, details: str) -> None:
        """An attempt did not reach the endpoint. If certificates are the reason, that is logged, once per connection.

        The call may succeed elsewhere, and nobody would learn of an endpoint that is not who it should be.
        """
        connection = node.connection
        if isinstance(connection, Connection) and not connection.explained:
            name, endpoint = self.service.name, node.endpoint
            if why := explain(details, name, secure=self._transport.secure):
                connection.explained = True
                log.warning("call of %s to endpoint %s at %s: %s", name, endpoint.id, endpoint.target, why)

    def _notify(self) -> None:
        for listener in self._listeners:
            listener.set()

    def _disconnect(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            connection, node.connection = node.connection, None
            if isinstance(connection, Connection):
                self._spawn(self._retire(connection))

    @contextmanager
    def listening(self) -> Any:
        """An event that is set at each change of the service."""
        event = asyncio.Event()
        self._listeners.add(event)
        try:
            yield event
        finally:
            self._listeners.discard(event)

    async def close(self) -> None:
        """Closes every connection at once; calls in flight are cancelled."""
        await asyncio.gather(*(connection.channel.close() for connection in self._connections))
        self._connections.clear()

    async def _retire(self, connection: Connection) -> None:
        await connection.retire()
        self._connections.discard(connection)

    def hash_key(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
        """The key that RING_HASH hashes for a call made here and now."""
        source = self.service.hash_source
        if source is HashSource.EXPLICIT:
            return _hash_key.get()
        if source is HashSource.METADATA:
            wanted = self.service.policy.load_balancer.hash_key.metadata_key
            for key, value in metadata or ():
                if key == wanted:
                    return value if isinstance(value, str) else value.hex()
            return None
        call = inbound.get()
        return (call.peer_ip or None) if call is not None else _own_address()


def _own_address() -> str:
    return socket.gethostname()
