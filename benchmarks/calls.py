"""Calls through the mesh against raw channels to the same servers, picked round robin with a bare counter.

Each round runs a slice of calls through every arm, in random order: raw, raw again (the A/A control that shows the
noise), and the mesh. Ratios are taken within a round; noise that is slower than a round cancels out.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import grpc.aio
from mesh.v1 import endpoint_pb2, registry_pb2, registry_pb2_grpc
from shop.v1 import inventory_pb2, inventory_pb2_grpc

import mesh_client
from benchmarks.figures import Figure, percentile
from benchmarks.processes import child

SERVICE = "inventory"
SERVERS = 3
P50_GOAL, CPU_GOAL = 1.06, 1.08
REQUEST = inventory_pb2.GetStockRequest(sku="espresso-beans-1kg")
WATCH = inventory_pb2.WatchStockRequest(sku="espresso-beans-1kg")

Operation = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Slice:
    """What one slice of calls cost."""

    p50: float
    """Seconds."""
    p99: float
    cpu: float
    """Seconds of this process's CPU time per call, all its threads."""
    rate: float
    """Calls per second."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a figure's slices are made."""

    name: str
    about: str
    concurrency: int
    calls: int
    """Calls in one slice."""


UNARY = (
    Load("unary.c1", "unary calls, one at a time", 1, 400),
    Load("unary.c16", "unary calls, 16 at a time", 16, 1600),
    Load("unary.c64", "unary calls, 64 at a time", 64, 1920),
)
STREAMS = (
    Load("stream10.c1", "streams of 10 responses, one at a time", 1, 150),
    Load("stream10.c16", "streams of 10 responses, 16 at a time", 16, 480),
)


@dataclass(frozen=True, slots=True)
class Arms:
    """The same operations through raw channels and through the mesh."""

    unary: dict[str, Operation]
    stream: dict[str, Operation]


async def run_slice(operation: Operation, load: Load) -> Slice:
    """Makes one slice of calls."""
    latencies: list[float] = []
    clock = time.perf_counter
    per_worker = load.calls // load.concurrency

    async def work() -> None:
        for _ in range(per_worker):
            started = clock()
            await operation()
            latencies.append(clock() - started)

    gc.collect()
    cpu, wall = time.process_time(), clock()
    await asyncio.gather(*(work() for _ in range(load.concurrency)))
    wall, cpu = clock() - wall, time.process_time() - cpu
    return Slice(percentile(latencies, 0.5), percentile(latencies, 0.99), cpu / len(latencies), len(latencies) / wall)


@asynccontextmanager
async def _arms() -> AsyncIterator[Arms]:
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(child("benchmarks.control_plane_process"))
        servers = [await stack.enter_async_context(child("benchmarks.shop_server")) for _ in range(SERVERS)]
        control = await stack.enter_async_context(grpc.aio.insecure_channel(plane.ready))
        for number, server in enumerate(servers):
            lease = registry_pb2_grpc.RegistryServiceStub(control).Register()
            stack.callback(lease.cancel)
            endpoint = endpoint_pb2.Endpoint(id=f"inventory-{number}", address="127.0.0.1", port=server.ready)
            await lease.write(registry_pb2.RegisterRequest(service=SERVICE, endpoint=endpoint))
            await lease.read()
        mesh = await stack.enter_async_context(mesh_client.connect(plane.ready, cache_dir="", insecure=True))
        channel = mesh.channel(SERVICE)
        while len(mesh.state().services[0].endpoints) < SERVERS:
            await mesh.changed()
        raw = [
            await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{server.ready}"))
            for server in servers
        ]
        yield arms_of(raw, channel)


def arms_of(raw: list[grpc.aio.Channel], channel: grpc.aio.Channel) -> Arms:
    """The operations through raw channels to each server, and through a channel of the mesh."""
    return Arms(
        {"raw": raw_unary(raw), "raw again": raw_unary(raw), "mesh": mesh_unary(channel)},
        {"raw": _raw_stream(raw), "raw again": _raw_stream(raw), "mesh": _mesh_stream(channel)},
    )


