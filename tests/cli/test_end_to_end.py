"""The command against a real control plane, with a real client on its discovery stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from mesh.v1 import (
    discovery_pb2,
    discovery_pb2_grpc,
    edge_service_pb2,
    edge_service_pb2_grpc,
    endpoint_pb2,
    registry_pb2,
    registry_pb2_grpc,
    resource_pb2,
)
from typer.testing import Result

from control_plane.events import ServiceObserved, SourceConnected
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from control_plane.sources import Emit
from control_plane.sources.database import Database
from control_plane.sources.embedded_policies import EmbeddedPolicyStore
from mesh_client.core.model import Endpoint
from tests.cli.conftest import Run

POLICY = resource_pb2.RESOURCE_TYPE_SERVICE_POLICY
ENDPOINTS = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS

Mesh = Callable[..., Awaitable[Result]]


@asynccontextmanager
async def running(plane: ControlPlane) -> AsyncIterator[ControlPlane]:
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop(0.1)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with running(
        ControlPlane(ControlPlaneOptions(insecure=True, data_dir=tmp_path / "state", control_plane_id="cp-1"))
    ) as plane:
        yield plane


def against(plane: ControlPlane, run: Run) -> Mesh:
    """Runs the command in a thread, so that the control plane in this loop can answer it."""

    async def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return await asyncio.to_thread(run, *arguments, "--control-plane", plane.address, stdin=stdin)

    return invoke


async def status_in_which(mesh: Mesh, condition: Callable[[Any], bool]) -> Any:
    """The status as JSON, once it is as expected: what clients send arrives when it arrives."""
    async with asyncio.timeout(30):
        while True:
            result = await mesh("status", "--json")
            assert result.exit_code == 0, result.stderr
            status = json.loads(result.stdout)
            if condition(status):
                return status


@asynccontextmanager
async def registered(plane: ControlPlane, service: str, id: str) -> AsyncIterator[None]:
    """Holds a lease of the embedded registry, and gives it back."""
    async with grpc.aio.insecure_channel(plane.address) as channel:
        stream = registry_pb2_grpc.RegistryServiceStub(channel).Register()
        endpoint = endpoint_pb2.Endpoint(id=id, address="127.0.0.1", port=50051)
        await stream.write(registry_pb2.RegisterRequest(service=service, endpoint=endpoint))
        await stream.read()
        yield
        await stream.done_writing()
        while await stream.read() is not grpc.aio.EOF:
            pass


class RawClient:
    """A client of the discovery stream, without the library."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream = discovery_pb2_grpc.DiscoveryServiceStub(channel).DeltaResources()

    async def subscribe(self, kind: resource_pb2.ResourceType.ValueType, service: str) -> None:
        node = discovery_pb2.Node(id="gateway-1", service="gateway", user_agent="raw/1")
        await self._stream.write(discovery_pb2.DeltaResourcesRequest(node=node, type=kind, subscribe=[service]))

    async def receive(self) -> discovery_pb2.DeltaResourcesResponse:
        async with asyncio.timeout(30):
            response = await self._stream.read()
        assert isinstance(response, discovery_pb2.DeltaResourcesResponse)
        return response

    async def answer(self, response: discovery_pb2.DeltaResourcesResponse, rejection: str = "") -> None:
        error = discovery_pb2.Rejection(message=rejection) if rejection else None
        await self._stream.write(
            discovery_pb2.DeltaResourcesRequest(type=response.type, response_nonce=response.nonce, error=error)
        )

    async def close(self) -> None:
        await self._stream.done_writing()
        self._stream.cancel()


@asynccontextmanager
async def raw_client(plane: ControlPlane) -> AsyncIterator[RawClient]:
    async with grpc.aio.insecure_channel(plane.address) as channel:
        client = RawClient(channel)
        try:
            yield client
        finally:
            await client.close()


