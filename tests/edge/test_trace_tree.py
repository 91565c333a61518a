"""One request by REST is one trace: through a real Envoy, two services and a retry."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import grpc
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.traces.settings import TraceSettings
from control_plane.traces.span import Kind
from control_plane.traces.waterfall import waterfall
from mesh_client import trace_sender
from mesh_client.transport import open_channel
from tests.control_plane.otlp import export
from tests.edge.contract_rig import running_envoy
from tests.edge.http_client import ask
from tests.edge.test_envoy_running import TRACE, collector
from tests.integration.test_trace_process import Flaky, provider_of, published, store

CALLER = "00f067aa0ba902b7"


async def test_a_trace_crosses_the_edge_two_services_and_a_retry_and_is_one_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trace_sender, "FLUSH_TIMEOUT", 20.0)
    plane = ControlPlane(ControlPlaneOptions(insecure=True, traces=TraceSettings(otlp_address="127.0.0.1:0")))
    await plane.start()
    contract, payments = map(provider_of, ("contract", "payments"))
    try:
        async with AsyncExitStack() as stack:

            async def serve(server: mesh_client.MeshServer, handler: grpc.GenericRpcHandler) -> mesh_client.MeshServer:
                server.add_generic_rpc_handlers((handler,))
                await server.start()
                stack.push_async_callback(server.stop, 0.0)
                return server

            mesh = await stack.enter_async_context(
                mesh_client.connect(
                    plane.address, service="contract", cache_dir="", insecure=True, tracer_provider=contract
                )
            )
            await serve(
                mesh_client.server("payments", control_plane=plane.address, insecure=True, tracer_provider=payments),
                Flaky(),
            )
            server = await serve(mesh_client.server("contract", control_plane=plane.address, mesh=mesh), Flaky(mesh))
            await published(plane, "contract", "payments")
            endpoint, received = stack.enter_context(collector())
            rig = stack.enter_context(running_envoy(server.port, tracing={"endpoint": endpoint}))
            sent = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            answer = await asyncio.to_thread(ask, rig.address, "GET", "/v1/metadata", sent)
            assert answer.status == 200
            async with asyncio.timeout(30):
                while sum(body.count(bytes.fromhex(TRACE)) for body in received) < 2:
                    await asyncio.sleep(0.02)
        async with open_channel(f"127.0.0.1:{plane.traces.port}") as channel:
            for body in received:
                await export(channel, ExportTraceServiceRequest.FromString(body))
        for provider in (contract, payments):
            provider.shutdown()
        (trace,) = store(plane).latest(9, 0.0)
        rows = waterfall(trace.spans).rows
        assert [(row.depth, row.span.service, row.span.kind, row.span.failed) for row in rows] == [
            (0, "edge", Kind.SERVER, False),
            (1, "edge", Kind.CLIENT, False),
            (2, "contract", Kind.SERVER, False),
            (3, "contract", Kind.INTERNAL, False),
            (4, "contract", Kind.CLIENT, True),
            (5, "payments", Kind.SERVER, True),
            (4, "contract", Kind.CLIENT, False),
            (5, "payments", Kind.SERVER, False),
        ]
        assert rows[0].span.parent_id == CALLER
    finally:
        await plane.stop(0.0)
