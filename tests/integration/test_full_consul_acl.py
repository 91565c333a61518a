"""The whole mesh on three real Consul servers, ACLs with default deny, under load. No call may fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh_client.core.model import Health
from tests.integration.consul_cluster import ConsulAgent, ConsulCluster, ConsulError
from tests.integration.system import (
    PATIENCE,
    READER,
    Load,
    System,
    Watch,
    follows,
    ids,
    orders_of,
    sees,
    source_of,
    status_in_which,
    until,
)

THREE = ids(1, 2, 3)


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.three_with_acl(tmp_path) as consul:
        yield consul


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


async def service_token(consul: ConsulCluster, agent: ConsulAgent) -> str:
    """A fresh token that may register orders and nothing else. Without a leader it has to wait for one."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                identity = {"ServiceIdentities": [{"ServiceName": "orders"}]}
                created = await consul.request("PUT", "/v1/acl/token", identity, agent=agent)
                return str(created["SecretID"])
            except ConsulError as error:
                if error.status != 500:
                    raise
                await asyncio.sleep(0.05)


async def start_orders(system: System, consul: ConsulCluster, name: str, agent: ConsulAgent, plane: str) -> None:
    token = await service_token(consul, agent)
    await system.start_orders(name, token=token, registry=f"consul://{agent.address}", control_plane=plane)


async def test_the_leader_is_killed_then_all_of_consul(system: System, consul: ConsulCluster) -> None:
    leader = await consul.leader()
    followers = [agent for agent in consul.agents if agent is not leader]
    # Each token is used right after it was made, with an agent that is not the one that made it.
    plane = await system.run_control_plane(
        registry="consul://" + ",".join(agent.address for agent in (*followers, leader)),
        consul_token=await consul.make_token(READER),
    )
    agents = (leader, *followers)
    await asyncio.gather(
        *(start_orders(system, consul, name, agent, plane.address) for name, agent in zip(THREE, agents, strict=True))
    )
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    async with Watch(mesh) as watch, Load(mesh) as load:
        await load.answered_by(*THREE)

        leader.kill()
        await load.goes_on(200)
        await start_orders(system, consul, "orders-4", followers[0], plane.address)
        await follows(mesh, *THREE, "orders-4")
        await load.answered_by("orders-2", "orders-3", "orders-4")
        # The new leader takes policies, too.
        before = orders_of(mesh).policy_version
        key = "/v1/kv/mesh/policies/orders"
        await consul.request("PUT", key, b"service: orders\ntimeout: 9s", agent=followers[1])
        await until(mesh, lambda: orders_of(mesh).policy_version != before)

        await consul.restart(leader)
        await sees(mesh, Health.HEALTHY, *THREE, "orders-4")

        for agent in agents:
            agent.kill()
        status = await status_in_which(plane.address, lambda status: not source_of(status).connected)
        assert source_of(status).detail
        assert [service.healthy + service.unhealthy for service in status.services] == [4]
        await load.goes_on(200)
        newcomer = await system.connect(plane.address)
        await follows(newcomer, *THREE, "orders-4")
        await system.orders["orders-4"].kill()
        await load.goes_on(100)

        for agent in agents:
            agent.start()
        await asyncio.gather(*map(consul.ready, agents))
        await status_in_which(plane.address, lambda status: source_of(status).connected)
        await sees(mesh, Health.HEALTHY, *THREE)
        await load.answered_only_by(*THREE)
        assert watch.always_had(*THREE)

        await system.stop_orders("orders-1")
        await follows(mesh, "orders-2", "orders-3", "orders-4")
        await load.answered_only_by("orders-2", "orders-3")