async def test_a_policy_is_checked_compared_stored_shown_and_deleted(
    plane: ControlPlane, run: Run, tmp_path: Path
) -> None:
    mesh = against(plane, run)
    file = tmp_path / "orders.yaml"
    file.write_text("service: orders\ntimeout: 2s\n")

    dry = await mesh("policy", "apply", "--dry-run", str(file))
    assert (dry.exit_code, dry.stderr) == (0, "")
    assert "+timeout: 2s" in dry.stdout.splitlines()
    assert "No policies are stored" in (await mesh("policy", "list")).stdout

    stored = await mesh("policy", "apply", str(file), "--if-version", "", "--json")
    assert stored.exit_code == 0, stored.stderr
    version = json.loads(stored.stdout)["policies"][0]["stored_version"]
    assert version

    again = await mesh("policy", "apply", str(file))
    assert again.stdout == f"orders: unchanged, stored version {version}\n"

    shown = await mesh("policy", "get", "orders")
    assert shown.stdout == f"# stored version {version}\nservice: orders\ntimeout: 2s\n"
    copied = await mesh("policy", "apply", "--dry-run", "-", stdin=shown.stdout)
    assert copied.stdout.endswith("; its effect is the same\n")

    file.write_text("service: orders\ntimeout: 3s\n")
    for expected in ("", "another"):
        lost = await mesh("policy", "apply", str(file), "--if-version", expected)
        assert (lost.exit_code, lost.stdout) == (1, "")
        assert "orders: not stored: " in lost.stderr
        assert "`mesh policy get orders`" in lost.stderr
    changed = await mesh("policy", "apply", str(file), "--if-version", version)
    assert changed.exit_code == 0, changed.stderr
    assert f", was {version}" in changed.stdout

    listed = await mesh("policy", "list")
    assert listed.stdout.splitlines()[1].split()[0] == "orders"
    assert listed.stdout.splitlines()[1].split()[2:] == ["valid", "timeout"]

    conflict = await mesh("policy", "delete", "orders", "--if-version", version)
    assert conflict.exit_code == 1
    assert (await mesh("policy", "delete", "orders")).stdout == "orders: deleted; the defaults apply\n"
    assert (await mesh("policy", "delete", "orders")).exit_code == 1
    assert (await mesh("policy", "get", "orders")).exit_code == 1


async def test_a_bad_policy_stores_nothing_of_what_came_with_it(plane: ControlPlane, run: Run) -> None:
    mesh = against(plane, run)
    text = "service: payments\n---\nservice: orders\nretry: {max_attempts: 0}\n"
    result = await mesh("policy", "apply", "-", stdin=text)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "mesh: stdin, document 2: retry.max_attempts: Input should be greater than or equal to 1 (line 4)\n"
        "mesh: nothing was stored\n"
    )
    assert "No policies are stored" in (await mesh("policy", "list")).stdout


async def test_status_follows_what_clients_acknowledge_and_reject(plane: ControlPlane, run: Run) -> None:
    mesh = against(plane, run)
    async with registered(plane, "orders", "orders-1"), raw_client(plane) as client:
        await status_in_which(mesh, lambda status: any(item["endpoints_version"] for item in status["services"]))
        await client.subscribe(POLICY, "orders")
        policy = await client.receive()
        await client.answer(policy)
        await client.subscribe(ENDPOINTS, "orders")
        await client.receive()

        status = await status_in_which(
            mesh, lambda status: status["clients"] and len(status["clients"][0]["subscriptions"]) == 2
        )
        (seen,) = status["clients"]
        assert (seen["node_id"], seen["service"]) == ("gateway-1", "gateway")
        by_type = {item["type"]: item for item in seen["subscriptions"]}
        endpoints = by_type["RESOURCE_TYPE_SERVICE_ENDPOINTS"]
        assert endpoints["acknowledged_version"] == ""
        assert endpoints["acknowledged_ago"] is None
        assert endpoints["current_version"] == status["services"][0]["endpoints_version"] != ""
        acknowledged = by_type["RESOURCE_TYPE_SERVICE_POLICY"]
        assert acknowledged["acknowledged_version"] == policy.resources[0].version == acknowledged["current_version"]
        assert (await mesh("policy", "apply", "-", stdin="service: orders\ntimeout: 2s\n")).exit_code == 0
        changed = await client.receive()
        await client.answer(changed, rejection="cannot keep to that")
        await status_in_which(
            mesh, lambda status: any(item["rejection"] for item in status["clients"][0]["subscriptions"])
        )
        shown = (await mesh("status")).stdout
        assert f"Rejected: gateway-1 does not take policy {changed.resources[0].version} of orders and keeps " in shown
        assert "cannot keep to that" in shown

        listed = await mesh("endpoints", "orders")
        assert listed.stdout.splitlines()[3].split()[:3] == ["orders-1", "127.0.0.1:50051", "healthy"]
    unknown = await mesh("endpoints", "nobody")
    assert unknown.exit_code == 1
    assert "does not know a service 'nobody'" in unknown.stderr


