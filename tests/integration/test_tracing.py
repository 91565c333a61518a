"""Spans of calls, as a real OTLP receiver gets them: every kind of RPC, every end, and one tree whatever happens."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.grpc import GrpcAioInstrumentorClient, GrpcAioInstrumentorServer
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased

import mesh_client
from mesh_client.mesh_server import MeshServer
from mesh_client.tracing import USER_AGENT_MARK, SampledCall, Tracing, current_trace_id
from tests.integration.mesh_rig import Rig, open_rig
from tests.integration.otlp import Receiver, open_receiver

SERVICE = "echo.v1.Echo"
ONCE: dict[str, Any] = {"retry": {"max_attempts": 1}}


class Echo(grpc.GenericRpcHandler):
    """Methods of the four kinds, which do what requests say; unary ones in threads too."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self.current: list[trace.SpanContext] = []
        self.asleep = asyncio.Event()
        self.onwards: Callable[[], Awaitable[object]] | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        make: dict[str, Any] = {
            "UnaryUnary": lambda: grpc.unary_unary_rpc_method_handler(self._unary),
            "UnaryStream": lambda: grpc.unary_stream_rpc_method_handler(self._stream),
            "StreamUnary": lambda: grpc.stream_unary_rpc_method_handler(self._collect),
            "StreamStream": lambda: grpc.stream_stream_rpc_method_handler(self._each),
            "Plain": lambda: grpc.unary_unary_rpc_method_handler(self._plain),
            "PlainStream": lambda: grpc.unary_stream_rpc_method_handler(self._plain_stream),
        }
        name = handler_call_details.method.rpartition("/")[2]
        return make[name]() if name in make else None

    def _note(self, context: Any) -> None:
        self.metadata.append(dict(context.invocation_metadata()))
        self.current.append(trace.get_current_span().get_span_context())

    async def _act(self, request: bytes, context: Any) -> None:
        if request == b"refuse":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        if request == b"set":
            context.set_code(grpc.StatusCode.DATA_LOSS)
            context.set_details("half of it")
        if request == b"break":
            raise ValueError("broken")
        if request == b"sleep":
            self.asleep.set()
            await asyncio.Event().wait()
        if request == b"onwards" and self.onwards is not None:
            await self.onwards()

    async def _unary(self, request: bytes, context: Any) -> bytes:
        self._note(context)
        await self._act(request, context)
        return request

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self._note(context)
        yield request
        await self._act(request, context)

    async def _collect(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        self._note(context)
        received = [request async for request in requests]
        await self._act(received[0], context)
        return b",".join(received)

    async def _each(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self._note(context)
        async for request in requests:
            yield request
            await self._act(request, context)

    def _plain(self, request: bytes, context: Any) -> bytes:
        self._note(context)
        if request == b"refuse":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        if request == b"break":
            raise ValueError("broken")
        return request

    def _plain_stream(self, request: bytes, context: Any) -> Any:
        self._note(context)
        for _ in range(2):
            yield request


async def call(channel: Any, method: str, request: bytes = b"hello", **options: Any) -> list[bytes]:
    """One call of any of the methods; its responses."""
    path = f"/{SERVICE}/{method}"
    if method in {"UnaryUnary", "Plain"}:
        return [await channel.unary_unary(path)(request, **options)]
    if method in {"UnaryStream", "PlainStream"}:
        return [response async for response in channel.unary_stream(path)(request, **options)]
    if method == "StreamUnary":
        return [await channel.stream_unary(path)(iter([request]), **options)]
    return [response async for response in channel.stream_stream(path)(iter([request]), **options)]


class World:
    """A mesh with one service whose client and server trace, and what the receiver got of it."""

    def __init__(self, rig: Rig, receiver: Receiver) -> None:
        self.rig = rig
        self.receiver = receiver
        self.echo = Echo()

    async def serve(self, service: str, provider: TracerProvider | None, echo: Echo | None = None) -> MeshServer:
        """A server, registered."""
        server = mesh_client.server(
            service,
            control_plane=self.rig.plane.address,
            instance_id=f"{service}-1",
            tracer_provider=provider,
            migration_thread_pool=self.rig.stack.enter_context(concurrent.futures.ThreadPoolExecutor(2)),
            drain_timeout=0.0,
        )
        server.add_generic_rpc_handlers((echo or self.echo,))
        await server.start()
        self.rig.stack.push_async_callback(server.stop, 0)
        await server.registered()
        return server

    async def channel(self, sampler: Sampler = ALWAYS_ON, server: TracerProvider | None = None) -> grpc.aio.Channel:
        """A channel of a client that samples so, to a server that traces."""
        await self.serve("orders", server or self.receiver.provider("orders"))
        return await self.to("orders", sampler)

    async def to(self, service: str, sampler: Sampler = ALWAYS_ON) -> grpc.aio.Channel:
        mesh = await self.rig.mesh(service="web", tracer_provider=self.receiver.provider("web", sampler))
        return await self.rig.channel(mesh, service, [f"{service}-1"])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(open_receiver())
        rig = await stack.enter_async_context(open_rig(tmp_path))
        yield World(rig, receiver)


@pytest.mark.parametrize("method", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "Plain", "PlainStream"])
async def test_a_call_its_attempt_and_its_handling_are_one_tree(world: World, method: str) -> None:
    channel = await world.channel()
    await call(channel, method)
    await world.receiver.is_tree("call OK", "  attempt OK", "    server OK")
    made, attempt, served = await world.receiver.received(3)
    assert (made.name, served.name) == (f"{SERVICE}/{method}",) * 2
    assert made.attributes.items() >= {"rpc.system.name": "grpc", "rpc.method": f"{SERVICE}/{method}"}.items()
    assert attempt.attributes.items() >= {"server.address": "127.0.0.1", "mesh.endpoint": "orders-1"}.items()
    assert served.attributes.items() >= {"network.peer.address": "127.0.0.1", "mesh.service": "orders"}.items()
    (current,) = world.echo.current
    assert current.span_id.to_bytes(8, "big") == served.proto.span_id


@pytest.mark.parametrize("method", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "Plain"])
async def test_what_a_handler_refuses_is_an_error_of_the_caller_alone(world: World, method: str) -> None:
    channel = await world.channel()
    with pytest.raises(grpc.aio.AioRpcError):
        await call(channel, method, b"refuse")
    await world.receiver.is_tree("call NOT_FOUND error", "  attempt NOT_FOUND error", "    server NOT_FOUND")
    made, _, _ = await world.receiver.received()
    assert made.proto.status.message == "no such thing"


