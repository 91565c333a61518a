"""The whole mesh on one real Consul, with instances as real processes, under load. No call may fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from mesh.v1 import admin_pb2, registry_pb2, registry_pb2_grpc
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from control_plane.server import ControlPlane
from mesh_client.core.model import Health
from mesh_client.core.policy import ServicePolicy
from mesh_client.mesh import Mesh
from mesh_client.mesh_server import MeshServer
from mesh_client.transport import open_channel
from tests.integration.consul_cluster import ConsulCluster
from tests.integration.system import (
    ORDER,
    PATIENCE,
    Load,
    System,
    follows,
    ids,
    orders_of,
    sees,
    status_in_which,
    store_policy,
    until,
)

THREE = ids(1, 2, 3)
METHOD = "shop.v1.OrderService/GetOrder"


@pytest.fixture
async def consul(tmp_path: Path) -> AsyncIterator[ConsulCluster]:
    async with ConsulCluster.dev(tmp_path) as consul:
        yield consul


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


@pytest.fixture
async def plane(system: System, consul: ConsulCluster) -> ControlPlane:
    plane = await system.run_control_plane(registry=consul.registry)
    await system.start_orders(*THREE, registry=consul.registry, control_plane=plane.address)
    return plane


@pytest.fixture
async def mesh(system: System, plane: ControlPlane) -> Mesh:
    mesh = await system.connect(plane.address)
    await follows(mesh, *THREE)
    return mesh


async def everybody_obeys(plane: ControlPlane, mesh: Mesh) -> None:
    """Returns when every client, those inside the servers included, has acknowledged the policy that this one has."""
    version = orders_of(mesh).policy_version
    await status_in_which(
        plane.address,
        lambda status: all(
            each.acknowledged_version == version for each in policy_subscriptions(status) if each.service == "orders"
        ),
    )


def policy_subscriptions(status: admin_pb2.GetStatusResponse) -> list[admin_pb2.SubscriptionStatus]:
    return [each for client in status.clients for each in client.subscriptions if each.type == 1]


def outstanding(mesh: Mesh, id: str) -> int:
    return next(each.outstanding for each in orders_of(mesh).endpoints if each.id == id)


async def listed(consul: ConsulCluster) -> set[str]:
    """Ids of the instances that Consul lists."""
    return {each["Service"]["ID"] for each in await consul.request("GET", "/v1/health/service/orders")}


async def obeys_another(mesh: Mesh, consul: ConsulCluster, document: str) -> None:
    before = orders_of(mesh).policy_version
    await store_policy(consul, document)
    await until(mesh, lambda: orders_of(mesh).policy_version != before)


def balanced_by(algorithm: str) -> str:
    """A policy by which every endpoint counts, even one whose checks a busy machine has held up."""
    balancer = f"load_balancer: {{algorithm: {algorithm}, panic_threshold: 100}}"
    return f"service: orders\n{balancer}\noutlier_detection: {{enabled: false}}"


async def answers_alone(mesh: Mesh, load: Load) -> str:
    """Who answers the next calls; another one only answers what is retried, which goes elsewhere by design."""
    before = orders_of(mesh).retries
    answers = await load.goes_on(60)
    ((chosen, count),) = answers.most_common(1)
    assert answers.total() - count <= orders_of(mesh).retries - before
    return chosen


@asynccontextmanager
async def serving_payments(**options: Any) -> AsyncIterator[MeshServer]:
    payments = mesh_client.server("payments", **options)
    await payments.start()
    try:
        yield payments
    finally:
        await payments.stop()


async def test_an_instance_is_called_while_its_check_passes(
    system: System, consul: ConsulCluster, plane: ControlPlane, mesh: Mesh
) -> None:
    # Without ejections by the client only Consul's word takes an endpoint out.
    await obeys_another(
        mesh, consul, "service: orders\nretry: {per_try_timeout: 1s}\noutlier_detection: {enabled: false}"
    )
    async with Load(mesh) as load:
        await load.answered_by(*THREE)

        system.orders["orders-2"].freeze()  # its TTL passes
        await sees(mesh, Health.UNHEALTHY, "orders-2")
        await load.answered_only_by("orders-1", "orders-3")
        while outstanding(mesh, "orders-2"):
            await load.goes_on(1)  # attempts made before have their timeout to pass
        for _ in range(20):
            await load.goes_on(5)
            assert not outstanding(mesh, "orders-2")

        system.orders["orders-2"].thaw()
        await sees(mesh, Health.HEALTHY, *THREE)
        await load.answered_by("orders-2")

        await system.orders["orders-3"].kill()
        await sees(mesh, Health.UNHEALTHY, "orders-3")
        await load.answered_only_by("orders-1", "orders-2")

        await system.stop_orders("orders-1")
        await follows(mesh, "orders-2", "orders-3")
        async with asyncio.timeout(PATIENCE):  # the agent tells the catalog a moment later
            while await listed(consul) != {"orders-2", "orders-3"}:
                await asyncio.sleep(0.02)
        await load.answered_only_by("orders-2")


async def test_every_instance_is_replaced(
    system: System, consul: ConsulCluster, plane: ControlPlane, mesh: Mesh
) -> None:
    async with Load(mesh) as load:
        for number in (1, 2, 3):
            await system.start_orders(f"orders-{number + 3}", registry=consul.registry, control_plane=plane.address)
            await system.stop_orders(f"orders-{number}")
        await follows(mesh, *ids(4, 5, 6))
        await load.answered_only_by(*ids(4, 5, 6))


async def test_a_drained_instance_that_registers_again_in_place_is_called_again(
    system: System, plane: ControlPlane, consul: ConsulCluster, mesh: Mesh
) -> None:
    target = next(each.target for each in orders_of(mesh).endpoints if each.id == "orders-2")
    async with Load(mesh) as load, open_channel(plane.address) as channel:
        drain = registry_pb2.DrainRequest(service="orders", endpoint_id="orders-2")
        assert (await registry_pb2_grpc.RegistryServiceStub(channel).Drain(drain)).complete
        await load.answered_only_by("orders-1", "orders-3")

        # The next process takes over id, address and registration, which Consul has listed as passing all the time.
        await system.orders["orders-2"].kill()
        options = {"address": target, "registry": consul.registry, "control_plane": plane.address}
        await system.start_orders("orders-2", **options)
        await load.answered_by("orders-2")


async def test_policies_take_effect_while_everything_runs_and_a_bad_one_does_not(
    system: System, consul: ConsulCluster, plane: ControlPlane, mesh: Mesh
) -> None:
    obeyed: list[ServicePolicy] = []
    stop_watching = mesh.watch_policy("payments", obeyed.append)
    async with serving_payments(registry=consul.registry, control_plane=plane.address) as payments, Load(mesh) as load:
        await obeys_another(mesh, consul, balanced_by("RING_HASH"))
        good = orders_of(mesh).policy_version
        await load.goes_on(20)
        chosen = await answers_alone(mesh, load)  # hashed by this host's address

        for bad, path in (
            ("service: orders\nretry: {max_attempts: many}", "retry.max_attempts"),
            ("service: payments", "service"),
            ("{", ""),
            ("service: orders\n#" + "x" * 300_000, ""),
        ):
            await store_policy(consul, bad)
            status = await status_in_which(
                plane.address,
                lambda status, path=path: any(  # type: ignore[misc]  # mypy cannot infer lambdas with defaults
                    path in (error.path for error in problem.errors) for problem in status.policy_problems
                ),
            )
            assert [(each.service, each.obeyed_version) for each in status.policy_problems] == [("orders", good)]
            assert orders_of(mesh).policy_version == good
            assert await answers_alone(mesh, load) == chosen

        await consul.put_key("mesh/policies/payments", b"service: payments\ntimeout: 7s")
        await until(mesh, lambda: bool(obeyed) and obeyed[-1].timeout == 7.0)
        stop_watching()
        await payments.stop()

        await obeys_another(mesh, consul, balanced_by("ROUND_ROBIN"))
        await status_in_which(plane.address, lambda status: not status.policy_problems)
        await load.goes_on(20)
        earlier = orders_of(mesh).retries
        spread = await load.goes_on(90)
        retries = orders_of(mesh).retries - earlier
        assert max(spread.values()) - min(spread.values()) <= 12 + 2 * retries  # 12: those in flight at both ends

    limited = f"rate_limits: [{{method: {METHOD}, requests_per_second: 0.001, burst: 2, scope: ALL}}]"
    await obeys_another(mesh, consul, f"service: orders\ncircuit_breaker: {{enabled: false}}\n{limited}")
    await everybody_obeys(plane, mesh)
    stub = OrderServiceStub(mesh.channel("orders"))
    calls = await asyncio.gather(*(stub.GetOrder(ORDER, timeout=PATIENCE) for _ in range(20)), return_exceptions=True)
    refused = [call for call in calls if isinstance(call, grpc.aio.AioRpcError)]
    assert len(calls) - len(refused) == 6, "three servers take two calls each"
    assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}

    before = orders_of(mesh).policy_version
    await consul.delete_key("mesh/policies/orders")
    await until(mesh, lambda: orders_of(mesh).policy_version != before)
    await everybody_obeys(plane, mesh)
    async with Load(mesh) as load:
        await load.answered_by(*THREE)
