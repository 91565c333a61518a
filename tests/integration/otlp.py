"""A receiver of OTLP spans on a real socket, and a tracer provider that exports to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Sampler

KINDS = {
    trace_pb2.Span.SPAN_KIND_INTERNAL: "call",
    trace_pb2.Span.SPAN_KIND_CLIENT: "attempt",
    trace_pb2.Span.SPAN_KIND_SERVER: "server",
    trace_pb2.Span.SPAN_KIND_PRODUCER: "publish",
    trace_pb2.Span.SPAN_KIND_CONSUMER: "process",
}


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as the receiver got it, and the attributes of its resource."""

    proto: Any
    resource: dict[str, Any]

    @property
    def kind(self) -> str:
        """``call``, ``attempt`` or ``server``; of events, ``publish`` or ``process``."""
        return KINDS[self.proto.kind]

    @property
    def name(self) -> str:
        """Its name."""
        return str(self.proto.name)

    @property
    def attributes(self) -> dict[str, Any]:
        """By key."""
        return _plain(self.proto.attributes)

    @property
    def code(self) -> str:
        """gRPC's status."""
        return str(self.attributes["rpc.response.status_code"])

    @property
    def is_error(self) -> bool:
        """Whether its status is ERROR."""
        return bool(self.proto.status.code == trace_pb2.Status.STATUS_CODE_ERROR)

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Names with attributes."""
        return [(event.name, _plain(event.attributes)) for event in self.proto.events]


def _plain(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.address = ""
        self.spans: list[ReceivedSpan] = []
        self._providers: list[TracerProvider] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            of = _plain(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [ReceivedSpan(span, of) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def provider(self, service: str, sampler: Sampler = ALWAYS_ON) -> TracerProvider:
        """A provider of tracers that exports here."""
        made = TracerProvider(
            sampler=sampler,
            resource=Resource.create({"service.name": service}),
            shutdown_on_exit=False,
        )
        made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=self.address, insecure=True)))
        self._providers.append(made)
        return made

    async def received(self, at_least: int = 0) -> list[ReceivedSpan]:
        """Everything that has ended up to now, in the order of their starts; waits until it is so many."""
        async with asyncio.timeout(30):
            while len(await self._flushed()) < at_least:
                await asyncio.sleep(0.01)
        return await self._flushed()

    async def _flushed(self) -> list[ReceivedSpan]:
        for provider in self._providers:
            await asyncio.to_thread(provider.force_flush)
        return sorted(self.spans, key=lambda span: int(span.proto.start_time_unix_nano))

    async def is_tree(self, *lines: str) -> None:
        """Holds that all spans make one tree, which looks so: a line a span, indented, as ``kind status``."""
        spans = await self.received(len(lines))
        assert len({span.proto.trace_id for span in spans}) == 1, spans
        ids = {span.proto.span_id for span in spans}
        roots = [span for span in spans if span.proto.parent_span_id not in ids]
        assert len(roots) == 1, roots
        assert not roots[0].proto.parent_span_id
        assert list(_lines(roots[0], spans, 0)) == list(lines)

    async def close(self) -> None:
        """Ends the exporters."""
        for provider in self._providers:
            await asyncio.to_thread(provider.shutdown)


def _lines(span: ReceivedSpan, spans: list[ReceivedSpan], depth: int) -> Iterator[str]:
    yield f"{'  ' * depth}{span.kind} {span.code}{' error' if span.is_error else ''}"
    for child in spans:
        if child.proto.parent_span_id == span.proto.span_id:
            yield from _lines(child, spans, depth + 1)


@asynccontextmanager
async def open_receiver(port: int = 0) -> AsyncIterator[Receiver]:
    """A receiver that listens; by default on any port that is free."""
    receiver = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.address = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    try:
        yield receiver
    finally:
        await receiver.close()
        await server.stop(None)
