"""Spans of publications and handlers, and who is said to have published."""

from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from shop.v1.events_pb2 import OrderPlaced

import mesh_client
from mesh_client.context import inbound
from mesh_client.core.events.errors import DeadReason, UnusableEventError
from mesh_client.core.events.topology import CONTROL_PLANE
from mesh_client.core.identity import Principal
from mesh_client.events import Event, RetrySchedule
from mesh_client.events.publisher import PUBLISHER, WORKLOAD, check_publisher, proven_user, source_of
from tests.events.services import Services, started, until

ORDERS = Principal.service("mesh.internal", "orders")


async def test_a_handlers_span_is_linked_to_the_publication_also_after_a_retry(services: Services) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    bus = services.bus("shipping", tracer_provider=provider)
    bus.group(retries=RetrySchedule((0.05,)))
    inside: list[int] = []

    @bus.subscribe(OrderPlaced, timeout=7)
    async def handle(event: Event[OrderPlaced]) -> None:
        inside.append(trace.get_current_span().get_span_context().span_id)
        call = inbound.get()
        assert call is not None
        assert call.deadline is not None
        if event.attempt == 1:
            raise ValueError("not now")

    await started(bus)
    orders = services.bus("orders", tracer_provider=provider)
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("request") as request:
        await orders.publish(OrderPlaced(), key="k")
    await until(lambda: bus.state().groups[0].counters.handled == 1)
    spans = exporter.get_finished_spans()
    [publish] = [span for span in spans if span.kind is SpanKind.PRODUCER]
    processed = [span for span in spans if span.kind is SpanKind.CONSUMER]
    assert publish.name == "publish shop.v1.OrderPlaced"
    assert publish.parent is not None
    assert publish.parent.span_id == request.get_span_context().span_id
    assert publish.attributes is not None
    assert publish.attributes["messaging.system"] == "rabbitmq"
    assert publish.attributes["messaging.destination.name"] == "mesh.events"
    assert [span.name for span in processed] == ["process shop.v1.OrderPlaced"] * 2
    for span, attempt in zip(processed, (1, 2), strict=True):
        [link] = span.links
        assert link.context.span_id == publish.context.span_id
        assert span.parent is None
        assert span.attributes is not None
        assert span.attributes["mesh.event.attempt"] == attempt
        assert span.attributes["messaging.consumer.group.name"] == "shipping"
    assert [span.status.status_code for span in processed] == [StatusCode.ERROR, StatusCode.UNSET]
    assert inside == [span.context.span_id for span in processed]


def test_who_published_is_whom_the_broker_let_in() -> None:
    caller = check_publisher(ORDERS.spiffe_id, "orders", {WORKLOAD: "0123456789abcdef"}, "mesh.internal")
    assert isinstance(caller, mesh_client.Caller)
    assert (caller.service, caller.workload_id) == ("orders", "0123456789abcdef")
    unknown = check_publisher(ORDERS.spiffe_id, "orders", {WORKLOAD: "odd"}, "mesh.internal")
    assert unknown is not None
    assert unknown.workload_id == "0" * 16
    plane = Principal.control_plane("mesh.internal")
    found = check_publisher(plane.spiffe_id, CONTROL_PLANE, {}, "mesh.internal")
    assert found is not None
    assert found.is_control_plane
    assert check_publisher("mesh:orders", "orders", {}, None) is None
    assert check_publisher("mesh:orders", None, {}, None) is None
    assert check_publisher(CONTROL_PLANE, CONTROL_PLANE, {}, None) is None


@pytest.mark.parametrize(
    ("source", "user", "trust_domain"),
    [
        (ORDERS.spiffe_id, "payments", "mesh.internal"),
        (ORDERS.spiffe_id, None, "mesh.internal"),
        (ORDERS.spiffe_id, "orders", "elsewhere.internal"),
        ("mesh:orders", "orders", "mesh.internal"),
        (Principal.operator("mesh.internal", "alice").spiffe_id, "operator:alice", "mesh.internal"),
        ("mesh:orders", "payments", None),
    ],
)
def test_who_claims_to_be_somebody_else_is_refused(source: str, user: str | None, trust_domain: str | None) -> None:
    with pytest.raises(UnusableEventError) as caught:
        check_publisher(source, user, {}, trust_domain)
    assert caught.value.reason is DeadReason.FORGED


def test_the_first_publisher_is_believed_of_what_a_group_has_sent_to_itself() -> None:
    assert proven_user("shipping", {PUBLISHER: "orders"}, "shipping") == "orders"
    assert proven_user("mesh:operator", {PUBLISHER: "orders"}, "shipping") == "orders"
    assert proven_user("payments", {PUBLISHER: "orders"}, "shipping") == "payments"
    assert proven_user("shipping", {}, "shipping") == "shipping"
    assert proven_user(None, {PUBLISHER: "orders"}, "shipping") is None


def test_sources() -> None:
    assert source_of(ORDERS, "orders") == "spiffe://mesh.internal/service/orders"
    assert source_of(None, "orders") == "mesh:orders"
    assert source_of(None, CONTROL_PLANE) == CONTROL_PLANE
