"""One line for each call that a server answers: failures always, and a sample of the rest.

Handlers are wrapped once, when they are registered, and only if the log was asked for: without it a call pays nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import grpc.aio

from mesh_client.context import CALLER_METADATA_KEY, LATE_WITHIN
from mesh_client.core.errors import ConfigError
from mesh_client.core.trace_parent import trace_id
from mesh_client.handlers import WrappingHandler, parts, wrap_methods
from mesh_client.servicer_context import SyncContext, status_name

if TYPE_CHECKING:
    from mesh_client.guard import Guard
    from mesh_client.handlers import Handler
    from mesh_client.servicer_context import CallContext

ACCESS_LOG_VARIABLE = "MESH_ACCESS_LOG"

log = logging.getLogger("mesh_client.access")

_SERVERS_FAULT = frozenset({"DATA_LOSS", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNIMPLEMENTED", "UNKNOWN"})
"""Codes that are warnings: those that are errors of a server by OpenTelemetry's conventions for RPC spans."""


def access_log_rate(given: float | None) -> float | None:
    """The share of successful calls that is logged, from an argument, else from MESH_ACCESS_LOG; None for no log.

    Raises:
        ConfigError: it is no number from 0 to 1.
    """
    name, value = "access_log", given
    if value is None:
        text = os.environ.get(ACCESS_LOG_VARIABLE, "")
        if text in ("", "off"):
            return None
        name = ACCESS_LOG_VARIABLE
        try:
            value = float(text)
        except ValueError:
            value = math.nan
    if not 0.0 <= value <= 1.0:
        shown = value if given is not None else os.environ.get(ACCESS_LOG_VARIABLE, "")[:20]
        raise ConfigError(
            f"{name}: {shown!r} is not allowed; expected the share of successful calls to log, from 0 (failures "
            "alone) to 1"
        )
    return value


class _Begun(NamedTuple):
    """What is noted when a call comes.

    Its peer too: gRPC owns that text no longer once the connection is gone, and asking for it then crashes Python
    (https://github.com/grpc/grpc/pull/29927).
    """

    at: float
    peer: str


