"""Attacks among the workloads of one service: they are one service, and still not each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import endpoint_pb2, registry_pb2, telemetry_pb2

from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from tests.security.mint import Credential, Mint
from tests.security.test_load_reports import accepted, calls, hello
from tests.security.test_mesh_port import denied
from tests.security.world import TIMEOUT, Log, Raw, World, until

TARGET = "127.0.0.1:7"


@asynccontextmanager
async def registered(raw: Raw, endpoint_id: str, token: str = "") -> AsyncIterator[tuple[Any, str]]:
    """The stream behind an endpoint of orders, which breaks at the end, and its lease token."""
    lease = raw.registry.Register(timeout=TIMEOUT)
    endpoint = endpoint_pb2.Endpoint(id=endpoint_id, address="127.0.0.1", port=7)
    await lease.write(registry_pb2.RegisterRequest(service="orders", endpoint=endpoint, lease_token=token))
    answer = await lease.read()
    assert isinstance(answer, registry_pb2.RegisterResponse)
    try:
        yield lease, answer.lease_token
    finally:
        lease.cancel()


async def drain(raw: Raw, endpoint_id: str, token: str = "") -> registry_pb2.DrainResponse:
    """Takes an endpoint of orders out."""
    request = registry_pb2.DrainRequest(service="orders", endpoint_id=endpoint_id, lease_token=token)
    request.timeout.CopyFrom(Duration(seconds=1))
    return await raw.registry.Drain(request, timeout=TIMEOUT)


def refusal(evil: Credential, endpoint_id: str) -> str:
    """In which words a sibling is refused."""
    return (
        f"may not drain endpoint {endpoint_id} of orders: another workload than {evil.workload_id} has registered it, "
        "and its lease token was not shown"
    )


async def test_nobody_drains_another_workload_of_the_same_service(world: World) -> None:
    evil = await world.join("orders")
    async with world.mesh(evil) as raw, world.mesh(world.mint.operator()) as operator:
        async with world.serving("orders") as server:
            await denied(world, drain(raw, server.instance_id), refusal(evil, server.instance_id))
            await denied(world, drain(raw, server.instance_id, "guessed"), refusal(evil, server.instance_id))
            assert world.published("orders") == (server.endpoint.target,)
            endpoint_id = server.instance_id
        # It has drained itself as it stopped, in time for the clients to know.
        assert f"drain of orders/{endpoint_id}: acknowledged by" in world.log.mesh_client
        assert f"drains orders/{endpoint_id}" in world.log.control_plane
        assert world.published("orders") == ()
        async with registered(raw, "o1"):
            await drain(operator, "o1")
            await until(lambda: TARGET not in world.published("orders"))
    assert "drains orders/o1" in world.log.control_plane


async def test_an_instance_that_starts_anew_as_another_workload_has_its_endpoint_again(world: World) -> None:
    before, after = await world.join("orders"), await world.join("orders")
    async with world.mesh(before) as old, world.mesh(after) as new:
        async with registered(old, "o1"):
            await until(lambda: TARGET in world.published("orders"))
        # The stream broke: its lease lasts for the grace, and is no other workload's until one has registered.
        await denied(world, drain(new, "o1"), refusal(after, "o1"))
        async with registered(new, "o1"):
            await denied(world, drain(old, "o1"), refusal(before, "o1"))
            assert TARGET in world.published("orders")
            assert (await drain(new, "o1")).complete
            await until(lambda: TARGET not in world.published("orders"))


async def test_an_instance_that_joined_anew_while_it_ran_drains_itself_by_its_lease_token(world: World) -> None:
    before, after = await world.join("orders"), await world.join("orders")
    async with world.mesh(before) as old, world.mesh(after) as new, registered(old, "o1") as (_, token):
        world.log.keep_out(token)
        await denied(world, drain(new, "o1"), refusal(after, "o1"))
        async with registered(new, "o1", token):
            await denied(world, drain(old, "o1"), refusal(before, "o1"))
            assert (await drain(old, "o1", token)).complete


async def test_a_lease_is_its_workload_s_after_a_restart_of_the_control_plane(log: Log, tmp_path: Path) -> None:
    mint = Mint(tmp_path / "ca")

    @asynccontextmanager
    async def running() -> AsyncIterator[World]:
        plane = ControlPlane(ControlPlaneOptions(identity=mint.options(), data_dir=tmp_path / "data"))
        await plane.start()
        try:
            async with AsyncExitStack() as stack:
                yield World(mint, plane, log, tmp_path, stack)
        finally:
            await plane.stop(0)

    async with running() as world:
        good, evil = await world.join("orders"), await world.join("orders")
        async with world.mesh(good) as raw, registered(raw, "o1"):
            pass
    async with running() as world:
        await until(lambda: TARGET in world.published("orders"))
        async with world.mesh(evil) as raw:
            await denied(world, drain(raw, "o1"), refusal(evil, "o1"))
        assert TARGET in world.published("orders")
        async with world.mesh(good) as raw:
            assert (await drain(raw, "o1")).complete


async def test_a_sibling_with_the_same_node_id_does_not_end_the_reports_of_another(world: World) -> None:
    good, evil = await world.join("orders"), await world.join("orders")
    async with world.mesh(good) as raw, world.mesh(evil) as other, accepted(raw, "orders", node_id="o1") as stream:
        async with accepted(other, "orders", node_id="o1", called=[calls(1)]):
            await stream.write(hello("orders", "o1", called=[calls(3)]))
            reporters = world.plane.telemetry.recorder.reporters
            await until(lambda: sum(sum(each.calls.values()) for each in reporters) == 4)
            assert {each.owner for each in reporters} == {good.workload_id, evil.workload_id}
            assert all(each.connected for each in reporters)
            await stream.write(telemetry_pb2.ReportRequest())
            assert not stream.done()
    assert grpc.StatusCode.ABORTED.name not in world.log.control_plane
