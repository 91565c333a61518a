"""Consul restarts without its memory, and goes away whole, under load. No call may fail, nobody may be dropped."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh_client.core.model import Health
from tests.integration.consul_cluster import ConsulCluster
from tests.integration.system import PATIENCE, Load, System, Watch, follows, ids, sees, source_of, status_in_which

THREE = ids(1, 2, 3)


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.dev(tmp_path) as consul:
        yield consul


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


async def index(consul: ConsulCluster) -> int:
    """How far Consul has counted."""
    await consul.put_key("other", uuid.uuid4().bytes)
    (entry,) = await consul.request("GET", "/v1/kv/other")
    return int(entry["ModifyIndex"])


async def registered(consul: ConsulCluster, *names: str) -> None:
    """Returns when Consul lists exactly these as passing."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = await consul.request("GET", "/v1/health/service/orders", parameters={"passing": "1"})
            if {each["Service"]["ID"] for each in found} == set(names):
                return
            await asyncio.sleep(0.02)


async def test_an_agent_restarts_without_its_memory(system: System, consul: ConsulCluster) -> None:
    (agent,) = consul.agents
    plane = await system.run_control_plane(registry=consul.registry)
    await system.start_orders(*THREE, registry=consul.registry, control_plane=plane.address)
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Watch(mesh) as watch, Load(mesh) as load:
        for _ in range(30):
            await index(consul)
        before = await index(consul)
        agent.kill()
        await status_in_which(plane.address, lambda status: not source_of(status).connected)
        await load.goes_on(100)
        await consul.restart(agent)
        assert await index(consul) < before - 20
        await status_in_which(plane.address, lambda status: source_of(status).connected)
        await load.goes_on(100)

        # News reach the client although Consul counts from 1 again.
        await system.start_orders("orders-4", registry=consul.registry, control_plane=plane.address)
        await follows(mesh, *THREE, "orders-4")
        await load.answered_by("orders-4")
        await registered(consul, *THREE, "orders-4")
        await sees(mesh, Health.HEALTHY, *THREE, "orders-4")
        assert watch.always_had(*THREE)

        await system.stop_orders("orders-1")
        await follows(mesh, "orders-2", "orders-3", "orders-4")
        await load.answered_only_by("orders-2", "orders-3", "orders-4")
