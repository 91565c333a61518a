"""An instance that died is deregistered by Consul itself, whose shortest time for that is a minute and a half."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mesh_client.core.model import Health
from tests.integration.consul_cluster import ConsulCluster
from tests.integration.system import Load, System, follows, ids, orders_of, sees

REAPED = 130.0
"""Seconds: a minute that the check is critical (`DeregisterCriticalServiceAfter`, at least 1m), then Consul's next look
for such checks, which comes every 30 s."""


@pytest.mark.timeout(180)
async def test_a_killed_instance_is_deregistered_when_its_ttl_has_been_over_for_long(tmp_path: Path) -> None:
    async with ConsulCluster.dev(tmp_path) as consul, System(tmp_path) as system:
        plane = await system.run_control_plane(registry=consul.registry)
        await system.start_orders(*ids(1, 2), registry=consul.registry, control_plane=plane.address)
        mesh = await system.connect(plane.address)
        await follows(mesh, *ids(1, 2))
        async with Load(mesh, workers=1, pause=0.05) as load:
            await system.orders["orders-2"].kill()
            await sees(mesh, Health.UNHEALTHY, "orders-2")
            await load.answered_only_by("orders-1", calls=20)

            async with asyncio.timeout(REAPED):
                while {each.id for each in orders_of(mesh).endpoints} != {"orders-1"}:
                    await mesh.changed()
            found = await consul.request("GET", "/v1/health/service/orders")
            assert [each["Service"]["ID"] for each in found] == ["orders-1"]
            assert set(await consul.request("GET", "/v1/agent/checks")) == {"grpc-mesh:orders-1"}

            await system.start_orders("orders-2", registry=consul.registry, control_plane=plane.address)
            await load.answered_by("orders-1", "orders-2")
