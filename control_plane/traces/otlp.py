"""From OTLP's messages to spans as the store holds them. Whatever a workload sends comes out small, or is refused.

Source: opentelemetry-proto, and OpenTelemetry's semantic conventions for resources and RPCs.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from control_plane.traces.span import Kind, Process, Span, SpanEvent, SpanLink, Status, pack
from mesh_client.core.errors import MeshError

MAX_SPAN_BYTES, MAX_RESOURCE_BYTES = 64 * 1024, 16 * 1024
"""Of what is parsed. Protobuf needs up to 80 times as much memory."""
MAX_ATTRIBUTES, MAX_EVENTS, MAX_EVENT_ATTRIBUTES, MAX_LINKS = 64, 32, 16, 8
"""That are kept of a span; the rest is counted."""
MAX_KEY, MAX_VALUE, MAX_NAME, MAX_MESSAGE = 128, 4_096, 256, 1_024
"""Characters that are kept of a text."""
MAX_DETAILS, MAX_RESOURCE_DETAILS = 16_384, 1_024
"""Characters of all attributes and events of a span, and of all attributes of a resource."""
MAX_RESOURCE_ATTRIBUTES = 16
MAX_DEPTH = 4
"""Of attributes within attributes."""
FARTHEST = 86_400 * 10**9
"""Nanoseconds from the control plane's clock by which a span's may differ: a day."""

UNKNOWN = "unknown"
"""Name of the service of a process that has neither an identity nor a name."""

_NO_NAME = "unknown_service"
"""What SDKs call a service that nobody has named."""
_OWN_FIELDS = frozenset({"service.name", "service.instance.id"})
_OF_SDK = "telemetry.sdk."

_KINDS = {
    trace_pb2.Span.SPAN_KIND_INTERNAL: Kind.INTERNAL,
    trace_pb2.Span.SPAN_KIND_SERVER: Kind.SERVER,
    trace_pb2.Span.SPAN_KIND_CLIENT: Kind.CLIENT,
    trace_pb2.Span.SPAN_KIND_PRODUCER: Kind.PRODUCER,
    trace_pb2.Span.SPAN_KIND_CONSUMER: Kind.CONSUMER,
}
_STATUSES = {trace_pb2.Status.STATUS_CODE_OK: Status.OK, trace_pb2.Status.STATUS_CODE_ERROR: Status.ERROR}


class UnusableSpanError(MeshError, ValueError):
    """A span, or the process that it is of, cannot be taken in; the message says why, the same for all such spans."""


class _Details:
    """Counts what is kept of a span, and what is not.

    Args:
        room: characters of keys and values.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.dropped = 0

    def pack(self, attributes: Sequence[common_pb2.KeyValue], most: int) -> str:
        kept: list[tuple[str, str]] = []
        for attribute in attributes[:most]:
            if self.room <= 0:
                break
            key, value = shortened(attribute.key, MAX_KEY), text_of(attribute.value)
            self.room -= len(key) + len(value)
            kept.append((key, value))
        self.dropped += len(attributes) - len(kept)
        return pack(kept)


def process_of(serialised: bytes, service: str | None = None, workload_id: str = "") -> Process:
    """The process that a resource describes.

    Args:
        serialised: ``opentelemetry.proto.resource.v1.Resource``.
        service: whose workload it is by its identity, which holds whatever the resource says; None without identities.
        workload_id: likewise; empty without identities.

    Raises:
        UnusableSpanError: it is no resource, or too large.
    """
    if len(serialised) > MAX_RESOURCE_BYTES:
        raise UnusableSpanError(f"its resource has more than {MAX_RESOURCE_BYTES // 1024} KiB")
    try:
        resource = resource_pb2.Resource.FromString(serialised)
    except DecodeError:
        raise UnusableSpanError("its resource is malformed") from None
    attributes = resource.attributes[:MAX_ATTRIBUTES]
    named = {each.key: shortened(text_of(each.value), MAX_NAME) for each in attributes if each.key in _OWN_FIELDS}
    claimed = named.get("service.name", "")
    if claimed.startswith(_NO_NAME):
        claimed = ""
    name = service or claimed or UNKNOWN
    others = [each for each in attributes if each.key not in _OWN_FIELDS and not each.key.startswith(_OF_SDK)]
    if claimed and claimed != name:
        others.insert(0, common_pb2.KeyValue(key="service.name", value=common_pb2.AnyValue(string_value=claimed)))
    packed = _Details(MAX_RESOURCE_DETAILS).pack(others, MAX_RESOURCE_ATTRIBUTES)
    return Process(name, workload_id, named.get("service.instance.id", ""), packed)


