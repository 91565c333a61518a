"""Instances that are killed, hang and are replaced under load, on the embedded registry. No call may fail."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mesh.v1 import admin_pb2

from tests.integration.system import (
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

THREE = ids(1, 2, 3)


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


async def test_an_instance_is_killed(system: System) -> None:
    plane = await system.run_control_plane()
    await system.start_orders(*THREE, control_plane=plane.address)
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Load(mesh) as load:
        await load.answered_by(*THREE)
        await system.orders["orders-2"].kill()
        await load.goes_on(300)
        await load.answered_only_by("orders-1", "orders-3")
        # Its successor shows the same id. The lease of the dead one is not in its way for longer than its grace.
        await system.start_orders("orders-2", control_plane=plane.address)
        await load.answered_by(*THREE)


async def test_an_instance_hangs_and_comes_back(system: System) -> None:
    plane = await system.run_control_plane()
    await system.start_orders(*THREE, control_plane=plane.address)
    async with administration(plane.address) as admin:
        policy = "service: orders\nretry: {per_try_timeout: 1s}\noutlier_detection: {base_ejection: 1s}"
        await admin.ApplyPolicy(admin_pb2.ApplyPolicyRequest(document=policy))
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Load(mesh) as load:
        await load.answered_by(*THREE)
        system.orders["orders-2"].freeze()
        while not any(endpoint.ejected for endpoint in orders_of(mesh).endpoints):
            await load.goes_on(1)
        assert [endpoint.id for endpoint in orders_of(mesh).endpoints if endpoint.ejected] == ["orders-2"]
        assert set(await load.goes_on(60)) == {"orders-1", "orders-3"}
        system.orders["orders-2"].thaw()
        await load.answered_by("orders-2")


async def test_every_instance_is_replaced(system: System) -> None:
    plane = await system.run_control_plane()
    await system.start_orders(*THREE, control_plane=plane.address)
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Load(mesh) as load:
        for number in (1, 2, 3):
            await system.start_orders(f"orders-{number + 3}", control_plane=plane.address)
            await system.stop_orders(f"orders-{number}")
            assert f"orders-{number}" not in {endpoint.id for endpoint in orders_of(mesh).endpoints}
        await follows(mesh, *ids(4, 5, 6))
        await load.answered_only_by(*ids(4, 5, 6))


async def test_a_control_plane_that_is_killed_and_replaced_forgets_nobody(system: System) -> None:
    plane = await system.start_control_plane()
    await system.start_orders(*THREE, control_plane=plane.address)
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Watch(mesh) as watch, Load(mesh) as load:
        for _ in range(2):
            await plane.kill()
            await until(mesh, lambda: not mesh.state().in_sync)
            await load.goes_on()
            await plane.start()
            # What it publishes first is what counts: it answers before anybody has registered again.
            await follows(mesh, *THREE)
        assert watch.always_had(*THREE)
        status = await status_in_which(
            plane.address, lambda status: any(service.healthy == 3 for service in status.services)
        )
        assert [service.service for service in status.services] == ["orders"]
        # The leases are live again: an instance that leaves is drained and gone.
        await system.stop_orders("orders-3")
        await follows(mesh, "orders-1", "orders-2")
        await load.answered_only_by("orders-1", "orders-2")
