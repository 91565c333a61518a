"""Instances that are killed, hang and are replaced under load, on the embedded registry. No call may fail."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mesh.v1 import admin_pb2

from mesh_client.core.model import Health
from tests.integration.system import Load, System, administration, holds, ids, until, orders_of, sees

THREE = ids([1, 2, 3])


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


async def test_killed(system: System) -> None:
    plane = await system.run_control_plane()
    await system.start_orders(*THREE, control_plane=plane.address)
    mesh = await system.connect(plane.address)
    await holds(mesh, *THREE)
    async with Load(mesh) as load:
        await load.answered_by(*THREE)
        await system.orders["orders-2"].kill()
        await load.goes_on(200)
        await load.answered_only_by("orders-1", "orders-3")
