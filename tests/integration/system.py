"""A whole mesh for tests: control planes, orders instances as real processes, clients, and load that must not fail.

async with System(tmp_path) as system:
    plane = await system.start_control_plane()
    await system.start_orders("orders-1", "orders-2", control_plane=plane.address)
    mesh = await system.connect(plane.address)
    async with Load(mesh) as load:
        await system.orders["orders-1"].kill()
        await load.answered_by("orders-2")
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import grpc.aio
from mesh.v1 import admin_pb2, admin_pb2_grpc
from shop.v1 import orders_pb2
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from control_plane.options import ControlPlaneOptions
from control_plane.server import ControlPlane
from mesh_cli.demo.supervisor import Process, Supervisor
from mesh_client.core.model import Health
from mesh_client.mesh import Mesh
from mesh_client.mesh_state import ServiceState
from mesh_client.transport import open_channel
from tests.integration.consul_cluster import REPOSITORY, ConsulCluster
from tests.ports import held_address

PATIENCE = 40.0
"""Seconds that a condition may take to come true on a machine under load."""
ORDER = orders_pb2.GetOrderRequest(order_id="1")
CHECK_INTERVAL = 0.3
"""Seconds between self-checks of instances. Their TTL checks with Consul last three times that and a second."""
READER = (
    'service_prefix "" { policy = "read" }\nnode_prefix "" { policy = "read" }\n'
    'key_prefix "mesh/policies/" { policy = "read" }\nkey_prefix "mesh/edge-policies/" { policy = "read" }'
)
"""What a control plane needs of Consul."""

_READY = re.compile(r"^mesh control-plane listening on (\S+)$")
_REGISTERED = re.compile(r"^(\d+)$")


class Load:
    """Calls to orders, one after the other from each of some workers, from entering to leaving.

    Leaving, and every wait, fails on the first failed call, with the reason that the mesh gives.

    Args:
        mesh: whose channel is called.
        workers: calls at once.
        pause: seconds between two calls of a worker.
        timeout: seconds that a call has.
        limit: calls of each worker at most.
    """

    def __init__(
        self, mesh: Mesh, *, workers: int = 6, pause: float = 0.004, timeout: float = 10.0, limit: int = 20_000
    ) -> None:
        self._stub = OrderServiceStub(mesh.channel("orders"))
        self._workers = workers
        self._pause = pause
        self._timeout = timeout
        self._limit = limit
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False
        self._changed = asyncio.Event()
        self.answers: Counter[str] = Counter()
        """Calls that succeeded, by who answered."""
        self.failures: list[str] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]
        await self.goes_on()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving = True
        await asyncio.gather(*self._tasks)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Fails when a call has failed."""
        assert not self.failures, f"{len(self.failures)} of {self.answers.total()} calls failed: {self.failures[:3]}"

    async def goes_on(self, calls: int = 60) -> Counter[str]:
        """Returns when this many more calls have succeeded: who answered them."""
        before = self.answers.copy()
        await self._until(lambda: self.answers.total() >= before.total() + calls)
        return self.answers - before

    async def answered_by(self, *names: str) -> None:
        """Returns when each of these has answered from now on."""
        before = self.answers.copy()
        await self._until(lambda: all(self.answers[name] > before[name] for name in names))

    async def answered_only_by(self, *names: str, calls: int = 60) -> None:
        """Fails when of the next calls, made from now on, another answers; and when one of these does not at all."""
        await self.goes_on(2 * self._workers)  # what is in flight now was balanced before
        assert set(await self.goes_on(calls)) <= set(names)
        await self.answered_by(*names)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.check()
                await self._changed.wait()
        self.check()

    async def _work(self) -> None:
        for _ in range(self._limit):
            if self._leaving:
                return
            try:
                response = await self._stub.GetOrder(ORDER, timeout=self._timeout)
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")
            else:
                self.answers[response.order.taken_by] += 1
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            await asyncio.sleep(self._pause)