class AccessLog:
    """Logs calls to one server.

    Args:
        rate: share of successful calls that is logged, 0 to 1.
        guard: knows who calls.
        rng: draws the sample.
        clock: seconds, monotonic.
    """

    def __init__(self, rate: float, guard: Guard, rng: Random, clock: Callable[[], float] = monotonic) -> None:
        self._rate = rate
        self._guard = guard
        self._rng = rng
        self._clock = clock

    def wrap_generic(self, handler: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        """A handler that logs the calls of every method that ``handler`` finds."""
        return WrappingHandler(self.wrap, handler)

    def wrap_methods(self, service_name: str, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        """Handlers by method name, each logging its calls."""
        return wrap_methods(self.wrap, service_name, handlers)

    def wrap(self, method: str, handler: Handler) -> Handler:
        """One handler that logs its calls. It stays what it was: coroutine, generator or plain function."""
        make, behavior = parts(handler)
        name = method.removeprefix("/")
        wrapped: Callable[..., Any]
        if inspect.isasyncgenfunction(behavior):
            wrapped = self._wrap_generator(name, behavior)
        elif inspect.iscoroutinefunction(behavior):
            wrapped = self._wrap_coroutine(name, behavior)
        elif handler.response_streaming:
            wrapped = self._wrap_plain_stream(name, behavior)
        else:
            wrapped = self._wrap_plain(name, behavior)
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _wrap_coroutine(self, method: str, behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def logged(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            begun = _Begun(self._clock(), context.peer())
            try:
                response = await behavior(request, context)
            except BaseException as error:
                self._failed(method, context, begun, _code_of(error, context), request)
                raise
            self._ended(method, context, begun, status_name(context.code(), "OK"), request, response)
            return response

        return logged

    def _wrap_generator(
        self, method: str, behavior: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def logged(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            begun, sent = _Begun(self._clock(), context.peer()), 0
            try:
                async with contextlib.aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        sent += 1
                        yield response
            except BaseException as error:
                self._failed(method, context, begun, _code_of(error, context), request, sent)
                raise
            self._ended(method, context, begun, status_name(context.code(), "OK"), request, sent=sent)

        return logged

    def _wrap_plain(self, method: str, behavior: Callable[..., Any]) -> Callable[..., Any]:
        def logged(request: Any, context: grpc.ServicerContext) -> Any:
            begun, shown = _Begun(self._clock(), context.peer()), SyncContext(context)
            try:
                response = behavior(request, shown)
            except BaseException:
                self._failed(method, context, begun, _unless_ok(shown), request)
                raise
            self._ended(method, context, begun, _outcome(shown), request, response)
            return response

        return logged

    def _wrap_plain_stream(self, method: str, behavior: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def logged(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            begun, shown = _Begun(self._clock(), context.peer()), SyncContext(context)
            sent = 0
            try:
                for response in behavior(request, shown):
                    sent += 1
                    yield response
            except GeneratorExit:
                self._failed(method, context, begun, "CANCELLED", request, sent)
                raise
            except BaseException:
                self._failed(method, context, begun, _unless_ok(shown), request, sent)
                raise
            self._ended(method, context, begun, _outcome(shown), request, sent=sent)

        return logged

    def _ended(
        self,
        method: str,
        context: CallContext,
        begun: _Begun,
        code: str,
        request: object,
        response: object = None,
        sent: int | None = None,
    ) -> None:
        if code != "OK":
            self._failed(method, context, begun, code, request, sent)
        elif self._rate and (self._rate >= 1.0 or self._rng.random() < self._rate) and log.isEnabledFor(logging.INFO):
            sizes = {"response_bytes": _size(response), "responses": sent, "sampled": self._rate}
            self._write(logging.INFO, method, context, begun, code, request, sizes)

    def _failed(
        self,
        method: str,
        context: CallContext,
        begun: _Begun,
        code: str,
        request: object,
        sent: int | None = None,
    ) -> None:
        level = logging.WARNING if code in _SERVERS_FAULT else logging.INFO
        if log.isEnabledFor(level):
            self._write(level, method, context, begun, code, request, {"responses": sent})

    def _write(
        self,
        level: int,
        method: str,
        context: CallContext,
        begun: _Begun,
        code: str,
        request: object,
        more: Mapping[str, float | None],
    ) -> None:
        duration = round((self._clock() - begun.at) * 1000.0, 3)
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        caller = self._guard.caller(context)
        fields: dict[str, object] = {
            "method": method,
            "code": code,
            "duration_ms": duration,
            "caller": None if caller is None else caller.name,
            "claimed_caller": metadata.get(CALLER_METADATA_KEY, "")[:64],  # in plaintext, where nobody proves it
            "peer": begun.peer,
            "request_bytes": _size(request),
            "trace_id": trace_id(metadata.get("traceparent", "")),
            **more,
        }
        extra = {name: value for name, value in fields.items() if value not in (None, "")}
        log.log(level, "%s %s in %.1f ms", method, code, duration, extra=extra)


def _code_of(error: BaseException, context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """How a call ends whose handler raises."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "DEADLINE_EXCEEDED" if _is_late(context, LATE_WITHIN) else "CANCELLED"
    return _unless_ok(context)


def _unless_ok(context: Any) -> str:
    """The status that was set before the handler raised; an error without one is UNKNOWN."""
    name = status_name(context.code(), "OK")
    return "UNKNOWN" if name == "OK" else name


def _outcome(context: SyncContext) -> str:
    """How a call ends whose plain handler has returned."""
    return "DEADLINE_EXCEEDED" if _is_late(context) else status_name(context.code(), "OK")


def _is_late(context: Any, within: float = 0.0) -> bool:
    """Whether the call's deadline has passed, or does so within so many seconds."""
    remaining: float | None = context.time_remaining()
    return remaining is not None and remaining <= within


def _size(message: object) -> int | None:
    """Bytes of a message on the wire; None for what is not one message."""
    if isinstance(message, bytes):
        return len(message)
    measure = getattr(message, "ByteSize", None)
    return measure() if callable(measure) else None
