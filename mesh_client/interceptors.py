"""Client interceptors of the application, around mesh calls.

They run in grpc's own machinery: a grpc channel that never connects carries them, and a last interceptor of ours hands
each call to the mesh instead of to that channel. So they see one call, whatever the mesh retries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from grpc.aio import UsageError

from mesh_client import grpc_makers
from mesh_client.channel import MeshChannel

NOWHERE = "dns:///mesh.invalid:1"
"""Target of the carrying channel, which is never used."""


def intercepted(channel: MeshChannel, interceptors: Sequence[grpc.aio.ClientInterceptor]) -> grpc.aio.Channel:
    """The channel, with interceptors of the application around each call."""
    return InterceptedChannel(channel, interceptors)


class _Handover:
    """The innermost interceptor: makes the mesh call."""

    def __init__(self, methods: dict[str, Any]) -> None:
        self._methods = methods

    def _call(self, details: grpc.aio.ClientCallDetails, request: Any) -> Any:
        method: Any = details.method
        name = method.decode() if isinstance(method, bytes) else method
        multicallable = self._methods.get(name)
        if multicallable is None:
            raise UsageError(f"an interceptor changed the method to {name}, which no stub of this channel has")
        return multicallable(
            request,
            timeout=details.timeout,
            metadata=details.metadata,
            credentials=details.credentials,
            wait_for_ready=details.wait_for_ready,
        )


class _UnaryUnaryHandover(_Handover, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._call(client_call_details, request)


class _UnaryStreamHandover(_Handover, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._call(client_call_details, request)


class _StreamUnaryHandover(_Handover, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._call(client_call_details, request_iterator)


class _StreamStreamHandover(_Handover, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._call(client_call_details, request_iterator)


class InterceptedChannel(MeshChannel):
    """A mesh channel whose calls pass interceptors first."""

    def __init__(self, channel: MeshChannel, interceptors: Sequence[grpc.aio.ClientInterceptor]) -> None:
        super().__init__(channel.target)
        self._methods: dict[str, Any] = {}
        handovers = [
            kind(self._methods)
            for kind in (_UnaryUnaryHandover, _UnaryStreamHandover, _StreamUnaryHandover, _StreamStreamHandover)
        ]
        self._carrier = grpc_makers.insecure_channel(NOWHERE, interceptors=[*interceptors, *handovers])

    async def close(self, grace: float | None = None) -> None:
        """Makes further calls raise `UsageError`."""
        await super().close(grace)
        await self._carrier.close(grace)

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """As `MeshChannel.unary_unary`."""
        self._methods[method] = super().unary_unary(method, *args, **kwargs)
        return self._carrier.unary_unary(method, *args, **kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """As `MeshChannel.unary_stream`."""
        self._methods[method] = super().unary_stream(method, *args, **kwargs)
        return self._carrier.unary_stream(method, *args, **kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """As `MeshChannel.stream_unary`."""
        self._methods[method] = super().stream_unary(method, *args, **kwargs)
        return self._carrier.stream_unary(method, *args, **kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """As `MeshChannel.stream_stream`."""
        self._methods[method] = super().stream_stream(method, *args, **kwargs)
        return self._carrier.stream_stream(method, *args, **kwargs)
