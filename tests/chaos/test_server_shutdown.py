from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from shop.v1 import orders_pb2_grpc

import mesh_client
from mesh_client.transport import open_channel
from tests.integration.orders import ORDER, control_plane, published

PATIENCE = 40.0


class Process:
    """An orders server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.target = f"127.0.0.1:{port}"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def entered(self) -> None:
        """Returns when a call is in its handler."""
        assert self.process.stdout is not None
        assert await asyncio.wait_for(self.process.stdout.readline(), PATIENCE) == b"entered\n"

    async def exit_code(self) -> int:
        return await asyncio.wait_for(self.process.wait(), PATIENCE)

    async def log(self) -> str:
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@asynccontextmanager
async def orders_process(**options: Any) -> AsyncIterator[Process]:
    """Started and registered; killed at the end if it has not ended by then."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.chaos.orders_process",
        json.dumps(options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        yield Process(process, int(line))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        assert process.stderr is not None
        await process.stderr.read()


class Load:
    """Calls without pause from several tasks; every call is counted by who answered, or as failed."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._going = True
        self._progress = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.answered: Counter[str] = Counter()
        self.failed: list[grpc.aio.AioRpcError] = []

    async def run(self) -> None:
        while self._going:
            try:
                response = await self._stub.GetOrder(ORDER, wait_for_ready=True, timeout=PATIENCE)
            except grpc.aio.AioRpcError as error:
                self.failed.append(error)
            else:
                self.answered[response.order.taken_by] += 1
            self._progress.set()

    async def until_answered_by(self, *names: str) -> None:
        self.answered.clear()
        async with asyncio.timeout(PATIENCE):
            while not all(self.answered[name] >= 20 for name in names):
                self._progress.clear()
                await self._progress.wait()

    def start(self, callers: int) -> None:
        self._tasks = [asyncio.create_task(self.run()) for _ in range(callers)]

    async def stop(self) -> None:
        """Returns when no call is in flight any more."""
        self._going = False
        await asyncio.gather(*self._tasks)


@asynccontextmanager
async def load(address: str, callers: int = 8) -> AsyncIterator[Load]:
    async with mesh_client.connect(address, cache_dir="") as mesh:
        made = Load(orders_pb2_grpc.OrderServiceStub(mesh.channel("orders")))
        made.start(callers)
        try:
            yield made
        finally:
            await made.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_no_call_fails_when_a_server_under_load_gets_a_signal(number: signal.Signals) -> None:
    async with (
        control_plane() as plane,
        orders_process(control_plane=plane.address, instance_id="leaving", delay=0.02) as leaving,
        orders_process(control_plane=plane.address, instance_id="staying", delay=0.02) as staying,
        load(plane.address) as calls,
    ):
        await calls.until_answered_by("leaving", "staying")
        leaving.send(number)
        assert await leaving.exit_code() == 0
        await calls.until_answered_by("staying")  # and so every answer is here that was on its way when it ended
        await calls.until_answered_by("staying")
        assert set(calls.answered) == {"staying"}
        assert [found.endpoint.id for found in await published(plane.address)] == ["staying"]
        await calls.stop()
        staying.send(number)
        assert await staying.exit_code() == 0
    assert not calls.failed


async def test_a_call_in_flight_longer_than_the_drain_is_finished_in_the_grace() -> None:
    async with control_plane() as plane, orders_process(control_plane=plane.address, delay=1.0) as process:
        async with open_channel(process.target) as channel:
            call = orders_pb2_grpc.OrderServiceStub(channel).GetOrder(ORDER)
            await process.entered()
            process.send(signal.SIGTERM)
            await call
        assert await process.exit_code() == 0


async def test_a_second_signal_stops_at_once_with_1() -> None:
    async with control_plane() as plane, orders_process(control_plane=plane.address, delay=30.0) as process:
        async with open_channel(process.target) as channel:
            call = orders_pb2_grpc.OrderServiceStub(channel).GetOrder(ORDER)
            await process.entered()
            process.send(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                while await published(plane.address):
                    await asyncio.sleep(0.01)
            process.send(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        assert await process.exit_code() == 1
        assert "received SIGTERM again" in await process.log()


async def test_a_server_whose_control_plane_is_gone_stops_cleanly_and_soon() -> None:
    async with AsyncExitStack() as processes:
        async with control_plane() as plane:
            process = await processes.enter_async_context(
                orders_process(control_plane=plane.address, drain_timeout=5.0)
            )
        process.send(signal.SIGTERM)
        assert await process.exit_code() == 0


async def test_a_server_that_is_killed_is_missed_by_nobody_for_long() -> None:
    async with (
        control_plane() as plane,
        orders_process(control_plane=plane.address, instance_id="killed") as killed,
        orders_process(control_plane=plane.address, instance_id="staying") as staying,
        load(plane.address) as calls,
    ):
        await calls.until_answered_by("killed", "staying")
        killed.send(signal.SIGKILL)
        assert await killed.exit_code() == -signal.SIGKILL
        await calls.until_answered_by("staying")
        await calls.stop()
        staying.send(signal.SIGTERM)
        assert await staying.exit_code() == 0
    assert not calls.failed
