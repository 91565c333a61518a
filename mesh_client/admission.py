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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import grpc.aio

from mesh_client.context import CALLER_METADATA_KEY, InboundCall, inbound, parse_peer_ip
from mesh_client.core.authorization import HEALTH_METHODS
from mesh_client.core.caller import Caller
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.rate_limit import ConcurrencyGate, RateLimiter
from mesh_client.core.retry import PUSHBACK_KEY
from mesh_client.guard import Guard, Refusal
from mesh_client.handlers import SyncContext, WrappingHandler, parts, status_name, wrap_methods

if TYPE_CHECKING:
    from mesh_client.handlers import Handler
    from mesh_client.tracing import ServedCall, Tracing

SHED_PUSHBACK = (0.05, 0.15)
"""Seconds; a shed caller is told to come back after a random time in this range, so that not all come back at once."""


class CallContext(Protocol):
    """What the asynchronous and the synchronous servicer context have in common."""

    def peer(self) -> str:
        """Address of the caller."""

    def auth_context(self) -> Mapping[str, Any]:
        """What the handshake established."""

    def time_remaining(self) -> float | None:
        """Seconds to the deadline."""

    def invocation_metadata(self) -> Any:
        """Metadata pairs."""

    def set_trailing_metadata(self, trailing_metadata: tuple[tuple[str, str], ...]) -> None:
        """What the status will carry."""


