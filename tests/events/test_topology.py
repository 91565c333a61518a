"""Who handles whose events, as the control plane and `mesh top` show it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from mesh.v1 import admin_pb2, admin_pb2_grpc, telemetry_pb2, traffic_pb2, traffic_pb2_grpc
from shop.v1.events_pb2 import OrderPlaced
from typer.testing import CliRunner

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.app import app
from mesh_client.core.errors import ConfigError
from mesh_client.events import Event, RetrySchedule
from mesh_client.mesh import Mesh
from mesh_client.transport import open_channel
from tests.events.services import PATIENCE, Services, started, until

EVENTS = 20


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, data_dir=tmp_path / "plane"))
    await plane.start()
    yield plane
    await plane.stop()


async def test_event_edges_are_in_the_topology(services: Services, plane: ControlPlane) -> None:
    async def client(service: str) -> Mesh:
        return await stack.enter_async_context(
            mesh_client.connect(plane.address, service=service, insecure=True, cache_dir="", load_reports=0.1)
        )

    def options(service: str) -> dict[str, Any]:
        return {
            "broker": services.broker.url_of(services.vhost),
            "credentials": services.broker.credentials(service),
            "outbox": services.directory / f"{service}.sqlite",
        }

    def edges() -> list[tuple[str, str, str, str, int]]:
        found = plane.telemetry.traffic.event_edges(asyncio.get_running_loop().time())
        return [(each.publisher, each.service, each.group, each.type, each.handled.count) for each in found]

    async with AsyncExitStack() as stack:
        consumer = await client("shipping")
        bus = consumer.events(**options("shipping"))
        bus.group("labels", retries=RetrySchedule((0.05,)), ordered=False)

        @bus.subscribe(OrderPlaced, group="labels")
        async def handle(event: Event[OrderPlaced]) -> None:
            await asyncio.sleep(0.02)
            if event.attempt == 1 and event.message.quantity < 2:
                raise ValueError("not now")

        await started(bus)
        orders = (await client("orders")).events(**options("orders"))
        for number in range(EVENTS):
            await orders.publish(OrderPlaced(quantity=number), key=str(number))
        expected = ("orders", "shipping", "labels", "shop.v1.OrderPlaced", EVENTS + 2)
        await until(lambda: edges() == [expected], "the event edge")
        async with open_channel(plane.address) as channel:
            stub = traffic_pb2_grpc.TrafficServiceStub(channel)
            answer = await stub.GetTraffic(traffic_pb2.GetTrafficRequest(service="orders"))
        (edge,) = answer.events
        assert (edge.publisher, edge.service, edge.handled.count) == ("orders", "shipping", EVENTS + 2)
        assert edge.handled.codes == {0: EVENTS, 2: 2}
        assert edge.handled.success_rate == pytest.approx(EVENTS / (EVENTS + 2))
        assert edge.handled.rate > 0
        assert 0.02 <= edge.handled.p50.ToTimedelta().total_seconds() < 5
        assert list(answer.edges) == []
        command = ["top", "--once", "--control-plane", plane.address, "--insecure"]
        shown = await asyncio.to_thread(CliRunner().invoke, app, command, env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        assert "shipping (labels)" in shown.stdout
        as_json = await asyncio.to_thread(CliRunner().invoke, app, [*command, "--json"])
        assert json.loads(as_json.stdout)["events"][0]["type"] == "shop.v1.OrderPlaced"
    # What the group has handled stays known for as long as calls do.
    assert edges() == [expected]


async def test_an_outbox_without_a_broker_is_in_the_status(services: Services, plane: ControlPlane) -> None:
    async with mesh_client.connect(
        plane.address, service="orders", node_id="orders-1", insecure=True, cache_dir="", load_reports=0.1
    ) as mesh:
        orders = mesh.events(broker="", outbox=services.directory / "orders.sqlite", max_events=10)
        assert mesh.events() is orders
        with pytest.raises(ConfigError, match="has an event bus already"):
            mesh.events(max_events=20)
        for _ in range(3):
            await orders.publish(OrderPlaced())
        async with open_channel(plane.address) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)

            async def outboxes() -> list[admin_pb2.OutboxStatus]:
                return list((await stub.GetStatus(admin_pb2.GetStatusRequest())).outboxes)

            async with asyncio.timeout(PATIENCE):
                while [each.outbox.events for each in await outboxes()] != [3]:
                    await asyncio.sleep(0.02)
            [found] = await outboxes()
        assert (found.service, found.node_id, found.outbox.max_events) == ("orders", "orders-1", 10)
        assert found.outbox.relay == telemetry_pb2.OUTBOX_RELAY_NO_BROKER
        assert found.HasField("oldest")
        command = ["status", "--control-plane", plane.address, "--insecure"]
        shown = await asyncio.to_thread(CliRunner().invoke, app, command, env={"COLUMNS": "200"})
        assert "no broker is configured (MESH_BROKER): events stay in the outbox" in shown.stdout
