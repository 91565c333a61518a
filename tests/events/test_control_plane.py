"""What happens in the mesh arrives at whoever is subscribed, and a broker that is not there holds nothing up."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from mesh.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    discovery_pb2,
    endpoint_pb2,
    event_pb2,
    registry_pb2,
    registry_pb2_grpc,
    resource_pb2,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from typer.testing import CliRunner

from control_plane import event_publisher
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.app import app
from mesh_client.core.errors import ConfigError
from mesh_client.core.events.state import RelayState
from mesh_client.core.events.topology import CONTROL_PLANE
from mesh_client.events import Event
from mesh_client.transport import open_channel
from tests.control_plane.worlds import POLICY, Client
from tests.events.services import Seen, Services, until

TYPES = (
    event_pb2.EndpointUp,
    event_pb2.EndpointDown,
    event_pb2.EndpointEjected,
    event_pb2.PolicyApplied,
    event_pb2.PolicyRejected,
    event_pb2.CertificateIssued,
    event_pb2.RootRotated,
)


def options(directory: Path, broker: str, credentials: Path, **others: Any) -> ControlPlaneOptions:
    given: dict[str, Any] = {"insecure": True, "debounce_quiet": 0.002, "debounce_maximum": 0.02, **others}
    return ControlPlaneOptions(data_dir=directory, broker=broker, broker_credentials=credentials, **given)


@asynccontextmanager
async def running(options: ControlPlaneOptions) -> AsyncIterator[ControlPlane]:
    plane = ControlPlane(options)
    await plane.start()
    try:
        publisher = plane.event_publisher
        if publisher is not None:
            await until(lambda: publisher.begun)
        yield plane
    finally:
        await plane.stop()


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """At what many clients have ejected."""
    monkeypatch.setattr(event_publisher, "EJECTIONS_EVERY", 0.02)


@pytest.fixture
async def plane(services: Services, tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """In the virtual host of the test."""
    url = services.broker.url_of(services.vhost)
    async with running(options(tmp_path / "plane", url, services.broker.credentials(CONTROL_PLANE))) as plane:
        yield plane


@asynccontextmanager
async def registered(channel: grpc.aio.Channel, endpoint_id: str, port: int = 5000) -> AsyncIterator[None]:
    lease = registry_pb2_grpc.RegistryServiceStub(channel).Register()
    endpoint = endpoint_pb2.Endpoint(
        id=endpoint_id, address="127.0.0.1", port=port, locality=endpoint_pb2.Locality(zone="east")
    )
    await lease.write(registry_pb2.RegisterRequest(service="orders", endpoint=endpoint))
    assert await lease.read() is not grpc.aio.EOF
    yield
    await lease.done_writing()
    while await lease.read() is not grpc.aio.EOF:
        pass


def told(seen: Seen, of: type[Message]) -> list[Any]:
    return [event.message for event in seen.events if isinstance(event.message, of)]


async def test_endpoints_and_policies_are_told(services: Services, plane: ControlPlane) -> None:
    _, seen = await services.subscribed("notifications", *TYPES)
    async with open_channel(plane.address) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        async with registered(channel, "o1"):
            await seen.count(1)
            (up,) = told(seen, event_pb2.EndpointUp)
            assert up == event_pb2.EndpointUp(service="orders", endpoint_id="o1", target="127.0.0.1:5000", zone="east")
            event: Event[Any] = seen.events[0]
            assert (event.source, event.key, event.type) == (CONTROL_PLANE, "orders", "mesh.v1.EndpointUp")
            document = yaml.safe_dump({"service": "orders", "retry": {"max_attempts": 2}})
            answer = await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=document))
            assert answer.changed
            await until(lambda: told(seen, event_pb2.PolicyApplied))
            (applied,) = told(seen, event_pb2.PolicyApplied)
            async with Client(plane.address, "stubborn") as client:
                await client.subscribe("orders", types=(POLICY,))
                response = await client.read()
                await client.send(
                    discovery_pb2.DeltaResourcesRequest(
                        type=resource_pb2.RESOURCE_TYPE_SERVICE_POLICY,
                        response_nonce=response.nonce,
                        error=discovery_pb2.Rejection(message="not to my liking"),
                    )
                )
                await until(lambda: told(seen, event_pb2.PolicyRejected))
            assert told(seen, event_pb2.PolicyRejected) == [
                event_pb2.PolicyRejected(
                    service="orders", version=applied.version, node_id="stubborn", reason="not to my liking"
                )
            ]
        await until(lambda: told(seen, event_pb2.EndpointDown))
    assert told(seen, event_pb2.EndpointDown) == [
        event_pb2.EndpointDown(service="orders", endpoint_id="o1", target="127.0.0.1:5000", listed=False)
    ]
    assert len(seen.events) == 4


async def test_an_endpoint_that_many_have_ejected_is_told(services: Services, plane: ControlPlane) -> None:
    _, seen = await services.subscribed("notifications", *TYPES)
    stub_of = telemetry_pb2_grpc.TelemetryServiceStub
    async with open_channel(plane.address) as channel:
        for number in range(2):
            stream = stub_of(channel).Report()
            state = telemetry_pb2.CalledServiceState(ejected=["o1"], endpoints=2)
            await stream.write(
                telemetry_pb2.ReportRequest(
                    node=discovery_pb2.Node(id=f"web-{number}", service="web"),
                    epoch=f"e{number}",
                    uptime=Duration(seconds=1),
                    covers=Duration(seconds=1),
                    called=[telemetry_pb2.CalledService(service="orders", state=state)],
                )
            )
            assert isinstance(await stream.read(), telemetry_pb2.ReportResponse)
        await until(lambda: told(seen, event_pb2.EndpointEjected))
    assert told(seen, event_pb2.EndpointEjected) == [
        event_pb2.EndpointEjected(service="orders", endpoint_id="o1", clients=2)
    ]


async def test_what_was_there_before_is_no_event_and_what_could_not_be_sent_is_sent_later(
    services: Services, tmp_path: Path
) -> None:
    """The first control plane has a broker that is not there; the next one finds its events in the outbox."""
    _, seen = await services.subscribed("notifications", *TYPES)
    credentials, directory = services.broker.credentials(CONTROL_PLANE), tmp_path / "plane"
    async with running(options(directory, "amqp://127.0.0.1:1", credentials)) as plane:
        async with open_channel(plane.address) as channel:
            admin = admin_pb2_grpc.AdminServiceStub(channel)
            await admin.ApplyPolicy(
                admin_pb2.ApplyPolicyRequest(
                    document=yaml.safe_dump({"service": "orders", "retry": {"max_attempts": 2}})
                )
            )
        publisher = plane.event_publisher
        assert publisher is not None
        await until(lambda: publisher.outbox is not None and publisher.outbox.events == 1)
        await until(lambda: publisher.outbox is not None and publisher.outbox.relay is RelayState.DISCONNECTED)
    url = services.broker.url_of(services.vhost)
    async with running(options(directory, url, credentials)):
        await seen.count(1)
    (applied,) = told(seen, event_pb2.PolicyApplied)
    assert applied.service == "orders"
    assert len(seen.events) == 1


async def test_a_broker_that_does_not_answer_holds_nothing_up(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and says nothing. What there is no room for is dropped and counted."""
    for name, value in (("MAX_WAITING", 50), ("MAX_EVENTS", 10), ("STORE_TIMEOUT", 0.2)):
        monkeypatch.setattr(event_publisher, name, value)
    credentials = services.broker.credentials(CONTROL_PLANE)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://127.0.0.1:{silent.getsockname()[1]}"
        async with running(options(tmp_path / "plane", url, credentials)) as plane:
            publisher = plane.event_publisher
            assert publisher is not None
            async with open_channel(plane.address) as channel, AsyncExitStack() as leases:
                for number in range(40):
                    began = time.monotonic()
                    await leases.enter_async_context(registered(channel, f"o{number}"))
                    assert time.monotonic() - began < 10
                await until(lambda: publisher.dropped >= 30)
            assert publisher.outbox is not None
            assert publisher.outbox.events <= 10
            began = time.monotonic()
        assert time.monotonic() - began < 10


