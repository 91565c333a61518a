"""Tracer providers of the benchmarks: real spans, exported to a real collector."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased


def provider(collector: str, share: float) -> TracerProvider:
    """One that samples this share of traces (0 to 1).

    Args:
        collector: ``host:port`` of an OTLP receiver.
        share: of the traces that begin in this process.
    """
    made = TracerProvider(sampler=ParentBased(TraceIdRatioBased(share)), shutdown_on_exit=False)
    # With room for what comes between two exports: a span that is dropped costs less.
    made.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint=collector, insecure=True), max_queue_size=100_000)
    )
    return made
