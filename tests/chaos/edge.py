"""An edge for tests: `mesh gateway run envoy` as a real process, its policy, and load by REST that must not fail."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
from mesh.v1 import admin_pb2, admin_pb2_grpc
from mesh.v1.edge_service_pb2 import EDGE_OUTCOME_APPLIED

from mesh_cli.demo.supervisor import Process
from tests.chaos.secure_mesh import PATIENCE, SecureMesh
from tests.integration.consul_cluster import REPOSITORY

INVENTORY = "shop.v1.InventoryService"
_READY = re.compile(r"^mesh gateway: edge edge listens on (http://\S+)")
_ENVOY = re.compile(r"Envoy runs as process (\d+)")


class Edge:
    """A gateway with its Envoy.

    Args:
        secure: the mesh that it belongs to.
        directory: its state; the path must be short, for there is a socket in it.
    """

    def __init__(self, secure: SecureMesh, directory: Path) -> None:
        self.secure = secure
        self.directory = directory
        self.url = ""
        self.process: Process | None = None
        self._environment: dict[str, str] = {}

    async def start(self, *arguments: str, wait: bool = True) -> None:
        """Starts it, or starts it again; returns when Envoy obeys the policy."""
        if not self._environment:
            told = await self.secure.workload("edge")
            self._environment = {
                "MESH_CONTROL_PLANE": told["control_plane"],
                "MESH_ENROLMENT": told["enrolment"],
                "MESH_TOKEN_FILE": told["token_file"],
                "MESH_INSECURE": "0",
            }
        protos = REPOSITORY / "protos"
        command = [
            *(sys.executable, "-m", "mesh_cli", "gateway", "run", "envoy", "--concurrency", "1"),
            *("--listen", self.url.removeprefix("http://") or "127.0.0.1:0", "--dir", str(self.directory)),
            *("--drain-time", "2s", "--proto-path", str(protos), *arguments),
            *map(str, sorted((protos / "shop").rglob("*.proto"))),
        ]
        ready = _READY if wait else re.compile("Envoy runs as process")
        self.process = await self.secure.run("edge", command, self._environment, ready)
        if wait:
            match = self.process.ready_line
            assert match is not None
            self.url = match[1]

    def envoys(self) -> list[int]:
        """Process ids of the Envoys that were started so far."""
        assert self.process is not None
        return [int(found) for found in _ENVOY.findall(self.process.log.read_text())]

    async def apply(self, services: Mapping[str, Any]) -> str:
        """Stores the policy that exposes these services; its version."""
        document = json.dumps({"edge": "edge", "services": services})
        async with self.secure.operator_channel() as channel:
            request = admin_pb2.ApplyPolicyRequest(document=document, kind=admin_pb2.POLICY_KIND_EDGE)
            await admin_pb2_grpc.AdminServiceStub(channel).ApplyPolicy(request, timeout=10.0, wait_for_ready=True)
        return (await self.status()).policy_version

    async def status(self) -> admin_pb2.EdgeStatus:
        """The edge as operators see it."""
        async with self.secure.operator_channel() as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            answer = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=10.0, wait_for_ready=True)
        (edge,) = answer.edges
        return edge

    async def until(self, condition: Callable[[admin_pb2.EdgeStatus], bool]) -> admin_pb2.EdgeStatus:
        """The edge as operators see it, once it is as expected."""
        async with asyncio.timeout(PATIENCE):
            while not condition(found := await self.status()):
                await asyncio.sleep(0.05)  # what happens in other processes sets no event here
        return found

    async def obeys(self, version: str) -> None:
        """Returns when the gateway reports that it has applied this version."""
        await self.until(
            lambda edge: any(
                (gateway.report.outcome, gateway.report.applied_version) == (EDGE_OUTCOME_APPLIED, version)
                for gateway in edge.gateways
            )
        )


class RestLoad:
    """Requests to the edge from entering to leaving, over connections that are kept alive.

    Leaving, and every wait, fails on the first failed request, with what the edge said.

    Args:
        url: of the edge.
        workers: connections.
        pause: seconds between two requests of a worker.
    """

    def __init__(self, url: str, *, workers: int = 8, pause: float = 0.0) -> None:
        self._url = f"{url}/v1/stock/beans"
        self._workers = workers
        self._pause = pause
        self._leaving = False
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._session: aiohttp.ClientSession | None = None
        self.done = 0
        """Requests that succeeded."""
        self.failures: list[str] = []

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._workers), timeout=aiohttp.ClientTimeout(total=10.0)
        )
        self._tasks = [asyncio.create_task(self._work(self._session)) for _ in range(self._workers)]
        await self.goes_on()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving = True
        await asyncio.gather(*self._tasks)
        if self._session is not None:
            await self._session.close()
        if kind is None:
            self.check()

    def check(self) -> None:
        """Fails when a request has failed."""
        assert not self.failures, f"{len(self.failures)} requests failed beside {self.done}: {self.failures[:3]}"

    async def goes_on(self, requests: int = 50) -> None:
        """Returns when this many more have succeeded."""
        await self.reaches(self.done + requests)

    async def reaches(self, requests: int) -> None:
        """Returns when this many have succeeded since it began."""
        while self.done < requests:
            self.check()
            await asyncio.wait_for(self._changed.wait(), PATIENCE)
        self.check()

    async def _work(self, session: aiohttp.ClientSession) -> None:
        while not self._leaving:
            try:
                async with session.get(self._url) as response:
                    body = await response.read()
                    if response.status == 200:
                        self.done += 1
                    else:
                        self.failures.append(f"{response.status}: {body.decode(errors='replace')}")
            except (aiohttp.ClientError, TimeoutError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            await asyncio.sleep(self._pause)
