"""Spans of calls, written in the call path itself: one for each call, each of its attempts, and where it is served.

Nothing here costs anything unless the process has a tracer provider when its mesh client is entered, or its server
made. Attributes follow OpenTelemetry's semantic conventions for RPC (https://opentelemetry.io/docs/specs/semconv/rpc/),
the context travels as W3C Trace Context (https://www.w3.org/TR/trace-context/).

A call is an INTERNAL span, its attempts are CLIENT spans below it, and what the server does is a SERVER span below the
attempt that it answers: retries are siblings, and each shows where it went. A call that nobody samples costs no span
and no header: by its user agent a client says that it would have sent one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from random import getrandbits
from typing import Any, Protocol

import grpc
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from mesh_client.addresses import parse_peer_ip
from mesh_client.core.errors import MeshErrorDetail
from mesh_client.core.node import Node
from mesh_client.spans import Spans, spans_of

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
USER_AGENT_MARK = "grpc-mesh-traces/1"
"""In the user agent of clients whose calls carry a trace context when they are sampled: without one, they are not."""
TRACING_OPTIONS: tuple[tuple[str, object], ...] = (("grpc.primary_user_agent", USER_AGENT_MARK),)

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
_SAMPLED = TraceFlags.SAMPLED
_KNOWN_FLAGS = 0x03
"""Sampled, and random trace id (W3C Trace Context, level 2)."""
_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Status codes that make a server's span an error; with the others it did as it should (semantic conventions)."""
UNSAMPLED = NonRecordingSpan(
    SpanContext(getrandbits(128) | 1, getrandbits(64) | 1, is_remote=False, trace_flags=TraceFlags(0))
)
"""The span of everything that no trace is kept of: what looks for a parent finds that its trace is not sampled."""
_NOTHING = otel_context.Context()
_UNSAMPLED_CONTEXT = trace.set_span_in_context(UNSAMPLED, otel_context.Context())
(_SPAN_KEY,) = _UNSAMPLED_CONTEXT
"""Of the current span in a context. `trace.get_current_span` takes four steps to it."""


class CallTrace(Protocol):
    """What a call tells of itself, whether it is sampled or not."""

    @property
    def trace_id(self) -> str:
        """Of the trace that is kept of it, 32 hex digits; empty when none is."""

    def attempt(self, node: Node, number: int) -> tuple[tuple[str, str], ...]:
        """An attempt begins; the metadata that it carries."""

    def attempt_ended(self, code: grpc.StatusCode, details: str | None) -> None:
        """It is over."""

    def event(self, name: str, **attributes: str | float) -> None:
        """Something was decided because of it."""

    def ended(self, code: grpc.StatusCode, details: str | None, detail: MeshErrorDetail | None) -> None:
        """The call is over."""


class PassedOn:
    """A call within a trace that somebody before this process has decided not to sample: its header goes on."""

    __slots__ = ("_header",)
    trace_id = ""

    def __init__(self, parent: SpanContext) -> None:
        self._header = _headers(parent)

    def attempt(self, node: Node, number: int) -> tuple[tuple[str, str], ...]:
        """The header."""
        return self._header

    def attempt_ended(self, code: grpc.StatusCode, details: str | None) -> None:
        """Nothing is kept."""

    def event(self, name: str, **attributes: str | float) -> None:
        """Nothing is kept."""

    def ended(self, code: grpc.StatusCode, details: str | None, detail: MeshErrorDetail | None) -> None:
        """Nothing is kept."""


class SampledCall:
    """The spans of one call and of its attempts."""

    __slots__ = ("_attempt", "_method", "_span", "_spans")

    def __init__(self, spans: Spans, span: Span, method: str) -> None:
        self._spans = spans
        self._span = span
        self._method = method
        self._attempt: Span | None = None

    @property
    def trace_id(self) -> str:
        """Of its trace."""
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def attempt(self, node: Node, number: int) -> tuple[tuple[str, str], ...]:
        """A span for the attempt, and its context as metadata."""
        endpoint = node.endpoint
        attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": self._method,
            "server.address": endpoint.address,
            "server.port": endpoint.port,
            "mesh.endpoint": endpoint.id,
            "mesh.attempt": number,
        }
        parent = self._span.get_span_context()
        span = self._attempt = self._spans.child(parent, f"attempt {number}", SpanKind.CLIENT, attributes)
        return _headers(parent if span is None else span.get_span_context())

    def attempt_ended(self, code: grpc.StatusCode, details: str | None) -> None:
        """Ends the attempt's span."""
        span, self._attempt = self._attempt, None
        if span is not None:
            _end(span, code.name, details, error=code is not grpc.StatusCode.OK)

    def event(self, name: str, **attributes: str | float) -> None:
        """An event of the call's span."""
        self._span.add_event(name, attributes)

    def ended(self, code: grpc.StatusCode, details: str | None, detail: MeshErrorDetail | None) -> None:
        """Ends the call's span, and that of an attempt that has not ended yet."""
        self.attempt_ended(code, details)
        if detail is not None:
            self._span.set_attributes({"mesh.reason": detail.reason.name, "mesh.breaker": detail.breaker})
        _end(self._span, code.name, details, error=code is not grpc.StatusCode.OK)