class Admission:
    """Admits calls to one server, as its service's policy says: by who calls, then by how many calls there are.

    The health service is open to everybody who can connect, so that nobody takes a refusal for an illness.

    Args:
        rng: draws pushback times of shed calls.
        guard: knows who may call.
        tracing: makes the spans of its calls; None for none.
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
        if inspect.isasyncgenfunction(behavior):
            wrapped = self._wrap_generator(method, behavior)
        elif inspect.iscoroutinefunction(behavior):
            wrapped = self._wrap_coroutine(method, behavior)
        elif handler.response_streaming:
            wrapped = self._wrap_plain_stream(method, behavior)
        else:
            wrapped = self._wrap_plain(method, behavior)
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _wrap_coroutine(self, method: str, behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def admit(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            if self._waits(method):
                await self._guard.until_known()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                await context.abort(call.code, call.details)
            inbound.set(call)
            try:
                response = await behavior(request, context)
            except asyncio.CancelledError:
                call.cancel()
                self._interrupted(call)
                raise
            except BaseException as error:
                self._failed(call, context, error)
                raise
            else:
                self._ended(call, context)
                return response
            finally:
                self._leave()

        return admit

    def _wrap_generator(
        self, method: str, behavior: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def admit(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            if self._waits(method):
                await self._guard.until_known()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                await context.abort(call.code, call.details)
            inbound.set(call)
            try:
                async with contextlib.aclosing(behavior(request, context)) as responses:
                    async for response in responses:
                        yield response
            except (asyncio.CancelledError, GeneratorExit):
                # A call that is cancelled while it writes a response ends the generator in place of cancelling it.
                call.cancel()
                self._interrupted(call)
                raise
            except BaseException as error:
                self._failed(call, context, error)
                raise
            else:
                self._ended(call, context)
            finally:
                self._leave()

        return admit

    def _wrap_plain(self, method: str, behavior: Callable[..., Any]) -> Callable[..., Any]:
        def admit(request: Any, context: grpc.ServicerContext) -> Any:
            if self._waits(method):
                self._guard.until_known_in_thread()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                context.abort(call.code, call.details)
            with self._in_thread(call, context) as shown:
                return behavior(request, shown)

        return admit

    def _wrap_plain_stream(self, method: str, behavior: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def admit(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            if self._waits(method):
                self._guard.until_known_in_thread()
            call = self._enter(method, context)
            if isinstance(call, Refusal):
                context.abort(call.code, call.details)
            with self._in_thread(call, context) as shown:
                yield from behavior(request, shown)

        return admit

    @contextlib.contextmanager
    def _in_thread(self, call: InboundCall, context: Any) -> Iterator[Any]:
        """Around a handler that is a plain function: the thread and its context outlive the call.

        Gives the context that the handler is to have.
        """
        inbound.set(call)
        shown = context if call.trace is None else SyncContext(context)
        try:
            yield shown
        except GeneratorExit:  # nobody reads its responses any more
            self._interrupted(call)
            raise
        except BaseException as error:
            self._failed(call, shown, error)
            raise
        else:
            self._ended(call, shown)
        finally:
            inbound.set(None)
            if call.trace is not None:
                call.trace.leave()
            self._leave()

    # How a call has ended, for its span; without one there is nothing to do.

    @staticmethod
    def _ended(call: InboundCall, context: Any) -> None:
        if call.trace is not None:
            call.trace.ended(status_name(context.code(), "OK"), _details(context))

    @staticmethod
    def _failed(call: InboundCall, context: Any, error: BaseException) -> None:
        if call.trace is not None:
            code = status_name(context.code(), "OK")
            if code != "OK":  # it was aborted, which is an answer
                call.trace.ended(code, _details(context))
            else:
                call.trace.ended("UNKNOWN", f"{type(error).__name__}: {error}", error)

    @staticmethod
    def _interrupted(call: InboundCall) -> None:
        if call.trace is not None:
            late = call.deadline is not None and time.monotonic() >= call.deadline
            call.trace.ended("DEADLINE_EXCEEDED" if late else "CANCELLED")

    def _waits(self, method: str) -> bool:
        """Whether the call cannot be decided on yet."""
        return self._guard.waits and method not in HEALTH_METHODS

    def _enter(self, method: str, context: CallContext) -> InboundCall | Refusal:
        """Counts the call in, or says why it is refused."""
        caller = self._guard.caller(context)
        if method not in HEALTH_METHODS:
            denial = self._guard.refusal(caller, method, context)
            if denial is not None:
                return self._refused(method, context, caller, denial)
        refusal = None
        with self._lock:
            if not self._gate.enter():
                refusal = Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"{self._gate.in_flight} calls are in flight, which is all that this instance admits; "
                    "call another one, or later",
                    self._rng.uniform(*SHED_PUSHBACK),
                )
            elif self._limiter is not None:
                refusal = self._limit_rate(self._limiter, caller, method, context)
                if refusal is not None:
                    self._gate.leave()
        if refusal is None:
            call = _inbound_call(context, caller)
            if self._tracing is not None and method not in HEALTH_METHODS:
                call.trace = self._served(self._tracing, method, context, caller)
            return call
        context.set_trailing_metadata(((PUSHBACK_KEY, str(math.ceil(refusal.retry_after * 1000))),))
        return self._refused(method, context, caller, refusal)

    def _refused(self, method: str, context: CallContext, caller: Caller | None, refusal: Refusal) -> Refusal:
        if self._tracing is not None:
            span = self._served(self._tracing, method, context, caller)
            span.ended(refusal.code.name, refusal.details)
            span.leave()
        return refusal

    @staticmethod
    def _served(tracing: Tracing, method: str, context: CallContext, caller: Caller | None) -> ServedCall:
        name = "" if caller is None else caller.name
        return tracing.served(method, context.invocation_metadata(), parse_peer_ip(context.peer()), name)

    def _leave(self) -> None:
        with self._lock:
            self._gate.leave()

    @staticmethod
    def _limit_rate(limiter: RateLimiter, caller: Caller | None, method: str, context: CallContext) -> Refusal | None:
        name = _claimed_name(context) if caller is None else caller.name
        verdict = limiter.take(name, method, time.monotonic())
        if verdict.limit is None:
            return None
        return Refusal(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{name} exceeds {verdict.limit.requests_per_second:g} calls a second to {verdict.limit.method} of this "
            f"instance; next in {verdict.retry_after:.3f} s",
            verdict.retry_after,
        )


def _details(context: Any) -> str | None:
    details = context.details()
    text = details.decode(errors="replace") if isinstance(details, bytes) else details
    return text or None


def _inbound_call(context: CallContext, caller: Caller | None) -> InboundCall:
    remaining = context.time_remaining()
    deadline = None if remaining is None else time.monotonic() + remaining
    return InboundCall(deadline, parse_peer_ip(context.peer()), caller)


def _claimed_name(context: CallContext) -> str:
    """Whose bucket a call without an identity draws from: the service that the caller names, else its address."""
    for key, value in context.invocation_metadata():
        if key == CALLER_METADATA_KEY and isinstance(value, str):
            return value[:64]
    return parse_peer_ip(context.peer()) or "unknown"
