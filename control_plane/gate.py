"""What stands before every RPC of the mesh port: who may call a service of it at all.

A service that is not named here is for operators: one that somebody adds, and forgets to protect, is closed.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from control_plane.access import Access

CHECKED_BY_THEMSELVES = frozenset(
    {
        *("mesh.v1.CertificateService", "mesh.v1.DiscoveryService", "mesh.v1.EdgeService", "mesh.v1.RegistryService"),
        "mesh.v1.TelemetryService",
        "opentelemetry.proto.collector.trace.v1.TraceService",
    }
)
"""Services that decide by themselves, most of them by what a request says, once they have read it."""

METHODS_CHECKED_BY_THEMSELVES = frozenset({"/mesh.v1.OperationsService/Attend"})
"""The same for single methods of services whose others are for operators."""

OPEN = frozenset(
    {"grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}
)
"""Services for everybody with an identity."""

if TYPE_CHECKING:  # the latter cannot be subscripted at run time
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Check = Callable[[_Context], Awaitable[object]]


class Gate(grpc.aio.ServerInterceptor):
    """Refuses RPCs before their handlers see anything of them."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """The method's handler, with the check before it. Unknown methods stay unknown."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        service = method.strip("/").partition("/")[0]
        if handler is None or service in CHECKED_BY_THEMSELVES or method in METHODS_CHECKED_BY_THEMSELVES:
            return handler
        require = self._access.require_caller if service in OPEN else self._access.require_operator
        return _guarded(handler, lambda context: require(context, f"call {method}"))


def _guarded(handler: _Handler, check: _Check) -> _Handler:
    """The handler with a check before it, of the same kind of RPC."""
    inner: Any
    if handler.response_streaming:
        inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
    else:
        inner = handler.stream_unary if handler.request_streaming else handler.unary_unary

    async def answer(request: object, context: _Context) -> object:
        await check(context)
        return await inner(request, context)

    async def stream(request: object, context: _Context) -> AsyncIterator[object]:
        await check(context)
        async with aclosing(inner(request, context)) as responses:
            async for response in responses:
                yield response

    made = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    behaviour: Any = stream if inspect.isasyncgenfunction(inner) else answer
    return made(behaviour, handler.request_deserializer, handler.response_serializer)