class Watch:
    """Which endpoints of orders a client held at each change, from entering to leaving."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._task: asyncio.Task[None] | None = None
        self.seen: list[frozenset[str]] = []

    async def __aenter__(self) -> Self:
        self._note()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def always_had(self, *ids: str) -> bool:
        """Whether these were there all the time."""
        return all(seen >= set(ids) for seen in self.seen)

    def _note(self) -> None:
        self.seen.append(frozenset(endpoint.id for endpoint in orders_of(self._mesh).endpoints))

    async def _watch(self) -> None:
        while True:
            await self._mesh.changed()
            self._note()


class ControlPlaneProcess:
    """``mesh control-plane`` as a process.

    Attributes:
        address: ``host:port`` where it listens; a restarted one listens there again.
    """

    def __init__(self, start: Callable[[str], Awaitable[Process]], address: str) -> None:
        self._start = start
        self._process: Process | None = None
        self.address = address

    async def start(self) -> None:
        """Starts it, or starts it again; returns when it listens."""
        self._process = await self._start(self.address)
        await self._process.wait_ready()

    async def kill(self) -> None:
        """``kill -9``."""
        assert self._process is not None
        await self._process.kill()


class System:
    """Runs for the length of an ``async with``; nothing that it started outlives it.

    Args:
        directory: for logs, caches and the state of control planes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.orders: dict[str, Process] = {}
        """Every instance of orders that was started, by id."""
        self._supervisor = Supervisor(directory)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._supervisor)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    async def run_control_plane(self, **options: Any) -> ControlPlane:
        """A control plane in this process, that publishes changes at once."""
        options = {"debounce_quiet": 0.005, "debounce_maximum": 0.05, **options}
        plane = ControlPlane(ControlPlaneOptions(**{"insecure": True, **options}))
        await plane.start()
        self._stack.push_async_callback(plane.stop, 0.0)
        return plane

    async def start_control_plane(
        self, *arguments: str, name: str = "control-plane", registry: str = "embedded"
    ) -> ControlPlaneProcess:
        """``mesh control-plane`` in a process of its own; what it keeps outlives its restarts."""

        async def start(listen: str) -> Process:
            options = ["--listen", listen, "--registry", registry, "--data-dir", str(self.directory / name)]
            command = [sys.executable, "-m", "mesh_cli", "control-plane", *options, *arguments]
            return await self._supervisor.start(name, command, self._environment(name), _READY)

        plane = ControlPlaneProcess(start, self._stack.enter_context(held_address()))
        await plane.start()
        return plane

    async def start_orders(self, *names: str, token: str = "", **options: Any) -> None:
        """Instances of orders, each in a process of its own; returns when all are registered.

        Args:
            names: their ids.
            token: for Consul.
            options: as for `mesh_client.server`.
        """
        started = [await self._start_orders(name, token, options) for name in names]
        await asyncio.gather(*(process.wait_ready() for process in started))

    async def stop_orders(self, *names: str) -> None:
        """Has instances leave as in a deployment, by SIGTERM; each must end cleanly."""
        codes = await asyncio.gather(*(self.orders[name].stop() for name in names))
        assert not any(codes), "\n".join(self.orders[name].tail() for name in names)

    async def connect(self, control_plane: str | Sequence[str], **options: Any) -> Mesh:
        """A client, by default without a disk cache and with a seed."""
        options = {"cache_dir": "", "rng": Random(7), **options}
        return await self._stack.enter_async_context(mesh_client.connect(control_plane, **options))

    async def _start_orders(self, name: str, token: str, options: dict[str, Any]) -> Process:
        options = {"instance_id": name, "check_interval": CHECK_INTERVAL, "drain_timeout": 5.0, **options}
        command = [sys.executable, "-m", "tests.chaos.orders_process", json.dumps(options)]
        environment = self._environment(name) | ({"CONSUL_HTTP_TOKEN": token} if token else {})
        process = self.orders[name] = await self._supervisor.start(name, command, environment, _REGISTERED)
        return process

    def _environment(self, name: str) -> dict[str, str]:
        return {**clean_environment(), "MESH_CACHE_DIR": str(self.directory / "caches" / name)}


def clean_environment() -> dict[str, str]:
    """This process's environment without what would steer the mesh, for processes that import the tests."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MESH_", "CONSUL_"))}
    return {**inherited, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(REPOSITORY), "MESH_INSECURE": "1"}


def orders_of(mesh: Mesh) -> ServiceState:
    """What a client, which follows orders, knows of it."""
    return next(state for state in mesh.state().services if state.service == "orders")


async def until(mesh: Mesh, condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; it is looked at after each change that the client sees."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await mesh.changed()
    except TimeoutError:
        raise AssertionError(f"it did not come true: {mesh.state()}") from None


async def follows(mesh: Mesh, *ids: str) -> None:
    """Returns when the client, which follows orders from now on, is in sync and has exactly these endpoints."""
    mesh.channel("orders")
    await until(mesh, lambda: mesh.state().in_sync and {each.id for each in orders_of(mesh).endpoints} == set(ids))


async def sees(mesh: Mesh, health: Health, *ids: str) -> None:
    """Returns when the client sees exactly these endpoints of orders in this state."""
    await until(mesh, lambda: {each.id for each in orders_of(mesh).endpoints if each.health is health} == set(ids))


@asynccontextmanager
async def administration(address: str) -> AsyncIterator[admin_pb2_grpc.AdminServiceAsyncStub]:
    """The operators' side of a control plane."""
    async with open_channel(address) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


async def status_in_which(
    address: str, condition: Callable[[admin_pb2.GetStatusResponse], bool]
) -> admin_pb2.GetStatusResponse:
    """The status of a control plane, once it is as expected. What another process does cannot set an event here."""
    async with administration(address) as admin:
        # A channel that was refused while it was away would say so again for a while.
        answer = await admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=PATIENCE, wait_for_ready=True)
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition(answer):
                    await asyncio.sleep(0.02)
                    answer = await admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0)
        except TimeoutError:
            raise AssertionError(f"it did not come true: {answer}") from None
        return answer


def source_of(status: admin_pb2.GetStatusResponse) -> admin_pb2.SourceStatus:
    """How the control plane reads its registry."""
    return next(source for source in status.sources if source.name in ("consul", "embedded"))


async def store_policy(consul: ConsulCluster, document: str) -> None:
    """Writes a policy of orders straight into Consul, past every check."""
    await consul.put_key("mesh/policies/orders", document.encode())


async def mesh_command(*arguments: str, control_plane: str, exit_code: int = 0) -> str:
    """What a ``mesh`` command prints; it must end with the exit code."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "mesh_cli", *arguments, "--control-plane", control_plane),
        env={**clean_environment(), "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == exit_code, errors.decode()
    return output.decode()


def ids(*numbers: int) -> list[str]:
    """Ids of instances of orders."""
    return [f"orders-{number}" for number in numbers]
