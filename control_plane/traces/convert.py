"""From traces to the messages of ``mesh.v1``."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import trace_pb2

from control_plane.traces.links import TraceLinks
from control_plane.traces.query import TraceFilter
from control_plane.traces.span import Kind, Status
from control_plane.traces.trace import Reason, Trace
from control_plane.traces.waterfall import Row, Waterfall, waterfall
from mesh_client.core.errors import InvalidValueError

_LONGEST = 86_400
"""Seconds that a span may take."""

_KINDS = {
    Kind.UNSPECIFIED: trace_pb2.SPAN_KIND_UNSPECIFIED,
    Kind.INTERNAL: trace_pb2.SPAN_KIND_INTERNAL,
    Kind.SERVER: trace_pb2.SPAN_KIND_SERVER,
    Kind.CLIENT: trace_pb2.SPAN_KIND_CLIENT,
    Kind.PRODUCER: trace_pb2.SPAN_KIND_PRODUCER,
    Kind.CONSUMER: trace_pb2.SPAN_KIND_CONSUMER,
}
_STATUSES = {
    Status.UNSET: trace_pb2.SPAN_STATUS_UNSPECIFIED,
    Status.OK: trace_pb2.SPAN_STATUS_OK,
    Status.ERROR: trace_pb2.SPAN_STATUS_ERROR,
}
_REASONS = {
    Reason.ORDINARY: trace_pb2.TRACE_REASON_ORDINARY,
    Reason.SLOW: trace_pb2.TRACE_REASON_SLOW,
    Reason.ERROR: trace_pb2.TRACE_REASON_ERROR,
}


def filter_from_proto(message: trace_pb2.TraceFilter) -> TraceFilter:
    """The filter.

    Raises:
        InvalidValueError: the least duration is none.
    """
    least = message.min_duration
    if not (0 <= least.seconds <= _LONGEST and 0 <= least.nanos < 10**9):
        raise InvalidValueError("filter.min_duration", least.seconds, "0 to 86400 seconds")
    return TraceFilter(message.service, message.method, message.errors, least.seconds * 10**9 + least.nanos)


def summary_to_proto(trace: Trace, links: TraceLinks) -> trace_pb2.TraceSummary:
    """A trace in one line."""
    entry = trace.entry
    return trace_pb2.TraceSummary(
        trace_id=trace.id,
        start=_timestamp(entry.start),
        duration=_duration(trace.duration),
        service=entry.service,
        name=entry.name,
        method=entry.method,
        complete=trace.complete,
        spans=len(trace),
        errors=trace.errors,
        services=trace.services,
        reason=_REASONS[trace.reason],
        link=links.link(trace.id),
        refused=trace.refused,
    )


def trace_to_proto(trace: Trace, links: TraceLinks) -> trace_pb2.GetTraceResponse:
    """A trace as a waterfall."""
    drawn = waterfall(trace.spans)
    return trace_pb2.GetTraceResponse(
        summary=summary_to_proto(trace, links),
        start=_timestamp(drawn.start),
        duration=_duration(drawn.duration),
        spans=[_row_to_proto(row, drawn) for row in drawn.rows],
    )


def _row_to_proto(row: Row, drawn: Waterfall) -> trace_pb2.TraceSpan:
    span = row.span
    return trace_pb2.TraceSpan(
        span_id=span.span_id,
        parent_span_id=span.parent_id,
        depth=row.depth,
        service=span.service,
        workload_id=span.process.workload_id,
        instance=span.process.instance,
        name=span.name,
        method=span.method,
        kind=_KINDS[span.kind],
        offset=_duration(row.offset),
        duration=_duration(row.duration),
        status=_STATUSES[span.status],
        status_message=span.message,
        attributes=span.attributes,
        resource=span.process.attributes,
        events=[
            trace_pb2.TraceEvent(
                name=event.name,
                offset=_duration(drawn.event_offset(row, event.time)),
                attributes=event.attributes,
            )
            for event in span.events
        ],
        links=[trace_pb2.TraceLink(trace_id=link.trace_id, span_id=link.span_id) for link in span.links],
        orphan=row.orphan,
        clock_correction=_duration(row.correction),
        dropped=span.dropped,
    )


def _timestamp(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def _duration(nanoseconds: int) -> Duration:
    """Both parts have the sign of the whole, as protobuf wants it."""
    sign = -1 if nanoseconds < 0 else 1
    seconds, nanos = divmod(abs(nanoseconds), 10**9)
    return Duration(seconds=sign * seconds, nanos=sign * nanos)
