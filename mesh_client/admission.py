"""What a server does with each call before its handler runs: who may call, how many, and what outbound calls inherit.

Handlers are wrapped once, when they are registered: unlike an interceptor this costs a call no further await.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, cast

import grpc
import grpc.aio

from mesh_client.addresses import parse_peer_ip
from mesh_client.context import CALLER_METADATA_KEY, LATE_WITHIN, InboundCall, inbound
from mesh_client.core.authorization import HEALTH_METHODS
from mesh_client.core.caller import Caller
from mesh_client.core.policy import RateLimit, ServicePolicy
from mesh_client.core.rate_limit import ConcurrencyGate, RateLimiter
from mesh_client.core.retry import PUSHBACK_KEY
from mesh_client.core.served import NOBODY, ServedBook
from mesh_client.core.tally import Tally
from mesh_client.guard import Guard, Refusal
from mesh_client.handlers import WrappingHandler, parts, wrap_methods
from mesh_client.open_streams import OpenStream
from mesh_client.servicer_context import CallContext, SyncContext, status_details, status_name

if TYPE_CHECKING:
    from mesh_client.handlers import Handler
    from mesh_client.tracing import Tracing

SHED_PUSHBACK = (0.05, 0.15)
"""Seconds; a shed caller is told to come back after a random time in this range, so that not all come back at once."""
_OK: tuple[object, ...] = (0, None, grpc.StatusCode.OK)
"""What a servicer context holds when no other status was set."""


class _Method:
    """A method whose handler is wrapped.

    Attributes:
        name: full name with leading slash.
        tallies: what is counted of its calls, by caller; None for the health service, which everybody may call.
    """

    __slots__ = ("name", "tallies")

    def __init__(self, name: str, tallies: dict[str, Tally] | None) -> None:
        self.name = name
        self.tallies = tallies


class Admission:
    """Admits calls to one server, as its service's policy says: by who calls, then by how many calls there are.

    The health service is open to everybody who can connect, so that nobody takes a refusal for an illness.

    Args:
        rng: draws pushback times of shed calls.
        guard: knows who may call.
        tracing: makes the spans of its calls; None for none.

    Attributes:
        book: what is counted of its calls; read it within `counted`.
    """

    def __init__(self, rng: Random, guard: Guard, tracing: Tracing | None = None) -> None:
        self._rng = rng
        self._guard = guard
        self._tracing = tracing
        # Handlers that are plain functions run in grpc's threads.
        self._lock = threading.Lock()
        self._gate = ConcurrencyGate(None)
        self._policy: ServicePolicy | None = None
        self._limiter: RateLimiter | None = None
        self.book = ServedBook()

    @property
    def in_flight(self) -> int:
        """Calls that have been admitted and are not finished."""
        return self._gate.in_flight

    def apply(self, policy: ServicePolicy) -> None:
        """Obeys a policy from the next call on. Buckets start full again only if the rate limits changed."""
        with self._lock:
            before = self._policy.rate_limits if self._policy is not None else ()
            if policy.rate_limits != before:
                self._limiter = RateLimiter(policy.rate_limits, time.monotonic()) if policy.rate_limits else None
            self._gate.limit = policy.server_concurrency_limit.max_in_flight
            self._policy = policy
            self._guard.apply(policy)

    def wrap_generic(self, handler: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        """A handler that admits the calls of every method that ``handler`` finds."""
        return WrappingHandler(self.wrap, handler)

    def wrap_methods(self, service_name: str, handlers: Mapping[str, Handler]) -> dict[str, Handler]:
        """Handlers by method name, each admitting its calls."""
        return wrap_methods(self.wrap, service_name, handlers)

    def wrap(self, method: str, handler: Handler) -> Handler:
        """One handler that admits its calls. It stays what it was: coroutine, generator or plain function.

        Args:
            method: full name with leading slash.
            handler: the handler.
        """
        make, behavior = parts(handler)
        wrapped: Callable[..., Any]
        served = _Method(method, None if method in HEALTH_METHODS else self.book.of(method))
        if inspect.isasyncgenfunction(behavior):
            wrapped = self._wrap_generator(served, behavior)
        elif inspect.iscoroutinefunction(behavior):
            streaming = handler.request_streaming or handler.response_streaming
            wrapped = self._wrap_coroutine(served, self._cut_when_revoked(served, behavior) if streaming else behavior)
        elif handler.response_streaming:
            wrapped = self._wrap_plain_stream(served, behavior, requests=handler.request_streaming)
        else:
            wrapped = self._wrap_plain(
                served, self._read_until_revoked(served, behavior) if handler.request_streaming else behavior
            )
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _wrap_coroutine(
        self, method: _Method, behavior: Callable[..., Awaitable[Any]]
    ) -> Callable[..., Awaitable[Any]]:
        async def admit(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if self._guard.waits and method.tallies is not None:
                await self._guard.until_known()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                await context.abort(call.code, call.details)
            inbound.set(call)
            code = "OK"
            try:
                response = await behavior(request, context)
            except asyncio.CancelledError:
                call.cancel()
                code = self._interrupted(call)
                raise
            except BaseException as error:
                code = self._failed(call, context, error)
                raise
            else:
                if call.trace is not None or context.code() not in _OK:
                    code = self._ended(call, context)
                return response
            finally:
                self._leave(call, code)

        return admit

    # Streaming calls end when their workload is revoked. Unary ones are over before that would matter.

    def _open(self, method: _Method, caller: Caller | None, cut: Callable[[], object] | None = None) -> OpenStream:
        # The health service is for revoked workloads too, as for everybody.
        return self._guard.streams.open(None if method.tallies is None else caller, cut)

    def _cut_when_revoked(
        self, method: _Method, behavior: Callable[..., Awaitable[Any]]
    ) -> Callable[..., Awaitable[Any]]:
        async def run(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            call = cast("InboundCall", inbound.get())
            stream = self._open(method, call.caller, cast("asyncio.Task[Any]", asyncio.current_task()).cancel)
            try:
                return await behavior(request, context)
            except asyncio.CancelledError:
                if stream.revoked:
                    call.cancel()
                    await context.abort(grpc.StatusCode.PERMISSION_DENIED, stream.revoked)
                raise
            finally:
                stream.close()

        return run

    def _read_until_revoked(self, method: _Method, behavior: Callable[..., Any]) -> Callable[..., Any]:
        def run(requests: Iterator[Any], context: Any) -> Any:
            stream = self._open(method, cast("InboundCall", inbound.get()).caller)
            try:
                return behavior(_until_revoked(requests, stream, context), context)
            finally:
                stream.close()

        return run

    def _wrap_generator(
        self, method: _Method, behavior: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def admit(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            if self._guard.waits and method.tallies is not None:
                await self._guard.until_known()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                await context.abort(call.code, call.details)
            inbound.set(call)
            stream = self._open(method, call.caller, cast("asyncio.Task[Any]", asyncio.current_task()).cancel)
            code, untold = "OK", False
            try:
                try:
                    async with contextlib.aclosing(behavior(request, context)) as responses:
                        async for response in responses:
                            yield response
                except asyncio.CancelledError:
                    if stream.revoked:
                        call.cancel()
                        await context.abort(grpc.StatusCode.PERMISSION_DENIED, stream.revoked)
                    raise
            except (asyncio.CancelledError, GeneratorExit):
                # A call that is cancelled while it writes a response ends the generator in place of cancelling it.
                call.cancel()
                code, untold = self._interrupted(call), bool(stream.revoked)
                raise
            except BaseException as error:
                code = self._failed(call, context, error)
                raise
            else:
                code = self._ended(call, context)
            finally:
                stream.close()
                self._leave(call, code)
                if untold:
                    # The status goes out when the caller has read what was being written, which may be never.
                    with contextlib.suppress(Exception):
                        await context.abort(grpc.StatusCode.PERMISSION_DENIED, stream.revoked)

        return admit

    def _wrap_plain(self, method: _Method, behavior: Callable[..., Any]) -> Callable[..., Any]:
        def admit(request: Any, context: grpc.ServicerContext) -> Any:
            if self._guard.waits and method.tallies is not None:
                self._guard.until_known_in_thread()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                context.abort(call.code, call.details)
            with self._in_thread(call, context) as shown:
                return behavior(request, shown)

        return admit

    def _wrap_plain_stream(
        self, method: _Method, behavior: Callable[..., Iterator[Any]], *, requests: bool
    ) -> Callable[..., Iterator[Any]]:
        def admit(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            if self._guard.waits and method.tallies is not None:
                self._guard.until_known_in_thread()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                context.abort(call.code, call.details)
            with self._in_thread(call, context) as shown:
                stream = self._open(method, call.caller)
                try:
                    read = _until_revoked(request, stream, shown) if requests else request
                    yield from _until_revoked(behavior(read, shown), stream, shown)
                finally:
                    stream.close()

        return admit

    @contextlib.contextmanager
    def _in_thread(self, call: InboundCall, context: Any) -> Iterator[Any]:
        """Around a handler that is a plain function: the thread and its context outlive the call.

        Gives the context that the handler is to have.
        """
        inbound.set(call)
        shown = SyncContext(context)
        code = "OK"
        try:
            yield shown
        except GeneratorExit:  # nobody reads its responses any more
            code = self._interrupted(call)
            raise
        except BaseException as error:
            code = self._failed(call, shown, error)
            raise
        else:
            code = self._ended(call, shown)
        finally:
            inbound.set(None)
            if self._tracing is not None:
                self._tracing.left()
            self._leave(call, code)

    # How a call has ended: the name of its status, which its span is told too.

    @staticmethod
    def _ended(call: InboundCall, context: Any) -> str:
        name = status_name(context.code(), "OK")
        if call.trace is not None:
            call.trace.ended(name, status_details(context))
        return name

    @staticmethod
    def _failed(call: InboundCall, context: Any, error: BaseException) -> str:
        code = status_name(context.code(), "OK")
        if code != "OK":  # it was aborted, which is an answer
            if call.trace is not None:
                call.trace.ended(code, status_details(context))
            return code
        if call.trace is not None:
            call.trace.ended("UNKNOWN", f"{type(error).__name__}: {error}", error)
        return "UNKNOWN"

    @staticmethod
    def _interrupted(call: InboundCall) -> str:
        late = call.deadline is not None and time.monotonic() >= call.deadline - LATE_WITHIN
        code = "DEADLINE_EXCEEDED" if late else "CANCELLED"
        if call.trace is not None:
            call.trace.ended(code)
        return code

    def _enter(self, method: _Method, context: CallContext) -> InboundCall | Refusal:
        """Counts the call in, or says why it is refused."""
        if method.tallies is None:
            caller = self._guard.caller(context)
        else:
            admitted = self._guard.admit(context, method.name)
            if isinstance(admitted, Refusal):
                return self._refused(method, context, self._guard.caller(context), admitted)
            caller = admitted
        refusal = None
        with self._lock:
            if not self._gate.enter():
                self.book.shed += 1
                refusal = Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self._gate.in_flight} calls are in flight, which is all that this instance admits; "
                    "call another one, or later",
                    self._rng.uniform(*SHED_PUSHBACK),
                )
            elif self._limiter is not None:
                name = _claimed_name(context) if caller is None else caller.name
                verdict = self._limiter.take(name, method.name, time.monotonic())
                if verdict.limit is not None:
                    refusal = _exceeded(name, verdict.limit, verdict.retry_after)
                    self.book.rate_limited += 1
                    self._gate.leave()
            if refusal is None and self._gate.in_flight > self.book.peak:
                self.book.peak = self._gate.in_flight
        if refusal is None:
            tally = None
            if method.tallies is not None:
                tally = method.tallies.get(NOBODY if caller is None else caller.name) or self._tally(method, caller)
            remaining, now = context.time_remaining(), time.monotonic()
            call = InboundCall(None if remaining is None else now + remaining, context.peer(), caller, now, tally)
            if self._tracing is not None and method.tallies is not None:
                name = "" if caller is None else caller.name
                call.trace = self._tracing.served(method.name, context.invocation_metadata(), call.peer, name)
            return call
        context.set_trailing_metadata(((PUSHBACK_KEY, str(math.ceil(refusal.retry_after * 1000))),))
        return self._refused(method, context, caller, refusal)

    def _refused(self, method: _Method, context: CallContext, caller: Caller | None, refusal: Refusal) -> Refusal:
        if method.tallies is not None:
            tally = self._tally(method, caller)
            with self._lock:
                tally.failed(refusal.code.name, 0.0)
                self.book.unauthorized += refusal.code is grpc.StatusCode.PERMISSION_DENIED
        if self._tracing is not None:
            name = "" if caller is None else caller.name
            span = self._tracing.served(method.name, context.invocation_metadata(), context.peer(), name)
            if span is not None:
                span.ended(refusal.code.name, refusal.details)
            self._tracing.left()
        return refusal

    def _tally(self, method: _Method, caller: Caller | None) -> Tally:
        tallies: dict[str, Tally] = cast("dict[str, Tally]", method.tallies)
        name = NOBODY if caller is None else caller.name
        tally = tallies.get(name)
        if tally is None:
            with self._lock:
                tally = self.book.tally(tallies, name)
        return tally

    def _leave(self, call: InboundCall, code: str) -> None:
        tally, took = call.tally, time.monotonic() - call.started_at
        with self._lock:
            self._gate.leave()
            if tally is not None:
                if code == "OK":
                    tally.succeeded(took)
                else:
                    tally.failed(code, took)

    @contextlib.contextmanager
    def counted(self) -> Iterator[ServedBook]:
        """What was counted; nothing of it changes within the block, where calls wait."""
        with self._lock:
            yield self.book


def _until_revoked(messages: Iterable[Any], stream: OpenStream, context: SyncContext) -> Iterator[Any]:
    """The messages of a plain handler's stream: nobody can interrupt a thread, but it goes no further."""
    for message in messages:
        if stream.revoked:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, stream.revoked)
        yield message


def _exceeded(name: str, limit: RateLimit, retry_after: float) -> Refusal:
    return Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"{name} exceeds {limit.requests_per_second:g} calls a second to {limit.method} of this instance; next in "
        f"{retry_after:.3f} s",
        retry_after,
    )


def _claimed_name(context: CallContext) -> str:
    """Whose bucket a call without an identity draws from: the service that the caller names, else its address."""
    for key, value in context.invocation_metadata():
        if key == CALLER_METADATA_KEY and isinstance(value, str):
            return value[:64]
    return parse_peer_ip(context.peer()) or "unknown"
