"""Control planes that die under load. No call may fail, and what happened meanwhile is made up for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from mesh_client import Mesh
from tests.integration.consul_cluster import ConsulCluster
from tests.integration.system import Load, System, follows, ids, orders_of, until

THREE = ids(1, 2, 3)


def _connected(mesh: Mesh, address: str) -> Callable[[], bool]:
    return lambda: mesh.state().control_plane == f"{address} connected"


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


async def test_calls_go_on_without_it_and_rollouts_work_after_it_is_back(system: System) -> None:
    plane = await system.start_control_plane()
    await system.start_orders(*THREE, control_plane=plane.address)
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Load(mesh) as load:
        await plane.kill()
        await until(mesh, lambda: not mesh.state().in_sync)
        assert "unreachable" in mesh.state().control_plane
        await load.goes_on(100)
        # What happens meanwhile, callers have to find out by themselves.
        await system.orders["orders-3"].kill()
        await load.goes_on(200)
        assert len(orders_of(mesh).endpoints) == 3

        await plane.start()
        await until(mesh, lambda: mesh.state().in_sync)
        for number in (1, 2):
            await system.start_orders(f"orders-{number + 3}", control_plane=plane.address)
            await system.stop_orders(f"orders-{number}")
        await load.answered_only_by("orders-4", "orders-5")
        assert {endpoint.id for endpoint in orders_of(mesh).endpoints} <= {"orders-3", "orders-4", "orders-5"}


async def test_a_server_leaves_without_a_control_plane(system: System) -> None:
    plane = await system.start_control_plane()
    await system.start_orders(*THREE, control_plane=plane.address)
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Load(mesh) as load:
        await plane.kill()
        await until(mesh, lambda: not mesh.state().in_sync)
        await system.stop_orders("orders-1")
        await load.answered_only_by("orders-2", "orders-3", calls=200)


async def test_of_two_the_other_takes_over(system: System, tmp_path: Path) -> None:
    async with ConsulCluster.dev(tmp_path) as consul:
        planes = [
            await system.start_control_plane(name=f"control-plane-{number}", registry=consul.registry)
            for number in (1, 2)
        ]
        addresses = [plane.address for plane in planes]
        options: dict[str, Any] = {"registry": consul.registry, "control_plane": addresses}
        await system.start_orders(*THREE, **options)
        mesh = await system.connect(addresses)
        await follows(mesh, *THREE)
        async with Load(mesh) as load:
            for number in (4, 5):  # each of the two is left once
                used, other = sorted(planes, key=lambda plane: plane.address not in mesh.state().control_plane)
                await used.kill()
                await until(mesh, _connected(mesh, other.address))
                await system.start_orders(f"orders-{number}", **options)
                await load.answered_by(f"orders-{number}")
                await system.stop_orders(f"orders-{number - 3}")
                assert f"orders-{number - 3}" not in {endpoint.id for endpoint in orders_of(mesh).endpoints}
                await used.start()
            await follows(mesh, *ids(3, 4, 5))
            await load.answered_only_by(*ids(3, 4, 5))
