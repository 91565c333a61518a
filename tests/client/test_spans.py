"""The mesh's own spans beside those of the OpenTelemetry SDK: what an exporter gets is the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from mesh_client.spans import MAX_ATTRIBUTES, MAX_EVENTS, NAME, LightSpans, SdkSpans, spans_of

PARENT = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(1), trace_state=trace.TraceState([("a", "b")]))
UNSAMPLED_PARENT = SpanContext(7, 8, is_remote=True, trace_flags=TraceFlags(0))


class World:
    def __init__(self, sampler: Sampler) -> None:
        self.exporter = InMemorySpanExporter()
        resource = Resource.create({"service.name": "orders"})
        self.provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.spans = spans_of(self.provider)

    @property
    def finished(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()


@pytest.fixture
def world() -> Iterator[World]:
    made = World(ParentBased(ALWAYS_ON))
    yield made
    made.provider.shutdown()


def write(span: trace.Span) -> None:
    """Everything that can be done to a span."""
    span.update_name("renamed")
    span.set_attribute("one", 1)
    span.set_attributes({"two": 2.0, "many": ["a", "b"]})
    span.add_event("happened", {"why": "so"}, 123)
    try:
        raise ValueError("broken")
    except ValueError as error:
        span.record_exception(error, {"more": True})
    span.set_status(StatusCode.ERROR, "out of luck")
    span.set_status(StatusCode.UNSET)
    span.end()
    span.end()


def shown(span: ReadableSpan) -> dict[str, Any]:
    told = [(event.name, dict(event.attributes or {})) for event in span.events]
    return {
        "name": span.name,
        "kind": span.kind,
        "parent": span.parent,
        "attributes": {key: _listed(value) for key, value in (span.attributes or {}).items()},
        "events": [(name, {k: v for k, v in held.items() if k != "exception.stacktrace"}) for name, held in told],
        "status": (span.status.status_code, span.status.description),
        "resource": span.resource,
        "trace": span.context.trace_id if span.parent else None,
        "flags": span.context.trace_flags.sampled,
        "state": dict(span.context.trace_state),
    }


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_a_span_of_the_mesh_is_exported_as_one_of_the_sdk_is(world: World) -> None:
    ours = world.spans.child(PARENT, "work", SpanKind.CLIENT, {"zero": 0})
    theirs = SdkSpans(world.provider.get_tracer("theirs")).child(PARENT, "work", SpanKind.CLIENT, {"zero": 0})
    assert isinstance(world.spans, LightSpans)
    assert ours is not None
    assert theirs is not None
    write(ours)
    write(theirs)
    first, second = world.finished
    assert shown(first) == shown(second)
    assert first.instrumentation_scope is not None
    assert first.instrumentation_scope.name == NAME
    assert first.start_time is not None
    assert first.end_time is not None
    assert second.start_time is not None
    assert first.start_time <= second.start_time <= first.end_time + 10**9
    assert "ValueError: broken" in str(dict(first.events[1].attributes or {})["exception.stacktrace"])


def test_a_span_records_until_it_ends(world: World) -> None:
    span = world.spans.root(world.spans.draw(), "work", SpanKind.INTERNAL, {})
    assert span is not None
    assert span.is_recording()
    span.end()
    assert not span.is_recording()


def test_what_went_well_stays_well(world: World) -> None:
    for statuses in (
        [Status(StatusCode.OK), Status(StatusCode.ERROR, "no")],
        [Status(StatusCode.ERROR, "no"), Status(StatusCode.OK)],
    ):
        span = world.spans.root(world.spans.draw(), "work", SpanKind.INTERNAL, {})
        assert span is not None
        for status in statuses:
            span.set_status(status)
        span.end()
    assert [span.status.status_code for span in world.finished] == [StatusCode.OK, StatusCode.OK]


def test_a_span_is_bounded(world: World) -> None:
    span = world.spans.root(world.spans.draw(), "work", SpanKind.INTERNAL, {"first": 0})
    assert span is not None
    for number in range(2 * MAX_ATTRIBUTES):
        span.set_attribute(f"a{number}", number)
        span.add_event(f"e{number}")
    span.set_attribute("first", 1)
    span.end()
    (made,) = world.finished
    assert made.attributes is not None
    assert (len(made.attributes), len(made.events), made.attributes["first"]) == (MAX_ATTRIBUTES, MAX_EVENTS, 1)


def test_processors_see_it_begin(world: World) -> None:
    class Marking(SpanProcessor):
        def on_start(self, span: Span, parent_context: object = None) -> None:
            span.set_attribute("marked", True)

    world.provider.add_span_processor(Marking())
    span = world.spans.root(world.spans.draw(), "work", SpanKind.INTERNAL, {})
    assert span is not None
    span.end()
    assert dict(world.finished[0].attributes or {}) == {"marked": True}


@pytest.mark.parametrize(
    ("sampler", "light"),
    [
        (ParentBased(ALWAYS_ON), True),
        (ParentBased(ALWAYS_OFF), True),
        (ParentBased(TraceIdRatioBased(0.5)), True),
        (ParentBased(ALWAYS_ON, remote_parent_sampled=ALWAYS_OFF), False),
        (ALWAYS_ON, False),
        (TraceIdRatioBased(0.5), False),
    ],
)
def test_samplers_that_do_not_just_follow_the_parent_are_asked(sampler: Sampler, light: bool) -> None:
    world = World(sampler)
    assert isinstance(world.spans, LightSpans if light else SdkSpans)
    world.provider.shutdown()


def test_a_trace_is_sampled_or_not_as_a_whole() -> None:
    on, off = World(ParentBased(ALWAYS_ON)), World(ParentBased(ALWAYS_OFF))
    assert on.spans.child(UNSAMPLED_PARENT, "work", SpanKind.SERVER, {}) is None
    assert off.spans.draw() == 0
    below = off.spans.child(PARENT, "work", SpanKind.SERVER, {})
    assert below is not None
    assert below.get_span_context().trace_id == PARENT.trace_id
    for world in (on, off):
        world.provider.shutdown()


def test_roots_are_sampled_as_the_sdk_samples_them() -> None:
    sampler = TraceIdRatioBased(0.3)
    world = World(ParentBased(sampler))
    drawn = [trace_id for _ in range(2000) if (trace_id := world.spans.draw())]
    assert 450 < len(drawn) < 750
    assert all(sampler.should_sample(None, trace_id, "").decision.is_sampled() for trace_id in drawn)
    assert len(set(drawn)) == len(drawn)
    assert min(drawn).bit_length() > 64
    span = world.spans.root(drawn[0], "work", SpanKind.INTERNAL, {})
    assert span.get_span_context().trace_id == drawn[0]
    world.provider.shutdown()