async def test_an_outbox_that_cannot_be_used_holds_nothing_up(services: Services, tmp_path: Path) -> None:
    directory = tmp_path / "plane"
    (directory / event_publisher.OUTBOX).mkdir(parents=True)
    url, credentials = services.broker.url_of(services.vhost), services.broker.credentials(CONTROL_PLANE)
    async with running(options(directory, url, credentials)) as plane, open_channel(plane.address) as channel:
        publisher = plane.event_publisher
        assert publisher is not None
        async with registered(channel, "o1"):
            await until(lambda: publisher.dropped == 1)
        assert publisher.outbox is None
        assert not publisher.published


async def test_events_of_the_mesh_are_in_metrics_and_status(services: Services, tmp_path: Path) -> None:
    credentials = services.broker.credentials(CONTROL_PLANE)
    away = options(tmp_path / "plane", "amqp://127.0.0.1:1", credentials, metrics_address="127.0.0.1:0")
    async with running(away) as plane, open_channel(plane.address) as channel:
        publisher = plane.event_publisher
        assert publisher is not None
        async with registered(channel, "o1"):
            await until(lambda: publisher.outbox is not None and publisher.outbox.events == 1)
            await until(lambda: publisher.outbox is not None and "cannot be reached" in publisher.outbox.broker)
            async with aiohttp.ClientSession() as http, http.get(f"http://{plane.metrics_address}/metrics") as answer:
                text = await answer.text()
            assert 'grpc_mesh_control_plane_events_published_total{type="mesh.v1.EndpointUp"} 1.0' in text
            assert "grpc_mesh_control_plane_outbox_events 1.0" in text
            assert 'grpc_mesh_control_plane_outbox_relay_state{state="disconnected"} 1.0' in text
            status = await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
            [found] = status.outboxes
            assert (found.service, found.outbox.events) == (CONTROL_PLANE, 1)
            assert "cannot be reached" in found.outbox.broker


async def test_an_outbox_that_is_sent_is_counted_in_the_status_and_is_a_line_of_a_check(plane: ControlPlane) -> None:
    publisher = plane.event_publisher
    assert publisher is not None
    await until(lambda: [outbox.is_quiet for _, _, outbox in publisher.outboxes()] == [True])
    async with open_channel(plane.address) as channel:
        status = await admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest())
    assert (list(status.outboxes), status.sent_outboxes) == ([], 1)
    command = ["check", "--control-plane", plane.address, "--insecure"]
    shown = await asyncio.to_thread(CliRunner().invoke, app, command, env={"COLUMNS": "200"})
    assert f"pass  broker: 1 outboxes known to {plane.address}, from which all is sent" in shown.stdout


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_dir"):
        ControlPlaneOptions(insecure=True, broker="amqp://localhost")
    for broker, insecure, message in (
        ("amqp://localhost", False, "is plaintext"),
        ("http://localhost", True, "expected amqps"),
    ):
        with pytest.raises(ConfigError, match=message):
            ControlPlaneOptions(insecure=insecure, broker=broker, broker_credentials=tmp_path / "c", data_dir=tmp_path)