@pytest.mark.parametrize("method", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "Plain"])
async def test_an_exception_of_a_handler_is_an_error_of_both_and_recorded(world: World, method: str) -> None:
    channel = await world.channel()
    with pytest.raises(grpc.aio.AioRpcError):
        await call(channel, method, b"break")
    await world.receiver.is_tree("call UNKNOWN error", "  attempt UNKNOWN error", "    server UNKNOWN error")
    *_, served = await world.receiver.received(3)
    ((name, attributes),) = served.events
    assert (name, attributes["exception.type"], attributes["exception.message"]) == (
        "exception",
        "ValueError",
        "broken",
    )


async def test_a_status_that_a_handler_sets_without_raising_counts(world: World) -> None:
    channel = await world.channel()
    with pytest.raises(grpc.aio.AioRpcError):
        await call(channel, "UnaryUnary", b"set")
    *_, served = await world.receiver.received(3)
    assert (served.code, served.is_error, served.proto.status.message) == ("DATA_LOSS", True, "half of it")


@pytest.mark.parametrize("method", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"])
async def test_a_call_that_is_given_up_is_cancelled_on_both_sides(world: World, method: str) -> None:
    channel = await world.channel()
    task = asyncio.create_task(call(channel, method, b"sleep"))
    await world.echo.asleep.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await world.receiver.is_tree("call CANCELLED error", "  attempt CANCELLED error", "    server CANCELLED")


@pytest.mark.parametrize("method", ["UnaryUnary", "StreamStream"])
async def test_a_call_whose_deadline_passes_says_so_on_both_sides(world: World, method: str) -> None:
    channel = await world.channel()
    await call(channel, method)
    await world.receiver.received(3)
    for timeout in (0.3, 1.0, 5.0):  # on a busy machine the first may pass before the server has heard of the call
        world.receiver.spans.clear()
        with pytest.raises(grpc.aio.AioRpcError, match="DEADLINE_EXCEEDED"):
            await call(channel, method, b"sleep", timeout=timeout)
        if world.echo.asleep.is_set():
            break
        await world.receiver.received(2)
    late = [span for span in await world.receiver.received(3) if span.code != "OK"]
    assert [(span.kind, span.code, span.is_error) for span in late] == [
        ("call", "DEADLINE_EXCEEDED", True),
        ("attempt", "DEADLINE_EXCEEDED", True),
        ("server", "DEADLINE_EXCEEDED", True),
    ]


async def test_retries_are_siblings_in_one_tree_with_what_was_decided_between_them(world: World, nobody: str) -> None:
    provider = world.receiver.provider("orders")
    await world.rig.register("orders", "orders-0", int(nobody.rpartition(":")[2]))
    await world.serve("orders", provider)
    mesh = await world.rig.mesh(service="web", tracer_provider=world.receiver.provider("web"))
    await world.rig.policy(
        mesh,
        {
            "service": "orders",
            "load_balancer": {"algorithm": "ROUND_ROBIN"},
            "outlier_detection": {"consecutive_failures": 1},
        },
    )
    channel = await world.rig.channel(mesh, "orders", ["orders-0", "orders-1"])
    while not any(span.code == "UNAVAILABLE" for span in await world.receiver.received()):
        world.receiver.spans.clear()
        await call(channel, "UnaryUnary")
    await world.receiver.is_tree(
        "call OK",
        "  attempt UNAVAILABLE error",
        "  attempt OK",
        "    server OK",
    )
    made, first, second, _ = await world.receiver.received()
    assert [name for name, _ in made.events] == ["mesh.endpoint.ejected", "mesh.retry"]
    assert made.events[0][1] == {"endpoint": "orders-0"}
    assert (first.attributes["mesh.attempt"], second.attributes["mesh.attempt"]) == (1, 2)


async def test_a_breaker_that_opens_and_refuses_is_in_the_spans(world: World, nobody: str) -> None:
    await world.rig.register("orders", "orders-1", int(nobody.rpartition(":")[2]))
    mesh = await world.rig.mesh(service="web", tracer_provider=world.receiver.provider("web"))
    await world.rig.policy(mesh, {"service": "orders", **ONCE, "circuit_breaker": {"consecutive_failures": 1}})
    channel = await world.rig.channel(mesh, "orders", ["orders-1"])
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError):
            await call(channel, "UnaryUnary")
    opened, _, refused = await world.receiver.received()
    assert ("mesh.breaker", {"state": "open"}) in opened.events
    assert (refused.kind, refused.code, refused.attributes["mesh.reason"]) == ("call", "UNAVAILABLE", "BREAKER_OPEN")


