"""Calls of who sends no load reports, such as a proxy at the edge: operators see them as servers received them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
from mesh.v1 import traffic_pb2, traffic_pb2_grpc

from mesh_client.core.policy import ServicePolicy
from tests.security.world import TIMEOUT, Log, open_world, refused, until

FAST = 0.1
CALLS = 12
METHOD = "/test.Echo/Unary"
ONLY_EDGE = {"service": "orders", "authorization": [{"callers": ["edge", "web"], "methods": [METHOD]}]}


async def test_an_operator_sees_calls_of_an_edge_once_and_those_of_a_mesh_client_as_it_tells_them(
    tmp_path: Path,
) -> None:
    async with (
        open_world(tmp_path, Log()) as world,
        world.client("orders", load_reports=FAST) as orders,
        world.serving("orders", mesh=orders, instance_id="orders-1", policy=ServicePolicy.parse(ONLY_EDGE)) as server,
        world.client("web", load_reports=FAST) as web,
        world.to(server, await world.join("edge")) as edge,
        world.mesh(world.mint.operator()) as operator,
    ):
        for _ in range(CALLS):
            await edge.echo(method=METHOD)
        for _ in range(2):
            await refused(edge.echo(method="/test.Echo/Forbidden"))
        unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = web.channel("orders").unary_unary(METHOD)
        for _ in range(3):
            await unary(b"hello", timeout=TIMEOUT, wait_for_ready=True)
        traffic, loop = world.plane.telemetry.traffic, asyncio.get_running_loop()
        await until(lambda: traffic.calls_to("orders", loop.time()).count >= CALLS + 5)
        await until(lambda: any(not each.received for each in traffic.edges(loop.time())))

        stub = traffic_pb2_grpc.TrafficServiceStub(operator.channel)
        answer = await stub.GetTraffic(traffic_pb2.GetTrafficRequest(service="orders"), timeout=TIMEOUT)
        edges = {each.caller: (each.received, each.calls.count, dict(each.calls.codes)) for each in answer.edges}
        assert edges == {"edge": (True, CALLS + 2, {0: CALLS, 7: 2}), "web": (False, 3, {0: 3})}
        assert {each.method: each.calls.count for each in answer.methods}[METHOD] == CALLS + 3
        (endpoint,) = answer.endpoints
        assert (endpoint.endpoint_id, endpoint.attempts.count) == ("orders-1", CALLS + 5)

        explained = await stub.Explain(traffic_pb2.ExplainRequest(service="orders"), timeout=TIMEOUT)
        (words,) = [each.message for each in explained.findings if each.subject == "calls"]
        assert f"of {CALLS + 5} calls within the last minute were answered well" in words
        assert f"counted as received those of edge ({CALLS + 2})" in words
        (failed,) = explained.failures
        assert (failed.caller, failed.code, failed.count, failed.received) == ("edge", 7, 2, True)
        assert failed.explanation == "instances refused the caller"
