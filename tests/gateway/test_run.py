"""`mesh gateway run kong` as processes: two gateways of one Kong, a control plane, a Consul."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import admin_pb2, admin_pb2_grpc, registry_pb2, registry_pb2_grpc
from mesh.v1.edge_service_pb2 import EDGE_OUTCOME_APPLIED, EDGE_OUTCOME_FAILED, EDGE_OUTCOME_STANDBY

from mesh_cli.demo.supervisor import Process, Supervisor
from tests.gateway.kong_server import KongServer, running_kong
from tests.integration.consul_cluster import REPOSITORY, ConsulCluster
from tests.integration.mesh_rig import Rig, open_rig
from tests.integration.system import clean_environment

PATIENCE = 30.0
POLICY = {"edge": "edge", "services": {"shop.v1.OrderService": {"upstream": "orders"}}, "accept": ["int64"]}
_FOLLOWS = re.compile("the policy of edge edge is version")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path / "control-plane") as made:
        yield made


@pytest.fixture
async def kong() -> AsyncIterator[KongServer]:
    async with running_kong() as made:
        yield made


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with Supervisor(tmp_path) as made:
        yield made


async def gateway(
    name: str, supervisor: Supervisor, rig: Rig, kong: KongServer, *arguments: str, ready: re.Pattern[str] = _FOLLOWS
) -> Process:
    protos = REPOSITORY / "protos"
    command = [
        *(sys.executable, "-m", "mesh_cli", "gateway", "run", "kong", "--admin", kong.address),
        *("--dir", str(supervisor.directory / name), "--protos", str(supervisor.directory / "protos")),
        *("--control-plane", rig.plane.address, "--proto-path", str(protos), *arguments),
        *map(str, sorted((protos / "shop").rglob("*.proto"))),
    ]
    process = await supervisor.start(name, command, clean_environment(), ready)
    await process.wait_ready()
    return process


async def outcomes(rig: Rig) -> list[int]:
    """What each gateway has reported."""
    answer = await admin_pb2_grpc.AdminServiceStub(rig.control).GetStatus(admin_pb2.GetStatusRequest())
    return sorted(gateway.report.outcome for edge in answer.edges for gateway in edge.gateways)


async def until_outcomes(rig: Rig, *wanted: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while await outcomes(rig) != sorted(wanted):
            await asyncio.sleep(0.05)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


async def drain(rig: Rig, endpoint_id: str) -> registry_pb2.DrainResponse:
    request = registry_pb2.DrainRequest(service="orders", endpoint_id=endpoint_id, timeout=Duration(seconds=20))
    return await registry_pb2_grpc.RegistryServiceStub(rig.control).Drain(request)


async def expose(rig: Rig) -> None:
    request = admin_pb2.ApplyPolicyRequest(document=json.dumps(POLICY), kind=admin_pb2.POLICY_KIND_EDGE)
    await admin_pb2_grpc.AdminServiceStub(rig.control).ApplyPolicy(request)


@pytest.mark.timeout(120)
async def test_of_two_gateways_one_tells_kong_and_when_it_stops_the_other_does(
    rig: Rig, kong: KongServer, supervisor: Supervisor, tmp_path: Path
) -> None:
    await rig.register("orders", "a", 1)
    await rig.register("orders", "b", 2)
    await rig.register("orders", "c", 3)
    await expose(rig)
    async with ConsulCluster.dev(tmp_path / "consul") as consul:
        registry = ("--registry", consul.registry)
        first = await gateway("edge-1", supervisor, rig, kong, *registry)
        await until_outcomes(rig, EDGE_OUTCOME_APPLIED)
        second = await gateway("edge-2", supervisor, rig, kong, *registry)
        await until_outcomes(rig, EDGE_OUTCOME_APPLIED, EDGE_OUTCOME_STANDBY)
        assert kong.targets("orders") == ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
        loads = len(kong.loads)
        answer = await drain(rig, "a")
        assert (answer.complete, answer.acknowledged) == (True, 2)
        assert kong.targets("orders") == ["127.0.0.1:2", "127.0.0.1:3"]
        assert len(kong.loads) == loads + 1
        assert await first.stop() == 0
        answer = await drain(rig, "b")
        assert (answer.complete, answer.acknowledged) == (True, 1)
        assert kong.targets("orders") == ["127.0.0.1:3"]
        await until_outcomes(rig, EDGE_OUTCOME_APPLIED)
        assert await second.stop() == 0


@pytest.mark.timeout(120)
async def test_without_consul_each_gateway_tells_kong_and_a_kong_that_is_down_is_seen_in_status(
    rig: Rig, kong: KongServer, supervisor: Supervisor
) -> None:
    await rig.register("orders", "a", 1)
    await expose(rig)
    served = re.compile(r"^mesh gateway: edge edge is served by the Kong at http://127\.0\.0\.1:\d+$")
    process = await gateway("edge-1", supervisor, rig, kong, ready=served)
    assert kong.targets("orders") == ["127.0.0.1:1"]
    await kong.stop()
    await rig.register("orders", "b", 2)
    await until_outcomes(rig, EDGE_OUTCOME_FAILED)
    kong.restart()
    await kong.start(kong.port)
    await until(lambda: kong.targets("orders") == ["127.0.0.1:1", "127.0.0.1:2"])
    await until_outcomes(rig, EDGE_OUTCOME_APPLIED)
    assert await process.stop() == 0
