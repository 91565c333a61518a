"""Registrations, streams and messages that are wrong, or meant to harm, beside calls that must not notice."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
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
    registry_pb2,
    registry_pb2_grpc,
    resource_pb2,
)
from shop.v1 import orders_pb2
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from control_plane.server import ControlPlane
from mesh_client.core.breaker import BreakerState
from mesh_client.core.policy import ServicePolicy
from mesh_client.mesh import Mesh
from tests.integration.system import (
    PATIENCE,
    Load,
    System,
    Watch,
    administration,
    follows,
    ids,
    orders_of,
    status_in_which,
    until,
)

TWO = ids(1, 2)
MEBIBYTE = 1024 * 1024
ENDPOINTS = resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS

RawStream = grpc.aio.StreamStreamCall[discovery_pb2.DeltaResourcesRequest, discovery_pb2.DeltaResourcesResponse]


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


@pytest.fixture
async def plane(system: System) -> ControlPlane:
    plane = await system.run_control_plane()
    await system.start_orders(*TWO, control_plane=plane.address, drain_timeout=4.0)
    return plane


@pytest.fixture
async def mesh(system: System, plane: ControlPlane) -> Mesh:
    mesh = await system.connect(plane.address)
    await follows(mesh, *TWO)
    return mesh


@pytest.fixture
async def channel(plane: ControlPlane) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(plane.address) as channel:
        yield channel


async def refusal_of(channel: grpc.aio.Channel, service: str, **endpoint: Any) -> grpc.aio.AioRpcError:
    """Why the control plane refuses a registration."""
    call = registry_pb2_grpc.RegistryServiceStub(channel).Register()
    await call.write(
        registry_pb2.RegisterRequest(
            service=service,
            endpoint=endpoint_pb2.Endpoint(**{"id": "orders-9", "address": "127.0.0.1", "port": 9, **endpoint}),
        )
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(PATIENCE):
            await call.read()
    return caught.value


@asynccontextmanager
async def raw_stream(channel: grpc.aio.Channel, node: str, *names: str) -> AsyncIterator[RawStream]:
    """A discovery stream that subscribes to endpoints and does what the test says, which is less than it should."""
    call = discovery_pb2_grpc.DiscoveryServiceStub(channel).DeltaResources()
    try:
        await call.write(
            discovery_pb2.DeltaResourcesRequest(node=discovery_pb2.Node(id=node), type=ENDPOINTS, subscribe=names)
        )
        yield call
    finally:
        call.cancel()


async def test_registrations_that_are_wrong_or_taken_change_nothing(
    plane: ControlPlane, mesh: Mesh, channel: grpc.aio.Channel
) -> None:
    targets = {endpoint.id: endpoint.target for endpoint in orders_of(mesh).endpoints}
    async with Watch(mesh) as watch, Load(mesh) as load:
        taken = await refusal_of(channel, "orders", id="orders-1")
        assert taken.code() is grpc.StatusCode.ALREADY_EXISTS
        assert "orders-1" in (taken.details() or "")
        for service, endpoint, path in (
            ("no name", {}, "service"),
            ("", {}, "service"),
            ("x" * 64, {}, "service"),
            ("orders", {"id": "two words"}, "endpoint.id"),
            ("orders", {"id": ""}, "endpoint.id"),
            ("orders", {"address": "http://here"}, "endpoint.address"),
            ("orders", {"address": ""}, "endpoint.address"),
            ("orders", {"address": "0.0.0.0"}, "endpoint.address"),
            ("orders", {"port": 0}, "endpoint.port"),
            ("orders", {"port": 65536}, "endpoint.port"),
            ("orders", {"weight": 1001}, "endpoint.weight"),
            ("orders", {"metadata": {"key": "x" * 10_000}}, "endpoint.metadata"),
        ):
            refused = await refusal_of(channel, service, **endpoint)
            assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert path in (refused.details() or "")
        await load.answered_only_by(*TWO)
    assert set(watch.seen) == {frozenset(TWO)}
    assert {endpoint.id: endpoint.target for endpoint in orders_of(mesh).endpoints} == targets
    status = await status_in_which(plane.address, lambda _: True)
    assert [(service.service, service.healthy) for service in status.services] == [("orders", 2)]


async def test_floods_of_subscriptions_and_streams_that_never_acknowledge_delay_nobody(
    system: System, plane: ControlPlane, mesh: Mesh, channel: grpc.aio.Channel
) -> None:
    async with AsyncExitStack() as stack, Load(mesh) as load:
        sluggards = [
            await stack.enter_async_context(raw_stream(channel, f"sluggard-{number}", "orders")) for number in range(3)
        ]
        for call in sluggards:
            assert await call.read() is not grpc.aio.EOF  # and no answer to it, ever
        names = [f"service-{number}" for number in range(9_000)]
        for number in range(3):  # within the limit: it stays, and takes all that it is told without an answer
            flood = await stack.enter_async_context(raw_stream(channel, f"flood-{number}", *names))
            assert await flood.read() is not grpc.aio.EOF
        async with raw_stream(channel, "too-much", *names, *(f"more-{name}" for name in names)) as refused:
            with pytest.raises(grpc.aio.AioRpcError, match="subscriptions are more than the 10000") as caught:
                await refused.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        await system.start_orders("orders-3", control_plane=plane.address)
        await load.answered_by("orders-3")

        # Who acknowledges has forgotten the leaver long before those who do not hold it up to the bound of its drain.
        leaving = asyncio.create_task(system.stop_orders("orders-1"))
        await follows(mesh, "orders-2", "orders-3")
        assert not leaving.done()
        await leaving
        await load.answered_only_by("orders-2", "orders-3")
        log = (system.directory / "orders-1.log").read_text()
        assert "drain of orders/orders-1: not acknowledged by sluggard-0, sluggard-1, sluggard-2" in log


async def test_a_policy_that_is_bad_in_the_store_of_a_control_plane_that_restarts_changes_nothing(
    system: System,
) -> None:
    plane = await system.start_control_plane()
    await system.start_orders(*TWO, control_plane=plane.address)
    payments = mesh_client.server("payments", control_plane=plane.address)
    await payments.start()
    mesh = await system.connect(plane.address)
    await follows(mesh, *TWO)
    async with administration(plane.address) as admin, Load(mesh) as load:
        before = orders_of(mesh).policy_version
        ring = "service: orders\nload_balancer: {algorithm: RING_HASH}"
        await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=ring))
        await until(mesh, lambda: orders_of(mesh).policy_version != before)
        good = orders_of(mesh).policy_version
        await load.goes_on(20)
        (chosen,) = await load.goes_on()

        await plane.kill()
        with closing(sqlite3.connect(system.directory / "control-plane" / "registry.sqlite")) as database, database:
            changed = database.execute(
                "UPDATE documents SET document = 'retry: [' WHERE kind = 'policies' AND name = 'orders'"
            )
            assert changed.rowcount == 1
        await plane.start()
        status = await status_in_which(plane.address, lambda status: len(status.policy_problems) > 0)
        assert [(each.service, each.obeyed_version) for each in status.policy_problems] == [("orders", good)]
        await until(mesh, lambda: mesh.state().in_sync)
        assert orders_of(mesh).policy_version == good
        assert set(await load.goes_on()) == {chosen}

        obeyed: list[ServicePolicy] = []
        stop_watching = mesh.watch_policy("payments", obeyed.append)
        await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document="service: payments\ntimeout: 7s"))
        await until(mesh, lambda: bool(obeyed) and obeyed[-1].timeout == 7.0)
        stop_watching()
    await payments.stop()


async def test_messages_that_are_too_large_are_refused_alone(
    plane: ControlPlane, mesh: Mesh, channel: grpc.aio.Channel
) -> None:
    stub = OrderServiceStub(mesh.channel("orders"))
    admin = admin_pb2_grpc.AdminServiceStub(channel)
    async with Load(mesh) as load:
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as caught:
                await stub.GetOrder(orders_pb2.GetOrderRequest(order_id="x" * 5 * MEBIBYTE), timeout=PATIENCE)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            await load.goes_on(12)
        assert orders_of(mesh).breaker is BreakerState.CLOSED

        with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):
            await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document="#" * 5 * MEBIBYTE))
        with pytest.raises(grpc.aio.AioRpcError, match="256 KiB|262144") as too_large:
            await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document="service: orders\n#" + "x" * MEBIBYTE))
        assert too_large.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        huge = await refusal_of(channel, "orders", metadata={"key": "x" * 5 * MEBIBYTE})
        assert huge.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with raw_stream(channel, "x" * 5 * MEBIBYTE, "orders") as stream:
            with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):
                await stream.read()
        await load.answered_only_by(*TWO)
    assert mesh.state().in_sync