class ServedCall:
    """The span of one call in the server that serves it."""

    __slots__ = ("_span",)

    def __init__(self, span: Span) -> None:
        self._span = span

    def ended(self, code: str, details: str | None = None, error: BaseException | None = None) -> None:
        """The call is over, with this status, and this error where the handler raised it."""
        span = self._span
        if error is not None:
            span.record_exception(error)
        _end(span, code, details, error=code in _SERVER_ERRORS)


class Tracing:
    """Makes the spans of one mesh client or server.

    Args:
        provider: of tracers, such as the OpenTelemetry SDK's.
        service: the service of this process; empty for none.
    """

    channel_options = TRACING_OPTIONS
    """Of the channels on which calls are made."""

    def __init__(self, provider: trace.TracerProvider, service: str) -> None:
        self._spans = spans_of(provider)
        self._service = service

    @classmethod
    def of_process(cls, service: str) -> Tracing | None:
        """For the process's tracer provider, as it is now; None when there is none."""
        provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            return None
        return cls(provider, service)

    def call(self, service: str, method: str) -> CallTrace | None:
        """A call begins: what it tells of itself, or None when it need not.

        Args:
            service: whom it is for.
            method: full name with leading slash.
        """
        current = otel_context.get_current().get(_SPAN_KEY)
        if current is UNSAMPLED:
            return None
        parent = current.get_span_context() if isinstance(current, Span) else None
        name = method[1:]
        span: Span | None
        if parent is not None and parent.is_valid:
            span = self._spans.child(parent, name, SpanKind.INTERNAL, _attributes(name, service))
            if span is None:
                return PassedOn(parent)
        else:
            trace_id = self._spans.draw()
            if not trace_id:
                return None
            span = self._spans.root(trace_id, name, SpanKind.INTERNAL, _attributes(name, service))
        if not span.is_recording():
            made = span.get_span_context()
            return PassedOn(made) if made.is_valid else None
        return SampledCall(self._spans, span, name)

    def served(self, method: str, metadata: Iterable[tuple[str, Any]], peer: str, caller: str) -> ServedCall | None:
        """A call has come in; its span is current from now on. None when its trace is not kept.

        Args:
            method: full name with leading slash.
            metadata: of the call.
            peer: where it comes from, as gRPC says it.
            caller: service that calls, as its certificate says; empty for nobody.
        """
        header = state = None
        told = False
        for key, value in metadata:
            if key == TRACEPARENT:
                header = value
            elif key == TRACESTATE:
                state = value
            elif key == "user-agent":
                told = USER_AGENT_MARK in value
        parent = None if header is None else _parse(header, state)
        trace_id = 0 if told or parent is not None else self._spans.draw()
        if parent is None and not trace_id:
            otel_context.attach(_UNSAMPLED_CONTEXT)
            return None
        name = method[1:]
        attributes = _attributes(name, self._service)
        attributes["network.peer.address"] = parse_peer_ip(peer)
        if caller:
            attributes["mesh.caller"] = caller
        if parent is not None:
            span = self._spans.child(parent, name, SpanKind.SERVER, attributes) or NonRecordingSpan(parent)
        else:
            span = self._spans.root(trace_id, name, SpanKind.SERVER, attributes)
        otel_context.attach(trace.set_span_in_context(span, otel_context.Context()))
        return ServedCall(span) if span.is_recording() else None

    @staticmethod
    def left() -> None:
        """No span is current any more. Needed where what runs handlers outlives the call, as a thread does."""
        otel_context.attach(_NOTHING)


def current_trace_id() -> str:
    """The id of the running call's trace in hexadecimal, if it is sampled; else empty."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid and context.trace_flags & _SAMPLED else ""


def _attributes(method: str, service: str) -> dict[str, str]:
    return {"rpc.system.name": "grpc", "rpc.method": method, "mesh.service": service}


def _headers(context: SpanContext) -> tuple[tuple[str, str], ...]:
    header = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & _KNOWN_FLAGS:02x}"
    if context.trace_state:
        return (TRACEPARENT, header), (TRACESTATE, context.trace_state.to_header())
    return ((TRACEPARENT, header),)


def _parse(header: object, state: object) -> SpanContext | None:
    """The parent that a call's trace context names; None when it is not as W3C has it."""
    match = _TRACEPARENT.fullmatch(header) if isinstance(header, str) else None
    if match is None:
        return None
    context = SpanContext(
        int(match[1], 16),
        int(match[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(match[3], 16) & _KNOWN_FLAGS),
        trace_state=trace.TraceState.from_header([state]) if isinstance(state, str) else None,
    )
    return context if context.is_valid else None


def _end(span: Span, code: str, details: str | None, *, error: bool) -> None:
    span.set_attribute("rpc.response.status_code", code)
    if error:
        span.set_attribute("error.type", code)
        span.set_status(Status(StatusCode.ERROR, details or code))
    span.end()
