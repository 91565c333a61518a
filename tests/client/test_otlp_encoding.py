"""The bytes are those that the stock exporters send."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from mesh_client.otlp_encoding import MAX_REMEMBERED, _remembered, encode_request

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
ATTRIBUTES = st.dictionaries(
    TEXT.filter(bool),
    st.one_of(
        TEXT,
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.binary(max_size=5),
        st.lists(TEXT, max_size=3).map(tuple),
        st.lists(st.integers(-5, 5), max_size=3),
    ),
    max_size=4,
)
CONTEXTS = st.builds(
    SpanContext,
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.booleans(),
    st.just(TraceFlags(1)),
    st.sampled_from([TraceState(), TraceState([("a", "1"), ("b", "2")])]),
)
TIMES = st.integers(0, 2**64 - 1)
RESOURCES = st.sampled_from(
    [Resource({}), Resource({"service.name": "orders", "port": 5}), Resource({"host.name": "a"}, "https://schema")]
)
SCOPES = st.sampled_from(
    [None, InstrumentationScope("a"), InstrumentationScope("b", "1.0", "https://schema", {"key": "value"})]
)
SPANS = st.builds(
    ReadableSpan,
    name=TEXT,
    context=CONTEXTS,
    parent=st.none() | CONTEXTS,
    resource=RESOURCES,
    attributes=ATTRIBUTES,
    events=st.lists(st.builds(Event, TEXT, ATTRIBUTES, TIMES), max_size=2),
    links=st.lists(st.builds(Link, CONTEXTS, ATTRIBUTES), max_size=2),
    kind=st.sampled_from(SpanKind),
    status=st.sampled_from([Status(StatusCode.UNSET), Status(StatusCode.OK), Status(StatusCode.ERROR, "why")]),
    start_time=TIMES,
    end_time=TIMES,
    instrumentation_scope=SCOPES,
)


@settings(max_examples=60)
@given(st.lists(SPANS, max_size=5))
def test_the_request_is_the_one_that_the_stock_encoder_makes(spans: list[ReadableSpan]) -> None:
    assert ExportTraceServiceRequest.FromString(encode_request(spans)) == encode_spans(spans)


def span(**attributes: Any) -> ReadableSpan:
    return ReadableSpan("span", SpanContext(1, 2, is_remote=False), attributes=attributes)


def sent(value: Any) -> Any:
    request = ExportTraceServiceRequest.FromString(encode_request([span(key=value)]))
    (attribute,) = request.resource_spans[0].scope_spans[0].spans[0].attributes
    return attribute.value


def test_what_opentelemetry_does_not_know_is_sent_as_text_and_nothing_raises() -> None:
    assert sent(2**70).string_value == str(2**70)
    assert sent(-(2**70)).string_value == str(-(2**70))
    assert sent("half \ud800 a pair").string_value == "half \\ud800 a pair"
    assert sent(None).WhichOneof("value") is None
    assert sent(1 + 2j).string_value == "(1+2j)"
    assert math.isnan(sent(math.nan).double_value)
    assert [each.int_value for each in sent(range(3)).array_value.values] == [0, 1, 2]
    nested = sent({"a": {5: [True]}})
    assert nested.kvlist_value.values[0].value.kvlist_value.values[0].key == "5"


def test_equal_values_of_different_types_are_told_apart() -> None:
    assert [sent(value).WhichOneof("value") for value in (1, True, 1.0)] == ["int_value", "bool_value", "double_value"]


def test_dropped_details_are_counted() -> None:
    class Cut(ReadableSpan):
        dropped_attributes = 300
        dropped_events = 1
        dropped_links = 2

    made = Cut("span", SpanContext(1, 2, is_remote=False))
    assert ExportTraceServiceRequest.FromString(encode_request([made])) == encode_spans([made])


@pytest.mark.parametrize("value", ["x" * 100, b"x", 1.5])
def test_large_and_rare_values_are_not_remembered(value: object) -> None:
    encode_request([span()])  # the resource is remembered
    before = _remembered.cache_info().misses
    encode_request([span(key=value)])
    assert _remembered.cache_info().misses == before
    assert _remembered.cache_info().maxsize == MAX_REMEMBERED
