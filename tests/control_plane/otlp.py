"""OTLP requests for tests."""

from __future__ import annotations

import time
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
MS = 1_000_000


def attributes(**values: object) -> list[KeyValue]:
    """Underscores are dots."""
    return [
        KeyValue(key=key.replace("_", "."), value=AnyValue(string_value=str(value))) for key, value in values.items()
    ]


def otlp_span(trace: int, number: int, parent: int = 0, *, took: float = 10.0, error: str = "", **fields: Any) -> Span:
    """A span that began a second ago."""
    start = time.time_ns() - 1_000 * MS
    return Span(
        trace_id=trace.to_bytes(16, "big"),
        span_id=number.to_bytes(8, "big"),
        parent_span_id=parent.to_bytes(8, "big") if parent else b"",
        name=fields.pop("name", f"span {number}"),
        start_time_unix_nano=start,
        end_time_unix_nano=start + round(took * MS),
        status=Status(code=Status.STATUS_CODE_ERROR, message=error) if error else Status(),
        **fields,
    )


def otlp_request(*spans: Span, **resource: object) -> ExportTraceServiceRequest:
    """The request of one process."""
    return ExportTraceServiceRequest(
        resource_spans=[
            ResourceSpans(resource=Resource(attributes=attributes(**resource)), scope_spans=[ScopeSpans(spans=spans)])
        ]
    )


async def export(
    channel: grpc.aio.Channel, request: ExportTraceServiceRequest | bytes, timeout: float = 30.0, **options: Any
) -> ExportTraceServiceResponse:
    """Sends spans as any exporter does, by a unary call."""
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, ExportTraceServiceResponse] = channel.unary_unary(
        EXPORT, response_deserializer=ExportTraceServiceResponse.FromString
    )
    body = request if isinstance(request, bytes) else request.SerializeToString()
    return await call(body, timeout=timeout, **options)
