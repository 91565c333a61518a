"""Drains that operators ask for, on a whole control plane with the embedded registry."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from mesh.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    discovery_pb2,
    discovery_pb2_grpc,
    endpoint_pb2,
    operations_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    resource_pb2,
)
from mesh.v1 import operations_pb2 as pb

from control_plane.operations import drains
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane

TIMEOUT = 30.0
FAILED_PRECONDITION, NOT_FOUND = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND


class World:
    """A control plane, with leases and subscribers that are held by hand."""

    def __init__(self, plane: ControlPlane, channel: grpc.aio.Channel) -> None:
        self.plane = plane
        self.operator = operations_pb2_grpc.OperationsServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)
        self.registry = registry_pb2_grpc.RegistryServiceStub(channel)
        self._discovery = discovery_pb2_grpc.DiscoveryServiceStub(channel)
        self._calls: list[Any] = []

    async def register(self, *names: str, port: int = 50_051, token: str = "") -> str:
        for name in names:
            call: Any = self.registry.Register()
            self._calls.append(call)
            endpoint = endpoint_pb2.Endpoint(id=name, address="127.0.0.1", port=port)
            await call.write(registry_pb2.RegisterRequest(service="orders", endpoint=endpoint, lease_token=token))
            token = (await call.read()).lease_token
        return token

    async def subscribe(self, node: str) -> Any:
        """A client that has the endpoints of orders, and acknowledges nothing from then on."""
        call: Any = self._discovery.DeltaResources()
        self._calls.append(call)
        kind = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS
        await call.write(
            discovery_pb2.DeltaResourcesRequest(
                node=discovery_pb2.Node(id=node, service="web", user_agent="test/1"), type=kind, subscribe=["orders"]
            )
        )
        await self.acknowledge(call)
        return call

    @staticmethod
    async def acknowledge(call: Any) -> None:
        response = await call.read()
        await call.write(discovery_pb2.DeltaResourcesRequest(type=response.type, response_nonce=response.nonce))

    async def drain(self, *names: str, timeout: float = 0.0, force: bool = False) -> list[pb.DrainedEndpoint]:
        request = pb.DrainEndpointsRequest(service="orders", endpoint_ids=names, force=force)
        request.timeout.FromNanoseconds(round(timeout * 1e9))
        return list((await self.operator.DrainEndpoints(request, timeout=TIMEOUT)).endpoints)

    async def undrain(self, *names: str) -> list[str]:
        request = pb.UndrainEndpointsRequest(service="orders", endpoint_ids=names)
        return list((await self.operator.UndrainEndpoints(request, timeout=TIMEOUT)).endpoint_ids)

    async def states(self) -> dict[str, str]:
        answer = await self.admin.ListEndpoints(admin_pb2.ListEndpointsRequest(service="orders"))
        name = endpoint_pb2.HealthStatus.Name
        return {
            each.endpoint.id: each.drained_by or name(each.endpoint.health).removeprefix("HEALTH_STATUS_").lower()
            for each in answer.endpoints
        }

    def close(self) -> None:
        for call in self._calls:
            call.cancel()


@asynccontextmanager
async def opened(directory: Path | None = None) -> AsyncIterator[World]:
    plane = ControlPlane(ControlPlaneOptions(insecure=True, data_dir=directory, debounce_quiet=0.0))
    await plane.start()
    try:
        async with grpc.aio.insecure_channel(plane.address) as channel:
            world = World(plane, channel)
            await plane._publisher.opened.wait()
            yield world
            world.close()
    finally:
        await plane.stop(0.1)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with opened() as made:
        yield made


async def refused(attempt: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await attempt
    return error.value.code(), error.value.details() or ""


async def test_an_endpoint_is_taken_out_and_given_back(world: World) -> None:
    await world.register("orders-1", "orders-2")
    (outcome,) = await world.drain("orders-1")
    assert outcome == pb.DrainedEndpoint(endpoint_id="orders-1", complete=True)
    assert await world.states() == {"orders-1": "somebody", "orders-2": "healthy"}
    assert await world.drain("orders-1") == [outcome]
    assert await world.undrain("orders-1", "orders-2") == ["orders-1"]
    assert await world.undrain() == []
    assert await world.states() == {"orders-1": "healthy", "orders-2": "healthy"}


async def test_it_is_said_who_has_acknowledged_and_who_has_not(world: World) -> None:
    await world.register("orders-1", "orders-2")
    good, bad = await world.subscribe("good"), await world.subscribe("bad")
    draining = asyncio.ensure_future(world.drain("orders-1", timeout=2.0))
    await world.acknowledge(good)
    (outcome,) = await draining
    assert (outcome.complete, outcome.acknowledged, list(outcome.pending)) == (False, 1, ["bad"])
    draining = asyncio.ensure_future(world.drain("orders-1", timeout=TIMEOUT))
    await world.acknowledge(bad)
    (outcome,) = await draining
    assert (outcome.complete, outcome.acknowledged) == (True, 2)


async def test_the_last_healthy_endpoint_is_drained_by_force_alone(world: World) -> None:
    await world.register("orders-1", "orders-2")
    for names in ((), ("orders-1", "orders-2")):
        code, details = await refused(world.drain(*names))
        assert (code, "no healthy endpoint left" in details) == (FAILED_PRECONDITION, True)
    await world.drain("orders-2")
    assert (await refused(world.drain("orders-1")))[0] is FAILED_PRECONDITION
    assert [each.endpoint_id for each in await world.drain(force=True)] == ["orders-1", "orders-2"]
    assert await world.drain() != []  # there is nothing to lose any more
    assert await world.undrain() == ["orders-1", "orders-2"]


async def test_what_leaves_by_itself_is_not_taken_back(world: World) -> None:
    await world.register("orders-1", "orders-2")
    await world.registry.Drain(registry_pb2.DrainRequest(service="orders", endpoint_id="orders-1"))
    (outcome,) = await world.drain("orders-1")
    assert outcome.by_itself
    code, details = await refused(world.undrain("orders-1"))
    assert (code, "orders-1 of orders leave by themselves" in details) == (FAILED_PRECONDITION, True)
    assert await world.undrain() == []


@pytest.mark.parametrize("what", ["drain", "undrain"])
async def test_what_no_registry_lists_is_not_found(what: str, world: World) -> None:
    attempt = getattr(world, what)
    assert await refused(attempt()) == (NOT_FOUND, "no registry lists a service orders")
    await world.register("orders-1")
    assert await refused(attempt("orders-9")) == (NOT_FOUND, "orders has no endpoint orders-9; there are: orders-1")


async def test_what_cannot_be_asked_for_is_refused(world: World) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    assert (await refused(world.drain("orders-1", timeout=301.0)))[0] is invalid
    assert (await refused(world.operator.DrainEndpoints(pb.DrainEndpointsRequest(service="No Name"))))[0] is invalid
    assert (await refused(world.operator.UndrainEndpoints(pb.UndrainEndpointsRequest(service="No Name"))))[0] is invalid


async def test_without_a_timeout_clients_have_the_default_one(world: World) -> None:
    await world.register("orders-1", "orders-2")
    request = pb.DrainEndpointsRequest(service="orders", endpoint_ids=["orders-1"])
    assert (await world.operator.DrainEndpoints(request, timeout=TIMEOUT)).endpoints[0].complete


async def test_a_drain_outlives_a_restart_and_is_forgotten_when_it_ends(tmp_path: Path) -> None:
    file = tmp_path / drains.FILE_NAME
    async with opened(tmp_path) as world:
        token = await world.register("orders-1")
        await world.register("orders-2")
        await world.drain("orders-1")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        (kept,) = json.loads(file.read_text())
        assert (kept["service"], kept["endpoint_id"], kept["operator"]) == ("orders", "orders-1", "somebody")
    async with opened(tmp_path) as world:
        await world.register("orders-1", token=token)
        assert (await world.states())["orders-1"] == "somebody"
        world.close()  # both leave without a word
        leases = world.plane._registry.leases
        assert leases is not None
        async with asyncio.timeout(TIMEOUT):
            while leases._streams:  # who comes before that is known is taken for another one
                await asyncio.sleep(0)
        await world.register("orders-1", port=50_052)
        async with asyncio.timeout(TIMEOUT):
            while json.loads(file.read_text()) != []:
                await asyncio.sleep(0.02)
        assert (await world.states())["orders-1"] == "healthy"


@pytest.mark.parametrize("content", ["not json", "[{}]", "7"])
async def test_a_damaged_file_is_ignored_and_said(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / drains.FILE_NAME
    file.touch(0o600)
    file.write_text(content)
    async with opened(tmp_path) as world:
        await world.register("orders-1")
        assert await world.states() == {"orders-1": "healthy"}
    assert "is ignored, so what operators had drained is called again" in caplog.text


async def test_a_drain_of_long_ago_is_forgotten_if_its_endpoint_does_not_come_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as world:
        await world.register("orders-1", "orders-2")
        await world.drain("orders-1")
    file = tmp_path / drains.FILE_NAME
    (kept,) = json.loads(file.read_text())
    file.write_text(json.dumps([kept | {"at": kept["at"] - drains.REMEMBERED - 10.0}]))
    async with opened(tmp_path) as world:
        assert world.plane._catalog.operator_drains() == []


async def test_a_file_that_cannot_be_written_costs_the_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(drains, "write_atomically", full)
    async with opened(tmp_path) as world:
        await world.register("orders-1", "orders-2")
        await world.drain("orders-1")
        assert (await world.states())["orders-1"] == "somebody"
    assert "cannot be kept" in caplog.text


async def test_who_drains_is_in_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    await world.register("orders-1", "orders-2")
    await world.drain("orders-1")
    await world.drain(force=True)
    await world.undrain()
    said = [record.getMessage() for record in caplog.records if "somebody" in record.getMessage()]
    assert said == [
        "somebody drains orders-1 of orders",
        "somebody drains all endpoints of orders by force",
        "somebody takes back the drain of orders-1, orders-2 of orders",
    ]


async def test_a_diagnosis_says_who_is_connected_what_is_drained_and_what_room_there_is(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.register("orders-1", "orders-2")
    for node in ("web-1", "web-2"):
        await world.subscribe(node)
    await world.drain("orders-1")
    diagnosis = await world.operator.GetDiagnosis(pb.GetDiagnosisRequest())
    (kind,) = diagnosis.clients
    assert (kind.user_agent, kind.clients, sorted(kind.nodes)) == ("test/1", 2, ["web-1", "web-2"])
    (drain,) = diagnosis.drains
    assert (drain.service, drain.endpoint_id, drain.operator) == ("orders", "orders-1", "somebody")
    assert drain.since.seconds > 1_700_000_000
    assert diagnosis.open_files > 3
    assert (diagnosis.max_streams, diagnosis.streams, diagnosis.registry) == (10_000, 2, "embedded")
    assert not diagnosis.HasField("consul")
    monkeypatch.setattr("control_plane.operations.diagnosis._VERSIONS", 0)
    (others,) = (await world.operator.GetDiagnosis(pb.GetDiagnosisRequest())).clients
    assert (others.user_agent, others.clients) == ("others", 2)
