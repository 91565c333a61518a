"""Spans that cost little: what the OpenTelemetry SDK's own tracer does, without what the mesh's spans need not.

The SDK asks the sampler for each span, copies and checks every attribute, and takes locks: four times what is needed.
The mesh knows beforehand what the usual samplers say, and what it writes is right by construction, so its spans are
plain objects that become the SDK's `ReadableSpan` when they end. Any other sampler is asked, through the SDK.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Mapping
from random import getrandbits
from typing import Any, Protocol, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import Attributes, AttributeValue

NAME = "grpc_mesh"
"""Of the instrumentation scope."""

MAX_EVENTS = MAX_ATTRIBUTES = 128
"""What one span holds at most, as with the SDK."""

_SAMPLED = TraceFlags(TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID)
_FOLLOWING = re.compile(
    r"ParentBased\{root:(?:TraceIdRatioBased\{(?P<share>[0-9.e+-]+)\}|(?P<always>AlwaysO(?:n|ff))Sampler),"
    r"remoteParentSampled:AlwaysOnSampler,remoteParentNotSampled:AlwaysOffSampler,"
    r"localParentSampled:AlwaysOnSampler,localParentNotSampled:AlwaysOffSampler\}"
)
"""Samplers, by their descriptions, that follow the parent and decide on a root by its trace id or not at all."""


class Spans(Protocol):
    """Makes spans."""

    def draw(self) -> int:
        """The id of a trace that begins now; 0 when it is not sampled."""

    def root(self, trace_id: int, name: str, kind: SpanKind, attributes: dict[str, Any]) -> Span:
        """A span without a parent, of the trace that was drawn; it may be one that records nothing."""

    def child(self, parent: SpanContext, name: str, kind: SpanKind, attributes: dict[str, Any]) -> Span | None:
        """A span below another one, in this process or elsewhere; None when the trace is not sampled."""


class SdkSpans:
    """Asks a tracer, whatever it is."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def draw(self) -> int:
        """Not 0: the tracer draws when it makes the span, and asks the sampler then."""
        return 1

    def root(self, trace_id: int, name: str, kind: SpanKind, attributes: dict[str, Any]) -> Span:
        """A span without a parent, of any trace; it may be one that records nothing, which then tells others so."""
        del trace_id
        return self._tracer.start_span(name, Context(), kind, attributes)

    def child(self, parent: SpanContext, name: str, kind: SpanKind, attributes: dict[str, Any]) -> Span | None:
        """A span below another one; it may be one that records nothing."""
        return self._tracer.start_span(
            name, trace.set_span_in_context(NonRecordingSpan(parent), Context()), kind, attributes
        )


class LightSpans:
    """Makes `LightSpan` for a tracer of the SDK, by a sampler that follows parents.

    Args:
        tracer: whose processors get the spans.
        bound: a trace that begins here is sampled when the lower 64 bits of its id are below this.
    """

    def __init__(self, tracer: SdkTracer, bound: int) -> None:
        self._tracer = tracer
        self._bound = bound

    def draw(self) -> int:
        """The id of a trace that begins now; 0 when it is not sampled, by the lower half of the id."""
        low = getrandbits(64)
        return 0 if low >= self._bound else (getrandbits(64) << 64 | low) or 1

    def root(self, trace_id: int, name: str, kind: SpanKind, attributes: dict[str, Any]) -> Span:
        """A span without a parent, of the trace that was drawn."""
        context = SpanContext(trace_id, getrandbits(64) or 1, is_remote=False, trace_flags=_SAMPLED)
        return LightSpan(self._tracer, context, None, name, kind, attributes)

    def child(self, parent: SpanContext, name: str, kind: SpanKind, attributes: dict[str, Any]) -> Span | None:
        """A span below another one; None when the trace is not sampled."""
        if not parent.trace_flags & TraceFlags.SAMPLED:
            return None
        context = SpanContext(
            parent.trace_id,
            getrandbits(64) or 1,
            is_remote=False,
            trace_flags=parent.trace_flags,
            trace_state=parent.trace_state,
        )
        return LightSpan(self._tracer, context, parent, name, kind, attributes)


def spans_of(provider: trace.TracerProvider) -> Spans:
    """The cheapest way to make spans that the provider's sampler and processors get as they would get the SDK's."""
    tracer = provider.get_tracer(NAME)
    if isinstance(provider, TracerProvider) and isinstance(tracer, SdkTracer):
        # By its description, which is part of the SDK's specification; its parts are private.
        match = _FOLLOWING.fullmatch(provider.sampler.get_description())
        if match is not None:
            share = float(match["share"]) if match["share"] else 1.0 if match["always"] == "AlwaysOn" else 0.0
            return LightSpans(tracer, round(share * (1 << 64)))
    return SdkSpans(tracer)


class LightSpan(Span):
    """One span of the mesh, which ends as a `ReadableSpan` of the SDK.

    Attributes that others set are trusted to be what OpenTelemetry allows, as the mesh's own are.
    """

    __slots__ = ("_attributes", "_context", "_events", "_kind", "_name", "_parent", "_start", "_status", "_tracer")

    def __init__(
        self,
        tracer: SdkTracer,
        context: SpanContext,
        parent: SpanContext | None,
        name: str,
        kind: SpanKind,
        attributes: dict[str, Any],
    ) -> None:
        self._tracer: SdkTracer | None = tracer
        self._context = context
        self._parent = parent
        self._name = name
        self._kind = kind
        self._attributes = attributes
        self._events: list[Event] | None = None
        self._status: Status | None = None
        self._start = time.time_ns()
        # They are meant for the SDK's own spans, of which this has everything that can be set.
        tracer.span_processor.on_start(cast("SdkSpan", self))

    def get_span_context(self) -> SpanContext:
        """Its ids."""
        return self._context

    def is_recording(self) -> bool:
        """Whether it has not ended."""
        return self._tracer is not None

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        """Sets one attribute."""
        if len(self._attributes) < MAX_ATTRIBUTES or key in self._attributes:
            self._attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        """Sets several."""
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Something happened, now or at a time in nanoseconds since 1970."""
        if self._events is None:
            self._events = []
        if len(self._events) < MAX_EVENTS:
            self._events.append(Event(name, attributes, timestamp))

    def update_name(self, name: str) -> None:
        """Renames it."""
        self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """How it went; what is an error stays one, unless it is said to be well (OpenTelemetry's rule)."""
        made = status if isinstance(status, Status) else Status(status, description)
        if made.status_code is not StatusCode.UNSET and (self._status is None or not self._status.is_ok or made.is_ok):
            self._status = made

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """An exception as an event, by the semantic conventions."""
        kind = type(exception)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        told: dict[str, Any] = {
            "exception.type": name,
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", {**told, **(attributes or {})}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        """Hands it to the processors; once."""
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        processor: SpanProcessor = tracer.span_processor
        processor.on_end(
            ReadableSpan(
                name=self._name,
                context=self._context,
                parent=self._parent,
                resource=tracer.resource,
                attributes=self._attributes,
                events=self._events or (),
                kind=self._kind,
                status=_UNSET if self._status is None else self._status,
                start_time=self._start,
                end_time=end_time or time.time_ns(),
                instrumentation_scope=_SCOPE,
            )
        )


_UNSET = Status(StatusCode.UNSET)
_SCOPE = InstrumentationScope(NAME)