async def test_a_stored_policy_that_is_invalid_is_shown_everywhere(run: Run, tmp_path: Path) -> None:
    database = Database(tmp_path)
    await database.open()
    await EmbeddedPolicyStore(database).put("orders", b"service: orders\ntimeout: never\n", None)
    await database.close()
    async with running(ControlPlane(ControlPlaneOptions(insecure=True, data_dir=tmp_path))) as plane:
        mesh = against(plane, run)
        await status_in_which(mesh, lambda status: len(status["policy_problems"]) == 1)
        shown = (await mesh("status")).stdout
        assert "the one stored for orders is not obeyed; clients keep to the defaults" in shown
        assert "  timeout: expected a duration" in shown
        assert "invalid: 1 bad field" in (await mesh("policy", "list")).stdout
        got = await mesh("policy", "get", "orders")
        assert got.exit_code == 1
        assert "timeout: expected a duration" in got.stderr
        repaired = await mesh("policy", "apply", "-", stdin="service: orders\n")
        assert repaired.exit_code == 0, repaired.stderr
        await status_in_which(mesh, lambda status: not status["policy_problems"])


class Listing:
    """A registry of the test's own: one service, whose endpoints vanish when it is told so."""

    name = "listing"

    def __init__(self) -> None:
        self.vanish = asyncio.Event()

    async def run(self, emit: Emit) -> None:
        endpoints = tuple(Endpoint(f"orders-{number}", "127.0.0.1", 50_000 + number) for number in range(6))
        emit(ServiceObserved(self.name, "orders", endpoints))
        emit(SourceConnected(self.name))
        await self.vanish.wait()
        emit(ServiceObserved(self.name, "orders", ()))
        await asyncio.Event().wait()


async def test_held_removals_are_shown_and_confirmed(run: Run, tmp_path: Path) -> None:
    source = Listing()
    async with running(ControlPlane(ControlPlaneOptions(insecure=True, data_dir=tmp_path), source=source)) as plane:
        mesh = against(plane, run)
        await status_in_which(mesh, lambda status: [item["healthy"] for item in status["services"]] == [6])
        source.vanish.set()
        status = await status_in_which(mesh, lambda status: status["removal_hold"] is not None)
        assert (status["removal_hold"]["endpoints"], status["removal_hold"]["services"]) == (6, ["orders"])
        assert "has not listed 6 endpoints of orders" in (await mesh("status")).stdout
        listed = (await mesh("endpoints", "orders")).stdout
        assert listed.count("gone from its source; held") == 6

        confirmed = await mesh("removals", "confirm")
        assert (confirmed.exit_code, confirmed.stdout) == (0, "6 endpoints removed.\n")
        await status_in_which(mesh, lambda status: status["removal_hold"] is None)
        assert "has no endpoints" in (await mesh("endpoints", "orders")).stdout


async def test_a_policy_of_an_edge_is_stored_shown_and_deleted(plane: ControlPlane, run: Run, tmp_path: Path) -> None:
    mesh = against(plane, run)
    file = tmp_path / "public.yaml"
    file.write_text("edge: public\nservices: {a.B: {upstream: orders}}\n")
    stored = await mesh("edge", "apply", str(file))
    assert (stored.exit_code, stored.stdout) == (0, "edge public: stored version 1\n")
    assert stored.stderr == (
        f"mesh: {file}, document 1: services.a.B.upstream: no registry lists a service 'orders' now; until one does, "
        "calls are answered with 503\n"
    )
    assert "public" in (await mesh("edge", "list")).stdout
    assert (await mesh("policy", "list")).stdout == "No policies are stored; every service gets the defaults.\n"
    async with (
        grpc.aio.insecure_channel(plane.address) as channel,
        asyncio.timeout(30),
    ):
        follow = edge_service_pb2_grpc.EdgeServiceStub(channel).Follow()
        gateway = edge_service_pb2.EdgeGateway(edge="public", id="edge-1", kind=edge_service_pb2.EDGE_KIND_KONG)
        await follow.write(edge_service_pb2.FollowRequest(gateway=gateway))
        response = await follow.read()
        assert isinstance(response, edge_service_pb2.FollowResponse)
        report = edge_service_pb2.EdgeReport(
            policy_version=response.version,
            outcome=edge_service_pb2.EDGE_OUTCOME_REJECTED,
            detail="services.a.B: no such service",
        )
        await follow.write(edge_service_pb2.FollowRequest(report=report))
        status = await status_in_which(
            mesh, lambda status: status["edges"] and any(item["report"] for item in status["edges"][0]["gateways"])
        )
        (edge,) = status["edges"]
        assert (edge["policy_version"], edge["unknown_upstreams"]) == (response.version, ["orders"])
        assert edge["gateways"][0]["report"]["outcome"] == "EDGE_OUTCOME_REJECTED"
        assert "services.a.B: no such service" in (await mesh("status")).stdout
        follow.cancel()
    file.write_text("edge: public\nservices: {a.B: {upstream: Orders}}\n")
    refused = await mesh("edge", "apply", str(file))
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 2)
    assert (await mesh("edge", "delete", "public")).stdout == "edge public: deleted; it exposes nothing\n"
    assert (await mesh("edge", "delete", "public")).exit_code == 1
