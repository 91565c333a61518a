"""The registry loses everything at once: the mass removal guard, from Consul to the calls and the operator."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import grpc.aio
import pytest
from shop.v1.orders_pb2_grpc import OrderServiceStub, add_OrderServiceServicer_to_server

from tests.integration.consul_cluster import ConsulCluster
from tests.integration.mesh_rig import serve
from tests.integration.orders import Orders
from tests.integration.system import (
    ORDER,
    Load,
    System,
    follows,
    ids,
    mesh_command,
    orders_of,
    status_in_which,
    until,
)

FIVE = ids(1, 2, 3, 4, 5)


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.dev(tmp_path) as consul:
        yield consul


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


async def test_a_wiped_catalog_is_held_until_an_operator_confirms(system: System, consul: ConsulCluster) -> None:
    async with AsyncExitStack() as stack:
        # Servers that do not register themselves, and so do not come back by themselves.
        for name in FIVE:
            _, port = await serve(stack, partial(add_OrderServiceServicer_to_server, Orders(name)))
            await consul.register("orders", name, port=port)
        plane = await system.run_control_plane(registry=consul.registry)
        mesh = await system.connect(plane.address)
        await follows(mesh, *FIVE)
        async with Load(mesh) as load:
            await load.answered_by(*FIVE)
            await asyncio.gather(*map(consul.deregister, FIVE))
            await status_in_which(plane.address, lambda status: status.removal_hold.endpoints == 5)
            assert await consul.request("GET", "/v1/health/service/orders") == []

            await follows(mesh, *FIVE)
            await load.answered_only_by(*FIVE)
            newcomer = await system.connect(plane.address)
            await follows(newcomer, *FIVE)
            shown = await mesh_command("status", control_plane=plane.address)
            assert "Held removals: the source has not listed 5 endpoints of orders" in shown
            assert "mesh removals confirm" in shown
            endpoints = json.loads(await mesh_command("endpoints", "orders", "--json", control_plane=plane.address))
            assert [endpoint["held"] for endpoint in endpoints["endpoints"]] == [True] * 5

            # One comes back: it is not held any more, and the others still are.
            answered_at = next(endpoint for endpoint in orders_of(mesh).endpoints if endpoint.id == "orders-3")
            await consul.register("orders", "orders-3", port=int(answered_at.target.rpartition(":")[2]))
            await status_in_which(plane.address, lambda status: status.removal_hold.endpoints == 4)
            assert "4 endpoints removed" in await mesh_command("removals", "confirm", control_plane=plane.address)
            await follows(mesh, "orders-3")
            await load.answered_only_by("orders-3")

        # The last one is fewer than the guard looks at: it goes at once, and calls say why they fail.
        await consul.deregister("orders-3")
        await until(mesh, lambda: not orders_of(mesh).endpoints)
        with pytest.raises(grpc.aio.AioRpcError, match="the service is known but has no endpoints") as caught:
            await OrderServiceStub(mesh.channel("orders")).GetOrder(ORDER)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "Nothing was held" in await mesh_command("removals", "confirm", control_plane=plane.address)
