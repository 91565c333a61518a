"""Spans on their way to a control plane, and what becomes of them and of the process when it is not there."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.traces.settings import TraceSettings
from mesh_client import trace_sender, tracing_setup
from mesh_client.core import trace_delivery
from mesh_client.core.errors import ConfigError
from mesh_client.core.policy import Backoff
from mesh_client.trace_export import ExportCounts, MeshSpanExporter, MeshSpanProcessor
from mesh_client.trace_exporters import EXPORTERS
from mesh_client.trace_sender import METHOD, TraceSender
from mesh_client.tracing_setup import BoundedBatchProcessor, configure_tracing
from mesh_client.transport import PlaintextTransport
from tests.control_plane.test_secure_server import World, running
from tests.ports import held_address

TIMEOUT = 30.0


class Collector(grpc.GenericRpcHandler):
    """A control plane, as far as spans are concerned, that answers what the test tells it to."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.answer: ExportTraceServiceResponse | grpc.StatusCode = ExportTraceServiceResponse()
        self.hangs = False
        self.came = asyncio.Event()
        self.address = "127.0.0.1:0"
        self._server: grpc.aio.Server | None = None

    @property
    def spans(self) -> int:
        return sum(
            len(scope.spans)
            for request in self.requests
            for each in request.resource_spans
            for scope in each.scope_spans
        )

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        assert handler_call_details.method == METHOD
        return grpc.unary_unary_rpc_method_handler(
            self._export,
            ExportTraceServiceRequest.FromString,
            ExportTraceServiceResponse.SerializeToString,
        )

    async def _export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        self.requests.append(request)
        self.came.set()
        if self.hangs:
            await asyncio.Event().wait()
        if isinstance(self.answer, ExportTraceServiceResponse):
            return self.answer
        await context.abort(self.answer, "as the test wants it")
        raise AssertionError

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port(self.address)}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT):
            while not condition():
                self.came.clear()
                await self.came.wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_delivery, "BACKOFF", Backoff(initial=0.01, max=0.05, multiplier=2.0))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which all spans must arrive at the end: a busy machine may not take them in half a second."""
    monkeypatch.setattr(trace_sender, "FLUSH_TIMEOUT", TIMEOUT)
    monkeypatch.setattr(tracing_setup, "SHUTDOWN_TIMEOUT", TIMEOUT)


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    with held_address() as address:  # a test stops it and starts it again
        made = Collector()
        made.address = address
        await made.start()
        yield made
        await made.stop()


class Traced:
    """A tracer provider whose spans go through the exporter."""

    def __init__(self, **options: Any) -> None:
        self.exporter = MeshSpanExporter(**{"delay": 0.01, **options})
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(MeshSpanProcessor(self.exporter))
        self._tracer = self.provider.get_tracer("test")

    def spans(self, count: int = 1, size: int = 0) -> None:
        for number in range(count):
            self._tracer.start_span(f"span {number}", attributes={"key": "x" * size}).end()

    @asynccontextmanager
    async def sending(self, *addresses: str) -> AsyncIterator[TraceSender]:
        sender = self.exporter.attach(PlaintextTransport(), addresses, Random(1))
        try:
            yield sender
        finally:
            await sender.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.005)


# -- when all is well


async def test_spans_are_gathered_and_sent(collector: Collector) -> None:
    traced = Traced(delay=0.05)
    async with traced.sending(collector.address):
        traced.spans(3)
        await collector.until(lambda: collector.spans == 3)
        assert len(collector.requests) == 1
        traced.spans(2)
        await until(lambda: traced.exporter.counts == ExportCounts(5, 0, 0, 0))


async def test_a_full_batch_is_sent_at_once(collector: Collector, patient: None) -> None:
    traced = Traced(delay=60.0, batch=40)
    async with traced.sending(collector.address):
        traced.spans(100)
        await collector.until(lambda: collector.spans == 80)
        assert len(collector.requests) == 2
        await until(lambda: traced.exporter.counts == ExportCounts(80, 0, 0, 20))
    # What is left is sent at the end, however long it would have been gathered.
    assert collector.spans == 100


async def test_spans_from_before_there_is_a_mesh_client_wait_for_it(collector: Collector) -> None:
    traced = Traced()
    traced.spans(2)
    async with traced.sending(collector.address):
        await collector.until(lambda: collector.spans == 2)


async def test_spans_after_a_mesh_client_wait_for_the_next_one(collector: Collector, patient: None) -> None:
    traced = Traced()
    async with traced.sending(collector.address):
        traced.spans(1)
    traced.spans(2)
    assert traced.exporter.counts == ExportCounts(1, 0, 0, 2)
    async with traced.sending(collector.address):
        await collector.until(lambda: collector.spans == 3)


async def test_of_several_mesh_clients_the_first_sends(collector: Collector) -> None:
    other = Collector()
    await other.start()
    traced = Traced()
    try:
        async with traced.sending(other.address):
            async with traced.sending(collector.address):
                traced.spans(1)
                await other.until(lambda: other.spans == 1)
            first = traced.exporter.attach(PlaintextTransport(), [collector.address], Random(1))
        assert collector.spans == 0
        traced.spans(1)
        await collector.until(lambda: collector.spans == 1)
        await first.stop()
    finally:
        await other.stop()


async def test_spans_from_all_threads_are_sent(collector: Collector) -> None:
    traced = Traced(delay=0.01, queue=5_000)
    async with traced.sending(collector.address):
        threads = [threading.Thread(target=traced.spans, args=(500,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        traced.spans(500)
        await collector.until(lambda: collector.spans == 2_500)
        for thread in threads:
            thread.join()
        for _ in range(50):  # one after the other, each while the sender may be falling asleep
            await asyncio.to_thread(traced.spans)
        await collector.until(lambda: collector.spans == 2_550)


async def test_large_batches_go_in_several_requests(collector: Collector) -> None:
    traced = Traced(batch=96)
    async with traced.sending(collector.address):
        traced.spans(96, size=60_000)
        await collector.until(lambda: collector.spans == 96)
        assert len(collector.requests) == 3
        assert all(request.ByteSize() < 4 * 1024 * 1024 for request in collector.requests)


async def test_it_is_an_exporter_of_the_sdk_s_batch_processor_too(collector: Collector) -> None:
    exporter = MeshSpanExporter(delay=0.01)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=10))
    sender = exporter.attach(PlaintextTransport(), [collector.address], Random(1))
    provider.get_tracer("test").start_span("span").end()
    await collector.until(lambda: collector.spans == 1)
    assert await asyncio.to_thread(provider.force_flush)
    await asyncio.to_thread(provider.shutdown)
    await sender.stop()


async def test_sampled_spans_alone_are_sent() -> None:
    traced = Traced()
    MeshSpanProcessor(traced.exporter).on_end(
        ReadableSpan("span", traced.provider.get_tracer("test").start_span("a").get_span_context())
    )
    assert traced.exporter.counts.queued == 1
    from opentelemetry.trace import SpanContext

    MeshSpanProcessor(traced.exporter).on_end(ReadableSpan("span", SpanContext(1, 1, is_remote=False)))
    assert traced.exporter.counts.queued == 1


# -- when it is not


async def test_while_nobody_is_there_spans_wait_and_then_drop_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    collector = Collector()
    traced = Traced(queue=100, batch=10)
    with held_address() as address:
        async with traced.sending(address):
            traced.spans(50)
            await until(lambda: "spans cannot be sent" in caplog.text)
            traced.spans(100)
            assert traced.exporter.counts == ExportCounts(0, 0, 40, 110)  # ten are on their way
            await asyncio.sleep(0.2)  # many attempts more
            assert caplog.text.count("spans cannot be sent") == 1
            collector.address = address
            await collector.start()
            await collector.until(lambda: collector.spans == 110)
            await until(lambda: traced.exporter.counts == ExportCounts(110, 0, 40, 0))
            assert f"spans are sent to {address} again" in caplog.text
    await collector.stop()


async def test_what_nobody_takes_costs_nothing_once_the_queue_is_full() -> None:
    with held_address() as address:
        traced = Traced(queue=200)
        async with traced.sending(address):
            traced.spans(400)
            await asyncio.sleep(0.05)
            (waiting,) = traced.provider._active_span_processor._span_processors
            context = traced.provider.get_tracer("test").start_span("span").get_span_context()
            span = ReadableSpan("span", context)
            begun = time.process_time()
            for _ in range(10_000):
                waiting.on_end(span)
            assert time.process_time() - begun < 0.5
            assert len(traced.exporter.waiting) == 200


@pytest.mark.parametrize("hangs", [False, True])
async def test_the_end_is_not_held_up(hangs: bool, collector: Collector) -> None:
    traced = Traced(delay=0.0)
    if hangs:
        collector.hangs = True
    else:
        await collector.stop()
    sender = traced.exporter.attach(PlaintextTransport(), [collector.address], Random(1))
    traced.spans(100)
    if hangs:
        await collector.until(lambda: bool(collector.requests))
    else:
        await asyncio.sleep(0.05)
    begun = time.monotonic()
    await sender.stop()
    assert time.monotonic() - begun < 5.0
    begun = time.monotonic()
    traced.provider.shutdown()
    assert time.monotonic() - begun < 5.0
    traced.spans(1)
    counts = traced.exporter.counts
    assert (counts.sent, counts.dropped, counts.queued) == (0, 101, 0)


async def test_a_restart_of_the_control_plane_loses_nothing_that_waits(collector: Collector) -> None:
    traced = Traced()
    async with traced.sending(collector.address):
        traced.spans(5)
        await collector.until(lambda: collector.spans == 5)
        await collector.stop()
        traced.spans(5)
        await asyncio.sleep(0.05)
        await collector.start()
        await collector.until(lambda: collector.spans == 10)
        await until(lambda: traced.exporter.counts == ExportCounts(10, 0, 0, 0))


async def test_the_next_control_plane_takes_spans_when_the_first_does_not_answer(collector: Collector) -> None:
    with held_address() as dead:
        traced = Traced()
        async with traced.sending(dead, collector.address):
            traced.spans(1)
            await collector.until(lambda: collector.spans == 1)


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED])
async def test_what_is_refused_is_dropped_counted_and_said(
    code: grpc.StatusCode,
    collector: Collector,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_delivery, "_PAUSES", {})
    collector.answer = code
    traced = Traced(batch=10)
    async with traced.sending(collector.address):
        traced.spans(30)
        await until(lambda: traced.exporter.counts == ExportCounts(0, 0, 30, 0))
        assert caplog.text.count(f"does not take spans, which are dropped: {code.name}") == 1


async def test_what_is_not_kept_is_counted_and_said(collector: Collector, caplog: pytest.LogCaptureFixture) -> None:
    collector.answer = ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=3, error_message="too many")
    )
    traced = Traced()
    async with traced.sending(collector.address):
        traced.spans(10)
        await until(lambda: traced.exporter.counts == ExportCounts(7, 3, 0, 0))
        assert f"control plane {collector.address} says of spans: too many" in caplog.text


async def test_a_span_that_cannot_be_encoded_loses_its_batch_alone(
    collector: Collector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = Traced()
    async with traced.sending(collector.address):
        with monkeypatch.context() as broken:
            broken.setattr(trace_sender, "encode_request", lambda _: 1 / 0)
            traced.spans(2)
            await until(lambda: traced.exporter.counts == ExportCounts(0, 0, 2, 0))
        assert "2 spans are lost" in caplog.text
        traced.spans(1)
        await collector.until(lambda: collector.spans == 1)


# -- flush


async def test_a_flush_waits_for_what_is_queued_from_other_threads_alone(collector: Collector) -> None:
    traced = Traced(delay=60.0)
    assert traced.provider.force_flush()
    traced.spans(3)
    assert not traced.exporter.force_flush(100)  # nobody sends
    async with traced.sending(collector.address) as sender:
        assert not traced.exporter.force_flush(5_000)  # here it would wait for itself
        assert await asyncio.to_thread(traced.provider.force_flush)
        assert collector.spans == 3
        traced.spans(3)
        assert await sender.flush(TIMEOUT)
        assert collector.spans == 6
        collector.hangs = True
        traced.spans(3)
        begun = time.monotonic()
        assert not await sender.flush(0.05)
        assert not await asyncio.to_thread(traced.exporter.force_flush, 50)
        assert time.monotonic() - begun < 5.0


async def test_a_flush_after_the_loop_has_ended_says_that_it_did_not() -> None:
    traced = Traced()
    senders: list[TraceSender] = []

    async def client() -> None:
        senders.append(traced.exporter.attach(PlaintextTransport(), ["127.0.0.1:1"], Random(1)))

    def run() -> None:
        asyncio.run(client())

    await asyncio.to_thread(run)
    traced.spans(2)
    assert not traced.exporter.force_flush(100)
    traced.exporter.shutdown()
    assert traced.exporter.counts.dropped == 2
    gc.collect()


# -- with identities


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as world:
        yield world


async def test_spans_wait_for_an_identity_and_follow_its_rotation(world: World) -> None:
    from mesh_client.identity.settings import identity_settings
    from mesh_client.identity.workload import WorkloadIdentity
    from mesh_client.transport import MutualTls

    assert world.plane.authority is not None
    token = (await world.plane.authority.create_token("orders", 600.0, 1, "test")).text
    settings = identity_settings(
        "orders", [world.plane.address], enrolment=world.plane.enrolment_address, token=token, insecure=False
    )
    assert settings is not None
    transport = MutualTls(WorkloadIdentity(settings))
    traced = Traced()
    sender = traced.exporter.attach(transport, [world.plane.address], Random(1))
    traced.spans(1)
    assert not await sender.flush(0.05)
    await transport.start()
    try:
        store = world.plane.traces.store
        assert store is not None
        await until(lambda: store.spans == 1)
        generation = transport.generation
        await world.plane.authority.add_root()
        await world.plane.authority.overlap(force=True)
        await until(lambda: transport.generation > generation)
        traced.spans(1)
        await until(lambda: store.spans == 2)
        assert {trace.entry.service for trace in store.latest(9, 0.0)} == {"orders"}
    finally:
        await sender.stop()
        await transport.stop()


# -- setting up


def test_nothing_is_set_up_that_was_not_asked_for() -> None:
    assert configure_tracing("orders", environ={}, install=False) is None


@pytest.fixture
def set_up() -> Iterator[Callable[..., TracerProvider]]:
    made: list[TracerProvider] = []

    def set_up(environ: dict[str, str], **options: Any) -> TracerProvider:
        provider = configure_tracing("orders", "orders-1", environ=environ, install=False, **options)
        assert provider is not None
        made.append(provider)
        return provider

    yield set_up
    for provider in made:
        provider.shutdown()


def test_spans_go_to_the_control_plane_under_the_service_s_name(set_up: Callable[..., TracerProvider]) -> None:
    provider = set_up({"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_BSP_MAX_QUEUE_SIZE": "10"}, asked=True)
    exporter = EXPORTERS[provider]
    assert (exporter.delay, exporter.batch) == (0.05, 10)
    assert provider.resource.attributes["service.name"] == "orders"
    assert provider.resource.attributes["service.instance.id"] == "orders-1"


def test_the_environment_names_the_service_first(
    set_up: Callable[..., TracerProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"OTEL_SERVICE_NAME": "shop", "OTEL_RESOURCE_ATTRIBUTES": "service.instance.id=mine"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)  # the SDK itself reads the process's
    attributes = set_up(environ, asked=True).resource.attributes
    assert (attributes["service.name"], attributes["service.instance.id"]) == ("shop", "mine")


def test_a_collector_that_is_not_there_holds_nobody_up(
    set_up: Callable[..., TracerProvider], monkeypatch: pytest.MonkeyPatch, nobody: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{nobody}")
    for protocol in ("grpc", "http/protobuf"):
        provider = set_up({"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{nobody}", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})
        assert provider not in EXPORTERS
        provider.get_tracer("test").start_span("span").end()
        begun = time.monotonic()
        provider.shutdown()
        assert time.monotonic() - begun < 5.0  # the SDK's own takes 10 s and more


def test_spans_can_be_written_to_the_console(
    set_up: Callable[..., TracerProvider], capsys: pytest.CaptureFixture[str]
) -> None:
    provider = set_up({"OTEL_TRACES_EXPORTER": "console"})
    provider.get_tracer("test").start_span("a span on the console").end()
    provider.shutdown()
    assert "a span on the console" in capsys.readouterr().out


async def test_the_stock_exporter_sends_to_the_plain_port(
    set_up: Callable[..., TracerProvider], monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, traces=TraceSettings(otlp_address="127.0.0.1:0")))
    await plane.start()
    try:
        endpoint = f"http://127.0.0.1:{plane.traces.port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        provider = set_up({"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        for number in range(700):
            provider.get_tracer("test").start_span(f"span {number}").end()
        await asyncio.to_thread(provider.shutdown)
        assert plane.traces.store is not None
        assert plane.traces.store.spans == 700
        (trace,) = plane.traces.store.latest(1, 0.0)
        assert (trace.entry.service, trace.entry.process.instance) == ("orders", "orders-1")
    finally:
        await plane.stop(0.0)


def test_a_bounded_processor_ends_although_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = MeshSpanExporter()
    processor = BoundedBatchProcessor(exporter)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as late:
        late.setattr(threading.Thread, "start", refuse)
        processor.shutdown()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("test").start_span("span").end()
    assert exporter.counts.dropped == 1


def test_what_is_asked_for_wrongly_is_refused() -> None:
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER"):
        configure_tracing(environ={"OTEL_TRACES_EXPORTER": "zipkin"}, install=False)
