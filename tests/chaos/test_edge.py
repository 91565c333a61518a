"""The edge under load by REST: instances come, drain and go, policies, certificates and processes are replaced."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from mesh.v1 import authority_pb2 as pb
from mesh.v1.edge_service_pb2 import EDGE_OUTCOME_REJECTED

from tests.chaos.edge import INVENTORY, Edge, RestLoad
from tests.chaos.secure_mesh import PATIENCE, SecureMesh, serials
from tests.edge.envoy_process import short_directory

REQUESTS = 20_000
EXPOSED = {INVENTORY: {"upstream": "inventory"}}


@pytest.fixture
def short() -> Iterator[Path]:
    with short_directory() as directory:
        yield directory


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[SecureMesh]:
    async with SecureMesh(tmp_path, leaf_lifetime=600.0) as made:
        yield made


async def answer(url: str) -> tuple[int, str]:
    """Status and body of a GET."""

    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    return await asyncio.to_thread(get)


@pytest.mark.timeout(120)
async def test_no_request_of_20000_fails_while_every_instance_is_replaced_again_and_again(
    secure: SecureMesh, short: Path
) -> None:
    edge = Edge(secure, short)
    await secure.start_servers("inventory-1", "inventory-2", "inventory-3")
    await edge.apply(EXPOSED)
    await edge.start()
    replaced = 0
    async with RestLoad(edge.url) as load:
        while load.done < REQUESTS:
            leaving, coming = f"inventory-{replaced + 1}", f"inventory-{replaced + 4}"
            assert await secure.stop_server(leaving) == 0
            await secure.start_servers(coming)
            replaced += 1
            await load.goes_on(500)
    assert replaced >= 3
    assert len(edge.envoys()) == 1


@pytest.mark.timeout(120)
async def test_no_request_fails_while_certificates_and_the_trust_root_are_replaced_and_envoy_is_not_restarted(
    tmp_path: Path, short: Path
) -> None:
    async with SecureMesh(tmp_path, leaf_lifetime=7.0) as secure:
        edge = Edge(secure, short)
        await secure.start_servers("inventory-1", "inventory-2")
        await edge.apply(EXPOSED)
        await edge.start()
        async with RestLoad(edge.url, workers=4, pause=0.002) as load:
            before = await secure.authority()
            await secure.rotate(pb.ROTATION_STEP_ADD)
            await secure.rotate_when_ready(pb.ROTATION_STEP_OVERLAP)
            retired = await secure.rotate_when_ready(pb.ROTATION_STEP_RETIRE)
            # A new instance is below the new root alone: the edge calls it if it trusts that, and shows what it trusts.
            await secure.start_servers("inventory-3")
            await secure.stop_server("inventory-1")
            await secure.stop_server("inventory-2")
            await load.goes_on(500)
            assert serials(retired).keys() == serials(before).keys(), "a workload joined again"
            assert not set(serials(retired).values()) & set(serials(before).values())
        assert len(edge.envoys()) == 1


@pytest.mark.timeout(120)
async def test_a_policy_is_obeyed_as_it_changes_and_one_that_does_not_fit_leaves_the_last_good_one(
    secure: SecureMesh, short: Path
) -> None:
    edge = Edge(secure, short)
    await secure.start_servers("inventory-1")
    await edge.start()
    assert (await answer(f"{edge.url}/v1/stock/beans"))[0] == 404
    await edge.obeys(await edge.apply(EXPOSED))
    assert await answer(f"{edge.url}/v1/stock/beans") == (200, '{"sku":"beans","available":1}')
    await edge.obeys(await edge.apply({**EXPOSED, "shop.v1.OrderService": {"upstream": "orders"}}))
    status, body = await answer(f"{edge.url}/v1/orders/1")
    assert (status, json.loads(body)["code"]) == (503, 14)
    good = (await edge.status()).policy_version
    bad = await edge.apply({**EXPOSED, "shop.v1.Nothing": {"upstream": "nothing"}})
    seen = await edge.until(lambda found: found.gateways[0].report.outcome == EDGE_OUTCOME_REJECTED)
    report = seen.gateways[0].report
    assert (report.policy_version, report.applied_version) == (bad, good)
    assert "shop.v1.Nothing" in report.detail
    assert (await answer(f"{edge.url}/v1/orders/1"))[0] == 503
    # It goes on to follow the endpoints.
    await secure.start_servers("inventory-2")
    await secure.stop_server("inventory-1")
    assert (await answer(f"{edge.url}/v1/stock/beans"))[0] == 200
    await edge.obeys(await edge.apply(EXPOSED))
    assert (await answer(f"{edge.url}/v1/orders/1"))[0] == 404


@pytest.mark.timeout(120)
async def test_the_edge_goes_on_without_a_control_plane_and_starts_again_without_one(
    secure: SecureMesh, short: Path
) -> None:
    edge = Edge(secure, short)
    await secure.start_servers("inventory-1", "inventory-2")
    await edge.apply(EXPOSED)
    await edge.start()
    async with RestLoad(edge.url, workers=4, pause=0.002) as load:
        await secure.kill_control_plane()
        await load.goes_on(300)
    # The gateway dies, and Envoy with it, for nobody else would tell it what changes. Both come back by what they had.
    (before,) = edge.envoys()
    assert edge.process is not None
    await edge.process.kill()
    async with asyncio.timeout(PATIENCE):
        while Path(f"/proc/{before}/exe").exists():
            await asyncio.sleep(0.01)
    await edge.start(wait=False)
    async with asyncio.timeout(PATIENCE):
        while (await asyncio.to_thread(listens, edge.url)) != 200:
            await asyncio.sleep(0.05)
    async with RestLoad(edge.url, workers=4, pause=0.002) as load:
        await load.goes_on(100)
        await secure.start_control_plane()
        await secure.start_servers("inventory-3")
        await secure.stop_server("inventory-1")
        await secure.stop_server("inventory-2")
        await load.goes_on(300)
    assert len(edge.envoys()) == 2


def listens(url: str) -> int:
    """Status of a request; 0 while nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/v1/stock/beans", timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.timeout(120)
async def test_a_gateway_that_is_asked_to_stop_lets_its_callers_finish_and_leaves_nothing(
    secure: SecureMesh, short: Path
) -> None:
    edge = Edge(secure, short)
    await secure.start_servers("inventory-1")
    await edge.apply(EXPOSED)
    await edge.start("--drain-time", "15s")
    (envoy,) = edge.envoys()
    assert edge.process is not None
    async with RestLoad(edge.url, workers=2, pause=0.01) as load:
        stopping = asyncio.create_task(edge.process.stop())
        await load.goes_on(20)
        load._leaving = True
        assert await stopping == 0
    assert not Path(f"/proc/{envoy}/exe").exists()
    assert not (short / "admin.sock").exists()