async def test_what_a_server_refuses_before_the_handler_has_a_span_there(world: World) -> None:
    channel = await world.channel()
    mesh = await world.rig.mesh(service="web")
    await world.rig.policy(
        mesh, {"service": "orders", **ONCE, "rate_limits": [{"method": "*", "requests_per_second": 0.001, "burst": 1}]}
    )
    async with asyncio.timeout(10):
        while not any(span.code == "RESOURCE_EXHAUSTED" for span in await world.receiver.received()):
            world.receiver.spans.clear()
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call(channel, "UnaryUnary")
    spans = await world.receiver.received(3)
    assert spans[-1].kind == "server"
    assert {span.code for span in spans} == {"RESOURCE_EXHAUSTED"}


async def test_calls_of_a_handler_are_below_its_own_span(world: World) -> None:
    provider = world.receiver.provider("payments")
    await world.serve("payments", provider, behind := Echo())
    onwards = await world.rig.mesh(service="orders", tracer_provider=provider)
    payments = await world.rig.channel(onwards, "payments", ["payments-1"])
    world.echo.onwards = lambda: call(payments, "UnaryUnary")
    channel = await world.channel()
    await call(channel, "UnaryUnary", b"onwards")
    await world.receiver.is_tree(
        "call OK",
        "  attempt OK",
        "    server OK",
        "      call OK",
        "        attempt OK",
        "          server OK",
    )
    assert len(behind.metadata) == 1


# -- what is not sampled


async def test_a_call_that_nobody_samples_has_no_header_and_nothing_below_it_begins_a_trace(world: World) -> None:
    provider = world.receiver.provider("payments")
    await world.serve("payments", provider, behind := Echo())
    onwards = await world.rig.mesh(service="orders", tracer_provider=provider)
    payments = await world.rig.channel(onwards, "payments", ["payments-1"])
    world.echo.onwards = lambda: call(payments, "UnaryUnary")
    channel = await world.channel(ParentBased(ALWAYS_OFF))
    await call(channel, "UnaryUnary", b"onwards")
    assert await world.receiver.received() == []
    for metadata in (*world.echo.metadata, *behind.metadata):
        assert "traceparent" not in metadata
        assert USER_AGENT_MARK in metadata["user-agent"]
    # What else the handler does, such as queries, finds a parent whose trace is not sampled.
    assert all(context.is_valid and not context.trace_flags.sampled for context in world.echo.current)


async def test_a_sampler_that_has_to_be_asked_passes_its_decision_on(world: World) -> None:
    await world.serve("orders", world.receiver.provider("orders", ParentBased(ALWAYS_ON)))
    mesh = await world.rig.mesh(service="web", tracer_provider=world.receiver.provider("web", ALWAYS_OFF))
    channel = await world.rig.channel(mesh, "orders", ["orders-1"])
    await call(channel, "UnaryUnary")
    assert await world.receiver.received() == []
    (metadata,) = world.echo.metadata
    assert metadata["traceparent"].endswith(("-00", "-02"))


