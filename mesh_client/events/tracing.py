"""Spans of events, by OpenTelemetry's semantic conventions for messaging and RabbitMQ.

A publisher's span is a child of whatever runs; its context travels in the headers. A handler's span begins a trace of
its own that is linked to it: an event may have many handlers, much later. Without an SDK all of it does nothing.

Source: https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from mesh_client.core.events.envelope import Envelope
from mesh_client.core.events.topology import EXCHANGE
from mesh_client.spans import NAME


def _attributes(envelope: Envelope, size: int) -> dict[str, str | int]:
    found: dict[str, str | int] = {
        "messaging.system": "rabbitmq",
        "messaging.destination.name": EXCHANGE,
        "messaging.message.id": envelope.id,
        "messaging.message.body.size": size,
        "cloudevents.event_type": envelope.type,
        "cloudevents.event_source": envelope.source,
    }
    if envelope.key:
        found["cloudevents.event_subject"] = envelope.key
    return found


class EventTracing:
    """Makes the spans of one bus.

    Args:
        provider: of tracers; None for the process's.
    """

    def __init__(self, provider: trace.TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = trace.get_tracer(NAME, tracer_provider=provider)

    def publishing(self, envelope: Envelope, size: int) -> dict[str, str]:
        """Makes a span for a publication; the headers that carry its context."""
        if isinstance(
            self._provider or trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider
        ):
            return {}
        span = self._tracer.start_span(
            f"publish {envelope.type}",
            kind=SpanKind.PRODUCER,
            attributes={
                **_attributes(envelope, size),
                "messaging.operation.type": "send",
                "messaging.operation.name": "publish",
            },
        )
        headers: dict[str, str] = {}
        propagate.inject(headers, trace.set_span_in_context(span))
        span.end()
        return headers

    @contextlib.contextmanager
    def handling(
        self, envelope: Envelope, size: int, headers: Mapping[str, object], queue: str, group: str, attempt: int
    ) -> Iterator[Span]:
        """A span around a handler, linked to the publication."""
        carrier = {name: value for name, value in headers.items() if isinstance(value, str)}
        published = trace.get_current_span(propagate.extract(carrier, Context())).get_span_context()
        with self._tracer.start_as_current_span(
            f"process {envelope.type}",
            context=Context(),
            kind=SpanKind.CONSUMER,
            links=[Link(published)] if published.is_valid else [],
            attributes={
                **_attributes(envelope, size),
                "messaging.operation.type": "process",
                "messaging.operation.name": "process",
                "messaging.consumer.group.name": group,
                "messaging.destination.subscription.name": queue,
                "mesh.event.attempt": attempt,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span


def failed(span: Span, error: BaseException) -> None:
    """A span's work failed."""
    span.record_exception(error)
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(Status(StatusCode.ERROR, str(error)[:200]))
