"""Processes that trace because their environment says so: what they send, and how quickly they end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from rich.console import Console

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.traces.convert import trace_to_proto
from control_plane.traces.links import TraceLinks
from control_plane.traces.span import Kind
from control_plane.traces.store import TraceStore
from control_plane.traces.waterfall import waterfall
from mesh_cli.waterfall import render_waterfall
from mesh_client import trace_sender
from mesh_client.core.model import ResourceKind
from mesh_client.tracing_setup import configure_tracing

ROOT = Path(__file__).parents[2]
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}

CLIENT = """
import asyncio, sys, time
import mesh_client
from opentelemetry import trace

async def main():
    async with mesh_client.connect(service="orders", cache_dir=""):
        tracer = trace.get_tracer("application")
        for number in range(100):
            with tracer.start_as_current_span(f"job {number}"):
                pass
        if sys.argv[1] == "sent":
            from mesh_client.trace_exporters import EXPORTERS
            while EXPORTERS[trace.get_tracer_provider()].counts.queued:
                await asyncio.sleep(0.01)
        else:
            await asyncio.sleep(float(sys.argv[1]))
        print("ending", time.monotonic(), type(trace.get_tracer_provider()).__name__, flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    made = ControlPlane(ControlPlaneOptions(insecure=True))
    await made.start()
    yield made
    await made.stop(0.0)


def store(plane: ControlPlane) -> TraceStore:
    assert plane.traces.store is not None
    return plane.traces.store


async def run(program: str, *arguments: str, **environ: str) -> tuple[str, str, float]:
    """What a process wrote on both streams, and seconds from when it said that it ends to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**PLAIN, **environ},
        cwd=ROOT,
    )
    out, errors = await asyncio.wait_for(process.communicate(), 50)
    ended = time.monotonic()
    assert process.returncode == 0, errors.decode()
    said = out.decode().split()
    took = ended - float(said[1]) if said[:1] == ["ending"] else 0.0
    return out.decode(), errors.decode(), took


CONNECTED = """
import asyncio, time
import mesh_client
from mesh_client import trace_sender
from mesh_client.trace_exporters import EXPORTERS
from opentelemetry import trace

trace_sender.FLUSH_TIMEOUT = 20.0  # a busy machine may not take them in half a second

async def main():
    async with mesh_client.connect(service="orders", cache_dir=""):
        tracer = trace.get_tracer("application")
        tracer.start_span("first").end()
        exporter = EXPORTERS[trace.get_tracer_provider()]
        while not exporter.counts.sent:
            await asyncio.sleep(0.01)
        for number in range(100):
            tracer.start_span(f"last {number}").end()
        print("ending", time.monotonic(), flush=True)

asyncio.run(main())
"""


async def test_a_process_traces_when_it_is_told_to_and_sends_what_it_has_at_its_end(plane: ControlPlane) -> None:
    _, _, took = await run(CONNECTED, MESH_TRACING="1", MESH_CONTROL_PLANE=plane.address)
    assert store(plane).spans == 101
    (trace,) = store(plane).latest(1, 0.0)
    assert (trace.entry.service, trace.entry.name) == ("orders", "last 99")
    assert trace.entry.process.instance.startswith("orders-")
    assert took < 15.0  # a bound on a busy machine


async def test_a_process_that_was_not_told_to_does_not_trace(plane: ControlPlane) -> None:
    out, _, _ = await run(CLIENT, "0", MESH_CONTROL_PLANE=plane.address)
    assert out.split()[2] == "ProxyTracerProvider"
    assert store(plane).spans == 0


async def test_a_control_plane_or_collector_that_is_down_holds_no_process_up(nobody: str) -> None:
    _, _, untraced = await run(CLIENT, "0.3", MESH_CONTROL_PLANE=nobody)
    for collector in ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{nobody}"}):
        _, _, took = await run(CLIENT, "0.3", MESH_TRACING="1", MESH_CONTROL_PLANE=nobody, **collector)
        assert took - untraced < 5.0  # without a bound it would be 10 and more


async def test_a_process_with_a_provider_of_its_own_keeps_it(plane: ControlPlane) -> None:
    program = "from opentelemetry import trace\nfrom opentelemetry.sdk.trace import TracerProvider\n"
    program += "class Own(TracerProvider): pass\ntrace.set_tracer_provider(Own())\n" + CLIENT
    out, _, _ = await run(program, "0", MESH_TRACING="1", MESH_CONTROL_PLANE=plane.address)
    assert out.split()[2] == "Own"
    assert store(plane).spans == 0


SELF_MADE = f"""
from mesh_client.tracing_setup import configure_tracing
configure_tracing("orders", asked=True)
{CLIENT}
try:
    configure_tracing(asked=True)
except mesh_client.errors.ConfigError as error:
    print(error)
"""


async def test_a_process_may_set_tracing_up_itself(plane: ControlPlane) -> None:
    out, _, _ = await run(SELF_MADE, "sent", MESH_TRACING="1", MESH_CONTROL_PLANE=plane.address)
    assert out.split()[2] == "TracerProvider"
    assert "this process has a tracer provider already" in out
    assert store(plane).spans == 100


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
import asyncio, mesh_client, mesh_client.errors
async def main():
    try:
        async with mesh_client.connect(service="orders", cache_dir=""):
            print("entered")
    except mesh_client.errors.ConfigError as error:
        print(error)
asyncio.run(main())
"""


async def test_what_is_missing_is_named_with_what_to_install(nobody: str) -> None:
    explanation = "tracing is asked for, and opentelemetry.sdk is not installed; install 'grpc-mesh[tracing]'"
    for module in ("opentelemetry", "opentelemetry.sdk"):
        out, _, _ = await run(WITHOUT, module, MESH_TRACING="1", MESH_CONTROL_PLANE=nobody)
        assert out == f"MESH_TRACING: {explanation}\n"
    # Variables that may be meant for other programs stop nobody.
    out, errors, _ = await run(WITHOUT, "opentelemetry.sdk", OTEL_TRACES_EXPORTER="otlp", MESH_CONTROL_PLANE=nobody)
    assert out == "entered\n"
    assert f"{explanation}, or set MESH_TRACING=0" in errors


FORKING = """
import asyncio, os, sys
from opentelemetry import trace
from mesh_client.trace_exporters import EXPORTERS
from mesh_client.tracing_setup import configure_tracing
import mesh_client

configure_tracing("orders", asked=True)
tracer = trace.get_tracer("application")
tracer.start_span("before the fork").end()

async def main(name):
    async with mesh_client.connect(service="orders", cache_dir=""):
        tracer.start_span(name).end()
        while EXPORTERS[trace.get_tracer_provider()].counts.queued:
            await asyncio.sleep(0.01)

child = os.fork()
asyncio.run(main("in the parent" if child else "in the child"))
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(status)
"""


async def test_a_fork_sends_each_span_once(plane: ControlPlane) -> None:
    await run(FORKING, MESH_CONTROL_PLANE=plane.address)
    names = sorted(trace.entry.name for trace in store(plane).latest(9, 0.0))
    assert names == ["before the fork", "in the child", "in the parent"]


# -- calls


class Flaky(grpc.GenericRpcHandler):
    """Refuses its first call, and calls another service on the way if there is one."""

    def __init__(self, mesh: mesh_client.Mesh | None = None) -> None:
        self._mesh = mesh
        self._calls = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self._calls += 1
            if self._mesh is not None:
                call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._mesh.channel("payments").unary_unary(
                    "/shop.v1.PaymentService/Charge"
                )
                return await call(request)
            if self._calls == 1:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
            return request

        return grpc.unary_unary_rpc_method_handler(answer)


async def published(plane: ControlPlane, *services: str) -> None:
    async with asyncio.timeout(10):
        while not all(plane._publisher.snapshot.get(ResourceKind.ENDPOINTS, service) for service in services):
            await asyncio.sleep(0.01)


def provider_of(service: str) -> TracerProvider:
    environ = {"OTEL_BSP_SCHEDULE_DELAY": "10"}
    made = configure_tracing(service, f"{service}-1", asked=True, environ=environ, install=False)
    assert made is not None
    return made


async def test_a_call_over_two_services_with_a_retry_is_one_tree(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_sender, "FLUSH_TIMEOUT", 20.0)
    gateway, orders, payments = map(provider_of, ("gateway", "orders", "payments"))
    address = plane.address
    async with AsyncExitStack() as stack:

        async def serve(server: mesh_client.MeshServer, handler: Flaky) -> None:
            server.add_generic_rpc_handlers((handler,))
            await server.start()
            stack.push_async_callback(server.stop, 0.0)

        async def client(service: str, provider: TracerProvider) -> mesh_client.Mesh:
            return await stack.enter_async_context(
                mesh_client.connect(address, service=service, cache_dir="", insecure=True, tracer_provider=provider)
            )

        mesh = await client("orders", orders)
        await serve(
            mesh_client.server("payments", control_plane=address, insecure=True, tracer_provider=payments), Flaky()
        )
        await serve(mesh_client.server("orders", control_plane=address, mesh=mesh), Flaky(mesh))
        await published(plane, "orders", "payments")
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = (
            (await client("gateway", gateway)).channel("orders").unary_unary("/shop.v1.OrderService/PlaceOrder")
        )
        assert await call(b"request", timeout=10) == b"request"
    for provider in (gateway, orders, payments):
        provider.shutdown()
    (trace,) = store(plane).latest(9, 0.0)
    drawn = waterfall(trace.spans)
    assert [(row.depth, row.span.service, row.span.kind, row.span.failed) for row in drawn.rows] == [
        (0, "gateway", Kind.INTERNAL, False),
        (1, "gateway", Kind.CLIENT, False),
        (2, "orders", Kind.SERVER, False),
        (3, "orders", Kind.INTERNAL, False),
        (4, "orders", Kind.CLIENT, True),
        (5, "payments", Kind.SERVER, True),
        (4, "orders", Kind.CLIENT, False),
        (5, "payments", Kind.SERVER, False),
    ]
    assert trace.complete
    assert trace.entry.method == "shop.v1.OrderService/PlaceOrder"
    assert {row.correction for row in drawn.rows} == {0}
    console = Console(width=160)
    with console.capture() as shown:
        console.print(render_waterfall(trace_to_proto(trace, TraceLinks()), 160, attributes=True, ascii_only=False))
    assert "! not yet" in shown.get()
