"""The channel that generated stubs take: a `grpc.aio.Channel` for a service rather than an address."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Self

import grpc
import grpc.aio
from grpc.aio import UsageError

from mesh_client.calls.requests import RequestLog
from mesh_client.calls.stream import StreamStreamCall, UnaryStreamCall
from mesh_client.calls.unary import StreamUnaryCall, UnaryUnaryCall
from mesh_client.connection import Connection
from mesh_client.multicallable import CLOSED, Deserializer, MultiCallable, Request, Response, Serializer
from mesh_client.target import Target

_STATES = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.CONNECTING,
    grpc.ChannelConnectivity.IDLE,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
)
"""A service is as connected as the best of its endpoints (gRFC A62 orders them so)."""


class _UnaryUnary(MultiCallable[Request, Response], grpc.aio.UnaryUnaryMultiCallable[Request, Response]):
    kind = "unary_unary"

    def __call__(
        self,
        request: Request,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        if self.channel.closed:
            self.refuse()
        return UnaryUnaryCall(
            self, self.serialise(request), timeout, metadata, credentials, wait_for_ready, compression
        )


class _UnaryStream(MultiCallable[Request, Response], grpc.aio.UnaryStreamMultiCallable[Request, Response]):
    kind = "unary_stream"

    def __call__(
        self,
        request: Request,
        *,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        if self.channel.closed:
            self.refuse()
        return UnaryStreamCall(
            self, self.serialise(request), timeout, metadata, credentials, wait_for_ready, compression
        )


class _StreamUnary(MultiCallable[Request, Response], grpc.aio.StreamUnaryMultiCallable[Request, Response]):
    kind = "stream_unary"

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        if self.channel.closed:
            self.refuse()
        requests = RequestLog(request_iterator, self.request_serializer)
        return StreamUnaryCall(self, requests, timeout, metadata, credentials, wait_for_ready, compression)


class _StreamStream(MultiCallable[Request, Response], grpc.aio.StreamStreamMultiCallable[Request, Response]):
    kind = "stream_stream"

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        if self.channel.closed:
            self.refuse()
        requests = RequestLog(request_iterator, self.request_serializer)
        return StreamStreamCall(self, requests, timeout, metadata, credentials, wait_for_ready, compression)


class MeshChannel(grpc.aio.Channel):
    """A channel to a service of the mesh. Made by `Mesh.channel`; cheap, and sharing connections with its siblings.

    Closing it ends this channel only: connections belong to the mesh client.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.closed = False

    async def __aenter__(self) -> Self:
        """The channel itself."""
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Closes it."""
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Makes further calls raise `UsageError`. Calls in flight go on; ``grace`` is accepted for compatibility."""
        self.closed = True

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """The best state of any endpoint; CONNECTING while the service is not known yet.

        Args:
            try_to_connect: connect to the endpoints that are idle.
        """
        if self.closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return self._best(
            connection.channel.get_state(try_to_connect) for connection in self._connections(try_to_connect)
        )

    def _best(self, states: Iterable[grpc.ChannelConnectivity]) -> grpc.ChannelConnectivity:
        found = set(states)
        if not found:
            idle = bool(self.target.service.nodes)
            return grpc.ChannelConnectivity.IDLE if idle else grpc.ChannelConnectivity.CONNECTING
        return next((state for state in _STATES if state in found), grpc.ChannelConnectivity.IDLE)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Returns when `get_state` would return another state.

        Raises:
            UsageError: the channel has been closed.
        """
        while True:
            if self.closed:
                raise UsageError(CLOSED)
            with self.target.listening() as changed:
                connections = self._connections(False)
                # Each is read once: one that changed between two looks would be waited for to change again.
                states = [connection.channel.get_state() for connection in connections]
                if self._best(states) is not last_observed_state:
                    return
                waits = [asyncio.ensure_future(changed.wait())]
                for connection, state in zip(connections, states, strict=True):
                    waits.append(asyncio.ensure_future(connection.channel.wait_for_state_change(state)))
                try:
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for wait in waits:
                        wait.cancel()
                    await asyncio.gather(*waits, return_exceptions=True)

    async def channel_ready(self) -> None:
        """Returns when an endpoint of the service is connected."""
        while (state := self.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
            await self.wait_for_state_change(state)

    def _connections(self, make: bool) -> list[Connection]:
        nodes = list(self.target.service.nodes)
        if make:
            return [self.target.connect(node) for node in nodes]
        return [node.connection for node in nodes if isinstance(node.connection, Connection)]

    def unary_unary(
        self,
        method: str,
        request_serializer: Serializer[Any] | None = None,
        response_deserializer: Deserializer[Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """The multicallable of a method with one request and one response."""
        return _UnaryUnary(self, method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Serializer[Any] | None = None,
        response_deserializer: Deserializer[Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """The multicallable of a method that streams responses."""
        return _UnaryStream(self, method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Serializer[Any] | None = None,
        response_deserializer: Deserializer[Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """The multicallable of a method that streams requests."""
        return _StreamUnary(self, method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Serializer[Any] | None = None,
        response_deserializer: Deserializer[Any] | None = None,
        _registered_method: bool | None = False,
    ) -> Any:
        """The multicallable of a method that streams both ways."""
        return _StreamStream(self, method, request_serializer, response_deserializer, _registered_method)