def claimed_name(process: Process) -> str:
    """What a process calls its service, if that is not what its identity says; else empty."""
    return process.attributes.get("service.name", "")


def span_of(serialised: bytes, process: Process, now: int) -> tuple[str, Span]:
    """A span, with the id of its trace.

    Args:
        serialised: ``opentelemetry.proto.trace.v1.Span``.
        process: who made it.
        now: nanoseconds since 1970.

    Raises:
        UnusableSpanError: it is no span, too large, not ended, or from another time.
    """
    if len(serialised) > MAX_SPAN_BYTES:
        raise UnusableSpanError(f"larger than {MAX_SPAN_BYTES // 1024} KiB")
    try:
        span = trace_pb2.Span.FromString(serialised)
    except DecodeError:
        raise UnusableSpanError("malformed") from None
    if not (_is_id(span.trace_id, 16) and _is_id(span.span_id, 8)):
        raise UnusableSpanError("without a valid trace id and span id")
    start, end = span.start_time_unix_nano, span.end_time_unix_nano
    if not (start and end):
        raise UnusableSpanError("without a beginning or an end")
    if max(abs(start - now), abs(end - now)) > FARTHEST:
        raise UnusableSpanError("more than a day from the control plane's clock")
    details = _Details(MAX_DETAILS)
    packed = details.pack(span.attributes, MAX_ATTRIBUTES)
    events = tuple(
        SpanEvent(
            event.time_unix_nano, shortened(event.name, MAX_NAME), details.pack(event.attributes, MAX_EVENT_ATTRIBUTES)
        )
        for event in span.events[:MAX_EVENTS]
    )
    links = tuple(
        SpanLink(link.trace_id.hex(), link.span_id.hex())
        for link in span.links[:MAX_LINKS]
        if _is_id(link.trace_id, 16) and _is_id(link.span_id, 8)
    )
    dropped = len(span.events) - len(events) + len(span.links) - len(links)
    dropped += span.dropped_attributes_count + span.dropped_events_count + span.dropped_links_count
    name = shortened(span.name, MAX_NAME)
    return span.trace_id.hex(), Span(
        span.span_id.hex(),
        span.parent_span_id.hex() if _is_id(span.parent_span_id, 8) else "",
        process,
        name,
        start,
        max(start, end),
        _method(span, name),
        _KINDS.get(span.kind, Kind.UNSPECIFIED),
        _STATUSES.get(span.status.code, Status.UNSET),
        shortened(span.status.message, MAX_MESSAGE),
        packed,
        events,
        links,
        min(details.dropped + dropped, 2**32 - 1),
    )


def _is_id(value: bytes, size: int) -> bool:
    return len(value) == size and any(value)


def _method(span: trace_pb2.Span, name: str) -> str:
    """By the conventions, those before and after ``rpc.method`` became the full name."""
    attributes = span.attributes[:MAX_ATTRIBUTES]
    said = {each.key: each.value.string_value for each in attributes if each.key in {"rpc.service", "rpc.method"}}
    method = said.get("rpc.method", "").removeprefix("/")
    if method and "/" not in method and said.get("rpc.service"):
        method = f"{said['rpc.service']}/{method}"
    method = shortened(method or name.removeprefix("/"), MAX_NAME)
    return name if method == name else method


def shortened(text: str, most: int) -> str:
    """The text, or its beginning with dots: ``most`` characters at most. An ellipsis would double its memory."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def text_of(value: common_pb2.AnyValue) -> str:
    """A value as text of at most `MAX_VALUE` characters.

    Numbers are as in JSON, bytes in hex, lists and maps in brackets with their first 64 items.
    """
    return shortened(_text(value, MAX_DEPTH), MAX_VALUE)


def _text(value: common_pb2.AnyValue, depth: int) -> str:
    match value.WhichOneof("value"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return "true" if value.bool_value else "false"
        case "int_value":
            return str(value.int_value)
        case "double_value":
            number = value.double_value
            return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
        case "bytes_value":
            return value.bytes_value[: MAX_VALUE // 2].hex()
        case "array_value" | "kvlist_value":
            return _nested(value, depth - 1)
        case _:
            return ""


def _nested(value: common_pb2.AnyValue, depth: int) -> str:
    if depth < 0:
        return "..."
    if value.HasField("array_value"):
        return f"[{', '.join(_text(each, depth) for each in value.array_value.values[:MAX_ATTRIBUTES])}]"
    pairs = (f"{each.key}: {_text(each.value, depth)}" for each in value.kvlist_value.values[:MAX_ATTRIBUTES])
    return f"{{{', '.join(pairs)}}}"