async def test_what_others_decided_not_to_sample_goes_on_as_it_came(world: World) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    provider = world.receiver.provider("orders", ParentBased(ALWAYS_ON))
    await world.serve("payments", provider, behind := Echo())
    onwards = await world.rig.mesh(service="orders", tracer_provider=provider)
    payments = await world.rig.channel(onwards, "payments", ["payments-1"])
    world.echo.onwards = lambda: call(payments, "UnaryUnary")
    server = await world.serve("orders", provider)
    async with grpc.aio.insecure_channel(server.endpoint.target) as raw:
        await call(raw, "UnaryUnary", b"onwards", metadata=(("traceparent", traceparent), ("tracestate", "a=b")))
    assert await world.receiver.received() == []
    (metadata,) = behind.metadata
    assert (metadata["traceparent"], metadata["tracestate"]) == (traceparent, "a=b")


async def test_a_trace_that_others_began_goes_on(world: World) -> None:
    server = await world.serve("orders", world.receiver.provider("orders", ParentBased(ALWAYS_OFF)))
    sampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with grpc.aio.insecure_channel(server.endpoint.target) as raw:
        await call(raw, "UnaryUnary", metadata=(("traceparent", sampled),))
    (served,) = await world.receiver.received(1)
    assert (served.proto.trace_id.hex(), served.proto.parent_span_id.hex()) == tuple(sampled.split("-")[1:3])


@pytest.mark.parametrize(
    "header", ["", "nonsense", f"00-{'0' * 32}-b7ad6b7169203331-01", "ff-" + "1" * 32 + "-" + "1" * 16 + "-01"]
)
async def test_callers_that_do_not_trace_and_headers_that_are_none_begin_traces_here(world: World, header: str) -> None:
    server = await world.serve("orders", world.receiver.provider("orders", ParentBased(ALWAYS_ON)))
    async with grpc.aio.insecure_channel(server.endpoint.target) as raw:
        await call(raw, "UnaryUnary", metadata=(("traceparent", header),) if header else ())
    (served,) = await world.receiver.received(1)
    assert not served.proto.parent_span_id


async def test_traces_that_begin_at_a_server_are_sampled_by_its_own_share(world: World) -> None:
    server = await world.serve("orders", world.receiver.provider("orders", ParentBased(ALWAYS_OFF)))
    async with grpc.aio.insecure_channel(server.endpoint.target) as raw:
        await call(raw, "UnaryUnary")
    assert await world.receiver.received() == []


# -- how sampling is decided, and by whom


@pytest.mark.parametrize(
    "sampler", [ParentBased(TraceIdRatioBased(0.25)), TraceIdRatioBased(0.25)], ids=["known", "asked"]
)
def test_a_share_of_traces_is_sampled_however_it_is_decided(sampler: Sampler) -> None:
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    tracing = Tracing(provider, "web")
    made = [tracing.call("orders", "/a.B/C") for _ in range(4000)]
    sampled = [each for each in made if isinstance(each, SampledCall)]
    assert 850 < len(sampled) < 1150
    for each in sampled:
        each.ended(grpc.StatusCode.OK, None, None)
    provider.shutdown()


async def test_a_process_without_a_tracer_provider_traces_nothing(world: World) -> None:
    await world.serve("orders", None)
    mesh = await world.rig.mesh(service="web")
    channel = await world.rig.channel(mesh, "orders", ["orders-1"])
    await call(channel, "UnaryUnary")
    (metadata,) = world.echo.metadata
    assert "traceparent" not in metadata
    assert USER_AGENT_MARK not in metadata["user-agent"]


async def test_spans_are_not_doubled_where_the_contrib_instrumentation_is_active(world: World) -> None:
    provider = world.receiver.provider("contrib")
    instrumentors = GrpcAioInstrumentorClient(), GrpcAioInstrumentorServer()
    for instrumentor in instrumentors:
        instrumentor.instrument(tracer_provider=provider)
    try:
        channel = await world.channel()
        await call(channel, "UnaryUnary")
        await world.receiver.is_tree("call OK", "  attempt OK", "    server OK")
    finally:
        for instrumentor in instrumentors:
            instrumentor.uninstrument()


async def test_the_running_trace_can_be_asked_for(world: World) -> None:
    assert current_trace_id() == ""
    provider = world.receiver.provider("web")
    with provider.get_tracer("test").start_as_current_span("work") as span:
        assert current_trace_id() == trace.format_trace_id(span.get_span_context().trace_id)