def _stub(channel: grpc.aio.Channel) -> Any:
    return inventory_pb2_grpc.InventoryServiceStub(channel)


def raw_unary(channels: list[grpc.aio.Channel]) -> Operation:
    """One call through each of the channels in turn."""
    methods = [_stub(channel).GetStock for channel in channels]
    counter = itertools.count()

    async def call() -> object:
        return await methods[next(counter) % len(methods)](REQUEST)

    return call


def mesh_unary(channel: grpc.aio.Channel) -> Operation:
    """One call through a channel of the mesh."""
    method = _stub(channel).GetStock

    async def call() -> object:
        return await method(REQUEST)

    return call


def _raw_stream(channels: list[grpc.aio.Channel]) -> Operation:
    methods = [_stub(channel).WatchStock for channel in channels]
    counter = itertools.count()

    async def call() -> None:
        async for _ in methods[next(counter) % len(methods)](WATCH):
            pass

    return call


def _mesh_stream(channel: grpc.aio.Channel) -> Operation:
    method = _stub(channel).WatchStock

    async def call() -> None:
        async for _ in method(WATCH):
            pass

    return call


def _figures(load: Load, rounds: list[dict[str, Slice]]) -> list[Figure]:
    def ratio(name: str, field: str, goal: float | None = None) -> Figure:
        values = []
        for arms in rounds:
            raw = (getattr(arms["raw"], field) + getattr(arms["raw again"], field)) / 2
            values.append(getattr(arms["mesh"], field) / raw)
        return Figure.of_rounds(f"{load.name}.{name}", values, "x", f"{load.about}: {name}, mesh / raw", goal)

    def control(name: str, field: str) -> Figure:
        values = [getattr(arms["raw again"], field) / getattr(arms["raw"], field) for arms in rounds]
        return Figure.of_rounds(f"{load.name}.{name}.control", values, "x", f"{load.about}: {name}, raw / raw")

    def absolute(arm: str, field: str, unit: str, factor: float) -> Figure:
        values = [getattr(arms[arm], field) * factor for arms in rounds]
        return Figure.of_rounds(f"{load.name}.{field}.{arm}", values, unit, f"{load.about}: {field}, {arm}")

    return [
        ratio("p50", "p50", P50_GOAL),
        control("p50", "p50"),
        ratio("p99", "p99"),
        control("p99", "p99"),
        ratio("cpu", "cpu", CPU_GOAL),
        control("cpu", "cpu"),
        ratio("rate", "rate"),
        absolute("raw", "p50", "us", 1e6),
        absolute("mesh", "p50", "us", 1e6),
        absolute("raw", "cpu", "us", 1e6),
        absolute("mesh", "cpu", "us", 1e6),
        absolute("mesh", "rate", "1/s", 1),
    ]


async def measure(
    loads: tuple[Load, ...], kind: str, rounds: int, open_arms: Callable[[], AbstractAsyncContextManager[Arms]]
) -> list[Figure]:
    """Figures of so many rounds of each load.

    Args:
        loads: what to measure.
        kind: ``unary`` or ``stream``.
        rounds: of all arms.
        open_arms: starts everything.
    """
    random = Random(1)
    async with open_arms() as arms:
        operations: dict[str, Operation] = getattr(arms, kind)
        for load in loads:  # connections, caches and the allocator warm up
            for operation in operations.values():
                await run_slice(operation, load)
        measured: dict[str, list[dict[str, Slice]]] = {load.name: [] for load in loads}
        for _ in range(rounds):
            for load in loads:
                order = random.sample(list(operations), len(operations))
                measured[load.name].append({arm: await run_slice(operations[arm], load) for arm in order})
    return [figure for load in loads for figure in _figures(load, measured[load.name])]


async def unary(quick: bool) -> list[Figure]:
    """Unary calls, 1, 16 and 64 at a time."""
    return await measure(UNARY, "unary", 5 if quick else 25, _arms)


async def streams(quick: bool) -> list[Figure]:
    """Server streams of 10 responses, 1 and 16 at a time."""
    return await measure(STREAMS, "stream", 5 if quick else 25, _arms)
