"""New processes that start without a control plane, from what an earlier one left on disk."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from shop.v1.orders_pb2_grpc import add_OrderServiceServicer_to_server

from tests.integration.orders import Orders
from tests.integration.system import PATIENCE, ControlPlaneProcess, System, clean_environment, ids
from tests.ports import held_address

TWO = ids(1, 2)


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    async with System(tmp_path) as system:
        yield system


class Client:
    """A client process with the disk cache of its predecessors."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, plane: ControlPlaneProcess, cache: Path, **options: Any) -> Client:
        """Starts it; returns when it is about to call."""
        options = {"calls": 40, "wait_for_ready": False, "synced": False, **options}
        options |= {"control_plane": plane.address, "cache_dir": str(cache)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.chaos.client_process", json.dumps(options)),
            env=clean_environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"calling\n"
        return cls(process)

    async def end(self) -> tuple[dict[str, int], list[str], str]:
        """Once it has ended: its answers by instance, the reasons of its failures, and its log."""
        async with asyncio.timeout(PATIENCE):
            output, log = await self._process.communicate()
        result = json.loads(output)
        return result["answers"], result["failures"], log.decode()


@asynccontextmanager
async def impostor(address: str) -> AsyncIterator[None]:
    """Somebody else listens where an endpoint was."""
    server = grpc.aio.server()
    add_OrderServiceServicer_to_server(Orders("impostor"), server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


async def test_a_new_process_starts_from_disk_and_from_nothing_else_while_a_control_plane_answers(
    system: System, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    plane = await system.start_control_plane()
    # Held, so that nobody else gets the port between the instance's end and the impostor's start.
    with held_address() as address:
        await starts_from_disk(system, plane, cache, address)


async def starts_from_disk(system: System, plane: ControlPlaneProcess, cache: Path, address: str) -> None:
    """With orders-1 at this address, at which an impostor listens when it has gone."""
    await system.start_orders("orders-1", control_plane=plane.address, address=address)
    await system.start_orders("orders-2", control_plane=plane.address)
    answers, failures, _ = await (await Client.start(plane, cache, synced=True)).end()
    assert set(answers) == set(TWO)
    assert failures == []
    (snapshot,) = cache.iterdir()
    saved = snapshot.read_bytes()

    # No control plane: what is on disk counts, also when one of its endpoints has died since.
    await plane.kill()
    await system.orders["orders-2"].kill()
    answers, failures, log = await (await Client.start(plane, cache)).end()
    assert answers == {"orders-1": 40}
    assert failures == []
    assert "cannot be reached" in log

    # A control plane answers: what is on disk does not count, though somebody listens there.
    await plane.start()
    await system.start_orders("orders-3", control_plane=plane.address)
    await system.stop_orders("orders-1")
    async with impostor(address):
        snapshot.write_bytes(saved)
        answers, failures, _ = await (await Client.start(plane, cache)).end()
        assert answers == {"orders-3": 40}
        assert failures == []


async def test_a_damaged_cache_is_set_aside_and_calls_fail_or_wait_with_a_reason(
    system: System, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    plane = await system.start_control_plane()
    await system.start_orders(*TWO, control_plane=plane.address)
    await (await Client.start(plane, cache, synced=True)).end()
    (snapshot,) = cache.iterdir()
    await plane.kill()

    damaged = bytearray(snapshot.read_bytes())
    damaged[-1] ^= 1
    snapshot.write_bytes(damaged)
    answers, failures, log = await (await Client.start(plane, cache, calls=2)).end()
    assert answers == {}
    assert len(failures) == 2
    assert all(each.startswith("UNAVAILABLE: ") for each in failures)
    assert all("the control plane was never reached and nothing is cached" in each for each in failures)
    assert all(plane.address in each for each in failures)
    assert f"snapshot cache {snapshot} is damaged and set aside" in log
    assert snapshot.with_suffix(".damaged").read_bytes() == damaged

    # A call that may wait is made as soon as there is a control plane; nothing is left of the damage.
    client = await Client.start(plane, cache, wait_for_ready=True, synced=True)
    await plane.start()
    answers, failures, log = await client.end()
    assert set(answers) == set(TWO)
    assert failures == []
    assert "damaged" not in log
    assert snapshot.exists()
