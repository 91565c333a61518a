"""From what workloads send to spans: nothing of it can crash, or take much."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from control_plane.traces.allowance import MAX_REPORTERS, Allowance, Rate, Reporter, Reporters, ReportLimits
from control_plane.traces.otlp import UnusableSpanError, claimed_name, process_of, span_of, text_of
from control_plane.traces.otlp_wire import MAX_FIELDS, MalformedRequestError, split
from control_plane.traces.span import Kind, Process, SpanEvent, SpanLink
from control_plane.traces.span import Status as SpanStatus
from mesh_client.core.errors import InvalidValueError
from tests.control_plane.spans import BEGINNING, MS, process

TRACE, SPAN = bytes(range(16)), bytes(range(1, 9))


def value(of: object) -> AnyValue:
    match of:
        case bool():
            return AnyValue(bool_value=of)
        case int():
            return AnyValue(int_value=of)
        case float():
            return AnyValue(double_value=of)
        case bytes():
            return AnyValue(bytes_value=of)
        case list():
            return AnyValue(array_value=ArrayValue(values=map(value, of)))
        case dict():
            return AnyValue(kvlist_value=KeyValueList(values=pairs(of)))
        case None:
            return AnyValue()
        case _:
            return AnyValue(string_value=str(of))


def pairs(of: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=value(each)) for key, each in of.items()]


def message(**fields: Any) -> Span:
    defaults: dict[str, Any] = {
        "trace_id": TRACE,
        "span_id": SPAN,
        "name": "span",
        "start_time_unix_nano": BEGINNING,
        "end_time_unix_nano": BEGINNING + MS,
    }
    return Span(**{**defaults, **fields})


def converted(**fields: Any) -> Any:
    return span_of(message(**fields).SerializeToString(), process(), BEGINNING)[1]


def resource(**attributes: Any) -> bytes:
    return Resource(
        attributes=pairs({key.replace("__", "."): each for key, each in attributes.items()})
    ).SerializeToString()


# -- spans


def test_a_span_is_taken_in_with_everything_that_it_says() -> None:
    sent = message(
        parent_span_id=b"\1" * 8,
        name="shop.v1.OrderService/PlaceOrder",
        kind=Span.SPAN_KIND_CLIENT,
        attributes=pairs({"rpc.system": "grpc", "server.port": 5001}),
        events=[Span.Event(time_unix_nano=BEGINNING, name="retry", attributes=pairs({"attempt": 2}))],
        links=[Span.Link(trace_id=b"\2" * 16, span_id=b"\3" * 8), Span.Link(trace_id=b"short")],
        status=Status(code=Status.STATUS_CODE_ERROR, message="UNAVAILABLE"),
        dropped_attributes_count=1,
        dropped_events_count=2,
        dropped_links_count=3,
    )
    trace_id, made = span_of(sent.SerializeToString(), process(), BEGINNING)
    assert trace_id == TRACE.hex()
    assert (made.span_id, made.parent_id, made.process) == (SPAN.hex(), "01" * 8, process())
    assert made.name == made.method == "shop.v1.OrderService/PlaceOrder"
    assert made.name is made.method
    assert (made.kind, made.status, made.message) == (Kind.CLIENT, SpanStatus.ERROR, "UNAVAILABLE")
    assert (made.start, made.end) == (BEGINNING, BEGINNING + MS)
    assert made.attributes == {"rpc.system": "grpc", "server.port": "5001"}
    assert made.events == (SpanEvent(BEGINNING, "retry", "attempt\x1f2"),)
    assert made.links == (SpanLink("02" * 16, "03" * 8),)
    assert made.dropped == 7


def test_what_is_not_known_is_unspecified() -> None:
    made = converted(kind=99, status=Status.FromString(b"\x18\x07"), parent_span_id=bytes(8))
    assert (made.kind, made.status, made.parent_id) == (Kind.UNSPECIFIED, SpanStatus.UNSET, "")
    assert converted(parent_span_id=b"\1" * 4).parent_id == ""
    assert converted(status=Status(code=Status.STATUS_CODE_OK)).status is SpanStatus.OK


@pytest.mark.parametrize(
    ("name", "attributes", "method"),
    [
        ("/a.B/C", {}, "a.B/C"),
        ("job", {}, "job"),
        ("call", {"rpc.service": "a.B", "rpc.method": "C"}, "a.B/C"),
        ("call", {"rpc.method": "a.B/C"}, "a.B/C"),
        ("call", {"rpc.method": "/a.B/C", "rpc.service": "x"}, "a.B/C"),
        ("call", {"rpc.method": "C"}, "C"),
        ("call", {"rpc.method": 5}, "call"),
    ],
)
def test_the_method_is_read_by_the_conventions_before_and_after_its_full_name(
    name: str, attributes: dict[str, object], method: str
) -> None:
    assert converted(name=name, attributes=pairs(attributes)).method == method


def test_a_span_that_ends_before_it_begins_takes_no_time() -> None:
    assert converted(end_time_unix_nano=BEGINNING - MS).duration == 0


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"trace_id": b""}, "without a valid trace id"),
        ({"trace_id": bytes(16)}, "without a valid trace id"),
        ({"trace_id": b"\1" * 17}, "without a valid trace id"),
        ({"span_id": bytes(8)}, "without a valid trace id"),
        ({"start_time_unix_nano": 0}, "without a beginning or an end"),
        ({"end_time_unix_nano": 0}, "without a beginning or an end"),
        ({"start_time_unix_nano": 1}, "more than a day"),
        ({"end_time_unix_nano": 2**64 - 1}, "more than a day"),
        ({"name": "x" * 66_000}, "larger than 64 KiB"),
    ],
)
def test_what_is_of_no_use_is_refused_with_the_reason(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UnusableSpanError, match=why):
        converted(**fields)


@pytest.mark.parametrize("junk", [b"\xff", b"\x2a\x02\xff\xfe", b"\x0a\x7f"])
def test_what_is_no_span_is_refused(junk: bytes) -> None:
    with pytest.raises(UnusableSpanError, match="malformed"):
        span_of(junk, process(), BEGINNING)


def test_attributes_nested_deeper_than_protobuf_reads_are_refused() -> None:
    deep = b""
    for _ in range(150):  # an AnyValue with an array with an AnyValue
        inner = b"\x0a" + _length(deep)
        deep = b"\x2a" + _length(inner)
    attribute = b"\x0a\x01k\x12" + _length(deep)
    with pytest.raises(UnusableSpanError, match="malformed"):
        span_of(message().SerializeToString() + b"\x4a" + _length(attribute), process(), BEGINNING)


def _length(body: bytes) -> bytes:
    size, coded = len(body), bytearray()
    while size > 0x7F:
        coded.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*coded, size]) + body


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        ("text", "text"),
        (True, "true"),
        (False, "false"),
        (-5, "-5"),
        (2.0, "2"),
        (0.25, "0.25"),
        (1e300, "1e+300"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (b"\0\xff", "00ff"),
        ([1, "a", [True]], "[1, a, [true]]"),
        ({"a": {"b": 1}}, "{a: {b: 1}}"),
        ([[[[[1]]]]], "[[[[...]]]]"),
        ({"a": {"b": {"c": {"d": {"e": 1}}}}}, "{a: {b: {c: {d: ...}}}}"),
        (None, ""),
        ("x" * 5_000, "x" * 4_093 + "..."),
        (list(range(100)), f"[{', '.join(map(str, range(64)))}]"),
    ],
)
def test_values_are_text(sent: object, text: str) -> None:
    assert text_of(value(sent)) == text


def test_of_much_the_first_is_kept_and_the_rest_is_counted() -> None:
    made = converted(
        attributes=pairs({f"key{number}": number for number in range(100)}),
        events=[Span.Event(name="e", attributes=pairs({str(n): n for n in range(20)})) for _ in range(40)],
        links=[Span.Link(trace_id=b"\2" * 16, span_id=b"\3" * 8)] * 10,
        status=Status(message="m" * 2_000),
        name="n" * 300,
    )
    assert (len(made.attributes), len(made.events), len(made.links)) == (64, 32, 8)
    assert (len(made.events[0].attributes), len(made.message), len(made.name)) == (16, 1_024, 256)
    assert made.dropped == 36 + 32 * 4 + 8 + 2
    large = converted(attributes=pairs({f"k{number}" * 100: "x" * 3_000 for number in range(20)}))
    assert len(large.attributes) == 6
    assert large.dropped == 14
    assert large.cost < 25_000


# -- processes


def test_a_process_is_named_by_its_identity_whatever_it_says() -> None:
    said = resource(service__name="payments", service__instance__id="p-1", host__name="h", telemetry__sdk__name="o")
    assert process_of(said) == Process("payments", "", "p-1", "host.name\x1fh")
    made = process_of(said, "orders", "0" * 16)
    assert (made.service, made.workload_id, made.instance) == ("orders", "0" * 16, "p-1")
    assert made.attributes == {"service.name": "payments", "host.name": "h"}
    assert claimed_name(made) == "payments"
    assert claimed_name(process_of(said)) == ""
    assert claimed_name(process_of(resource(service__name="orders"), "orders", "0" * 16)) == ""


def test_a_process_that_has_no_name_gets_none_from_the_sdk() -> None:
    for said in (resource(), resource(service__name="unknown_service:python"), resource(service__name="")):
        assert process_of(said).service == "unknown"
        assert process_of(said, "orders", "0" * 16) == Process("orders", "0" * 16)


def test_a_resource_is_bounded() -> None:
    many = process_of(resource(**{f"key{number}": "x" * 10 for number in range(100)}))
    assert len(many.attributes) == 16
    large = process_of(resource(service__name="s" * 500, **{f"key{number}": "x" * 900 for number in range(10)}))
    assert len(large.service) == 256
    assert large.cost < 3_000
    for junk, why in ((b"\xff", "malformed"), (resource(key="x" * 17_000), "more than 16 KiB")):
        with pytest.raises(UnusableSpanError, match=why):
            process_of(junk)


# -- anything


MESSAGES = st.builds(
    Span,
    trace_id=st.binary(min_size=16, max_size=16),
    span_id=st.binary(min_size=8, max_size=8),
    parent_span_id=st.one_of(st.just(b""), st.binary(max_size=9)),
    name=st.text(max_size=400),
    kind=st.integers(0, 9),
    start_time_unix_nano=st.one_of(st.just(BEGINNING), st.integers(0, 2**64 - 1)),
    end_time_unix_nano=st.one_of(st.just(BEGINNING + MS), st.integers(0, 2**64 - 1)),
    attributes=st.dictionaries(
        st.text(max_size=200),
        st.recursive(
            st.one_of(st.none(), st.text(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.binary()),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ).map(pairs),
    status=st.builds(Status, code=st.sampled_from(Status.StatusCode.values()), message=st.text()),
    dropped_attributes_count=st.integers(0, 2**32 - 1),
    dropped_events_count=st.integers(0, 2**32 - 1),
)


@settings(max_examples=50)
@given(MESSAGES)
def test_any_span_comes_out_small_or_is_refused(sent: Span) -> None:
    try:
        _, made = span_of(sent.SerializeToString(), process(), BEGINNING)
    except UnusableSpanError:
        return
    assert made.duration >= 0
    assert made.cost < 128 * 1024
    assert 0 <= made.dropped < 2**32
    assert all(isinstance(each, str) for pair in made.attributes.items() for each in pair)


@given(st.binary(max_size=200))
def test_junk_is_refused_and_raises_nothing_else(junk: bytes) -> None:
    for parse in (lambda: span_of(junk, process(), BEGINNING), lambda: process_of(junk), lambda: split(junk)):
        with contextlib.suppress(UnusableSpanError, MalformedRequestError):
            parse()


# -- requests in parts

SCOPES = st.builds(
    ScopeSpans, scope=st.builds(InstrumentationScope, name=st.text(max_size=5)), spans=st.lists(MESSAGES, max_size=3)
)
REQUESTS = st.builds(
    ExportTraceServiceRequest,
    resource_spans=st.lists(
        st.builds(
            ResourceSpans,
            resource=st.builds(Resource, dropped_attributes_count=st.integers(0, 9)),
            scope_spans=st.lists(SCOPES, max_size=3),
            schema_url=st.text(max_size=5),
        ),
        max_size=3,
    ),
)


@settings(max_examples=30)
@given(REQUESTS)
def test_a_request_is_taken_apart_as_protobuf_reads_it(request: ExportTraceServiceRequest) -> None:
    found = split(request.SerializeToString())
    assert [
        (Resource.FromString(process.resource), [Span.FromString(each) for each in process.spans])
        for process in found.processes
    ] == [
        (each.resource, [span for scope in each.scope_spans for span in scope.spans]) for each in request.resource_spans
    ]
    assert found.spans == sum(len(scope.spans) for each in request.resource_spans for scope in each.scope_spans)
    assert found.fields >= found.spans


def test_fields_that_are_not_known_are_passed_over() -> None:
    unknown = b"\x98\x06\x01" + b"\xa1\x06" + bytes(8) + b"\xad\x06" + bytes(4) + b"\xb2\x06\x03abc"
    scope = b"\x12" + _length(message().SerializeToString()) + unknown
    inner = unknown + b"\x12" + _length(scope)
    found = split(unknown + b"\x0a" + _length(inner))
    assert [each.spans for each in found.processes] == [(message().SerializeToString(),)]


def test_a_resource_that_comes_in_parts_is_one() -> None:
    parts = b"".join(b"\x0a" + _length(each) for each in (resource(a="1"), resource(b="2")))
    (found,) = split(b"\x0a" + _length(parts)).processes
    assert process_of(found.resource).attributes == {"a": "1", "b": "2"}


@pytest.mark.parametrize(
    "junk",
    [
        b"\x0a\x05\x00",  # longer than there is
        b"\x0b",  # a group
        b"\x02\x00",  # field 0
        b"\x0a" + b"\xff" * 12,  # a number without an end
        b"\x80",
        b"\x09\x00",  # half a number
        b"\x0a\x04\x12\x7f\x00\x00",  # beyond the message that it is in
    ],
)
def test_what_is_no_request_is_refused(junk: bytes) -> None:
    with pytest.raises(MalformedRequestError, match="no ExportTraceServiceRequest"):
        split(junk)


def test_a_request_of_too_many_parts_is_refused_before_they_are_made() -> None:
    def empty_spans(count: int) -> bytes:
        return b"\x0a" + _length(b"\x12" + _length(b"\x12\x00" * count))

    assert split(empty_spans(MAX_FIELDS - 2)).spans == MAX_FIELDS - 2
    with pytest.raises(MalformedRequestError, match="more than 10000 parts"):
        split(empty_spans(2_000_000))


# -- allowances


def test_an_allowance_fills_with_time_and_can_be_overdrawn_once_over() -> None:
    allowance = Allowance(Rate(10.0, 100), 0.0)
    assert allowance.left(0.0) == 100
    allowance.use(90, 0.0)
    assert allowance.left(1.0) == 20
    allowance.use(1_000, 1.0)
    assert allowance.left(1.0) == -100
    assert allowance.left(11.1) == 1
    assert allowance.left(1_000.0) == 100


LIMITS = ReportLimits(requests=Rate(2.0, 4), spans=Rate(10.0, 50), size=Rate(1_024.0, 4_096), all_spans=Rate(100.0, 60))


def reporter(limits: ReportLimits = LIMITS) -> Reporter:
    return Reporter(limits, Allowance(limits.all_spans, 0.0), 0.0)


def test_requests_are_limited_before_they_are_read() -> None:
    one = reporter()
    assert [one.refusal(0.0) for _ in range(4)] == [""] * 4
    assert one.refusal(0.0) == "more than 2 requests a second; send more spans in each"
    assert one.refusal(0.5) == ""


def test_bytes_are_limited_by_those_that_were_read_before() -> None:
    one = reporter()
    one.read(5_000, 0.0)
    assert one.refusal(0.0) == "more than 1 KiB a second; record less, or sample"
    assert one.refusal(1.0) == ""


def test_of_more_spans_than_are_allowed_the_first_are_taken() -> None:
    one = reporter()
    assert one.grant(30, 2, 0.0) == 30
    assert one.grant(30, 2, 0.0) == 18
    assert one.refusal(0.0) == "more than 10 spans a second; sample"
    assert one.grant(30, 2, 0.0) == 0
    assert one.refusal(10.0) == ""


def test_spans_of_all_together_are_limited() -> None:
    all_of_them = Reporters(LIMITS)
    assert all_of_them.reporter("a", 0.0).grant(50, 0, 0.0) == 50
    assert all_of_them.reporter("b", 0.0).grant(50, 0, 0.0) == 10
    assert all_of_them.reporter("c", 0.0).refusal(0.0) == "more than 100 spans a second from all together; sample"
    assert all_of_them.reporter("a", 0.0).refusal(0.0) == "more than 10 spans a second; sample"
    assert all_of_them.reporter("c", 1.0).refusal(1.0) == ""


def test_a_bounded_number_of_reporters_is_remembered() -> None:
    known = Reporters(ReportLimits())
    first, second = known.reporter("first", 0.0), known.reporter("second", 0.0)
    assert known.reporter("first", 0.0) is first
    for number in range(MAX_REPORTERS - 1):
        known.reporter(str(number), 0.0)
    assert known.reporter("first", 0.0) is first
    assert known.reporter("second", 0.0) is not second


@pytest.mark.parametrize(("per_second", "burst"), [(0.0, 1), (1.0, 0), (math.nan, 1)])
def test_rates_are_checked(per_second: float, burst: int) -> None:
    with pytest.raises(InvalidValueError, match="rate"):
        Rate(per_second, burst)
