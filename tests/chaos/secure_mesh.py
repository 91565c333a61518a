"""A mesh with identities for tests: control plane and servers as real processes, clients and load in the test's own.

async with SecureMesh(tmp_path, leaf_lifetime=3.0) as secure:
    await secure.start_servers("inventory-1", "inventory-2")
    mesh = await secure.connect("gateway")
    async with Load(mesh) as load:
        await secure.rotate(pb.ROTATION_STEP_ADD)
        await load.goes_on(100)
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from mesh.v1 import authority_pb2 as pb
from mesh.v1 import authority_pb2_grpc
from shop.v1.inventory_pb2_grpc import InventoryServiceStub

import mesh_client
from control_plane.identity.operators import create_operator
from mesh_cli.demo.supervisor import Process, Supervisor
from mesh_client import MeshServer
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal
from mesh_client.identity import IdentityState
from mesh_client.mesh import Mesh
from tests.chaos.inventory import GET, SHORT, WATCH_LONG, WATCH_SHORT, make_server
from tests.integration.system import clean_environment
from tests.ports import held_address

PATIENCE = 40.0
"""Seconds that a condition may take to come true on a machine under load."""
SERVICE = "inventory"

_LISTENS = re.compile(r"^mesh control-plane listening on (\S+)$")
_REGISTERED = re.compile(r"^registered on (\d+)$")


class Load:
    """Calls to inventory from entering to leaving: unary ones, short streams among them, and one stream all the time.

    Leaving, and every wait, fails on the first failed call, with the reason that the mesh gives.

    Args:
        mesh: whose channel is called.
        workers: calls at once.
        pause: seconds between two calls of a worker.
        limit: calls of all workers at most.
        stream: whether one stream is to be open all the time.
    """

    def __init__(
        self, mesh: Mesh, *, workers: int = 8, pause: float = 0.0, limit: int = 60_000, stream: bool = True
    ) -> None:
        self._stub = InventoryServiceStub(mesh.channel(SERVICE))
        self._workers = workers
        self._pause = pause
        self._limit = limit
        self._stream = stream
        self._leaving = False
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.done = 0
        """Calls that succeeded."""
        self.streamed = 0
        """Responses of the long stream."""
        self.failures: list[str] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]
        await self.goes_on()
        if self._stream:
            self._tasks.append(asyncio.create_task(self._watch()))
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
        assert not self.failures, f"{len(self.failures)} calls failed beside {self.done}: {self.failures[:3]}"

    async def goes_on(self, calls: int = 50) -> None:
        """Returns when this many more calls have succeeded."""
        await self.reaches(self.done + calls)

    async def reaches(self, calls: int) -> None:
        """Returns when this many calls have succeeded since it began."""
        assert calls <= self._limit
        while self.done < calls:
            self.check()
            await asyncio.wait_for(self._changed.wait(), PATIENCE)
        self.check()

    async def _work(self) -> None:
        for number in range(self._limit // self._workers):
            if self._leaving:
                return
            try:
                if number % 10:
                    await self._stub.GetStock(GET, timeout=10.0)
                else:
                    responses = [each async for each in self._stub.WatchStock(WATCH_SHORT, timeout=10.0)]
                    assert len(responses) == SHORT
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")
            else:
                self.done += 1
            self._changed.set()
            self._changed = asyncio.Event()
            await asyncio.sleep(self._pause)

    async def _watch(self) -> None:
        call = self._stub.WatchStock(WATCH_LONG)
        try:
            async for _ in call:
                self.streamed += 1
                if self._leaving:
                    break
            else:
                self.failures.append("the long stream ended")
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"the long stream: {error.code().name}: {error.details()}")
        finally:
            call.cancel()


class SecureMesh:
    """Runs for the length of an ``async with``; nothing that it started outlives it.

    Args:
        directory: for logs, tokens and the state of the control plane.
        identity: options of the certificate authority.
        options: other options of the control plane.
    """

    def __init__(self, directory: Path, *, options: Mapping[str, Any] | None = None, **identity: Any) -> None:
        self.directory = directory
        self.processes: dict[str, Process] = {}
        self.address = ""
        self._enrolment = ""
        self._data_dir = directory / "control-plane"
        self._identity = identity
        self._options = dict(options or {})
        self._supervisor = Supervisor(directory)
        self._stack = AsyncExitStack()
        self._tokens = 0

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._supervisor)
        try:
            self.address = self._stack.enter_context(held_address())
            self._enrolment = self._stack.enter_context(held_address())
            await self.start_control_plane()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    # -- what runs

    async def start_control_plane(self) -> None:
        """Starts it, or starts it again with what it kept; returns when it listens."""
        told = {
            "address": self.address,
            "enrolment_address": self._enrolment,
            "data_dir": str(self._data_dir),
            "identity": self._identity,
            "debounce_quiet": 0.005,
            **self._options,
        }
        await self._start("control-plane", "control_plane_process", told, _LISTENS)

    async def kill_control_plane(self) -> None:
        """``kill -9``."""
        await self.processes["control-plane"].kill()

    async def start_servers(self, *names: str, service: str = SERVICE, **options: Any) -> None:
        """Servers, each in a process of its own; returns when all are registered."""
        for name in names:
            told = {"service": service, "instance_id": name, **await self.workload(service), **options}
            await self._start(name, "inventory_process", told, _REGISTERED, wait=False)
        await asyncio.gather(*(self.processes[name].wait_ready() for name in names))

    async def stop_server(self, name: str) -> int:
        """SIGTERM, as in a deployment: it drains and leaves; its exit code."""
        return await self.processes.pop(name).stop()

    async def run(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], ready: re.Pattern[str]
    ) -> Process:
        """Any other program that is part of the mesh; returns when it has written its ready line."""
        process = self.processes[name] = await self._supervisor.start(
            name, command, {**clean_environment(), **environment}, ready
        )
        await process.wait_ready()
        return process

    @asynccontextmanager
    async def serving(self, **options: Any) -> AsyncIterator[MeshServer]:
        """A server in the test's own process, whose status can be seen; registered."""
        made = make_server(SERVICE, **await self.workload(SERVICE), **options)
        await made.start()
        try:
            await asyncio.wait_for(made.registered(), PATIENCE)
            yield made
        finally:
            await made.stop(0.0)

    async def connect(self, service: str = "gateway", *, uses: int = 100, **options: Any) -> Mesh:
        """A client in the test's own process that follows inventory and is in sync."""
        told = {**await self.workload(service, uses=uses), "cache_dir": "", "rng": Random(7), **options}
        mesh = await self._stack.enter_async_context(mesh_client.connect(service=service, **told))
        mesh.channel(SERVICE)
        await until(mesh, lambda: mesh.state().in_sync)
        return mesh

    async def workload(self, service: str, *, uses: int = 100) -> dict[str, Any]:
        """What a process of a service is told."""
        async with self.operator() as stub:
            created = await stub.CreateJoinToken(pb.CreateJoinTokenRequest(service=service, uses=uses), timeout=10.0)
        self._tokens += 1
        file = self.directory / f"token-{self._tokens}"
        file.touch(0o600)
        file.write_text(created.token)
        return {
            "control_plane": self.address,
            "enrolment": self._enrolment,
            "token_file": str(file),
            "insecure": False,
        }

    # -- what operators do

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[authority_pb2_grpc.AuthorityServiceAsyncStub]:
        """An operator of the authority, with credentials as new as its files."""
        async with self.operator_channel() as channel:
            yield authority_pb2_grpc.AuthorityServiceStub(channel)

    @asynccontextmanager
    async def operator_channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """The channel of an operator whose credentials are as new as the authority's files."""
        files = create_operator(self._data_dir, "test", self.directory / "operator", now=time.time())
        credentials = grpc.ssl_channel_credentials(
            *(each.read_bytes() for each in (files.roots, files.key, files.chain))
        )
        name = Principal.control_plane(DEFAULT_TRUST_DOMAIN).dns_name
        options = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(self.address, credentials, options=options) as channel:
            yield channel

    async def rotate(
        self, step: pb.RotationStep.ValueType, *, force: bool = False
    ) -> pb.GetCertificateAuthorityResponse:
        """One step of a rotation.

        Raises:
            grpc.aio.AioRpcError: it is refused.
        """
        async with self.operator() as stub:
            request = pb.RotateTrustRootRequest(step=step, force=force)
            return (await stub.RotateTrustRoot(request, timeout=10.0, wait_for_ready=True)).authority

    async def rotate_when_ready(self, step: pb.RotationStep.ValueType) -> pb.GetCertificateAuthorityResponse:
        """The step once it is not refused any more."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return await self.rotate(step)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise
                await asyncio.sleep(0.1)  # what happens in other processes sets no event here

    async def authority(self) -> pb.GetCertificateAuthorityResponse:
        """The certificate authority as operators see it."""
        async with self.operator() as stub:
            return await stub.GetCertificateAuthority(
                pb.GetCertificateAuthorityRequest(), timeout=10.0, wait_for_ready=True
            )

    async def until_authority(
        self, condition: Callable[[pb.GetCertificateAuthorityResponse], bool]
    ) -> pb.GetCertificateAuthorityResponse:
        """The certificate authority, once it is as expected."""
        async with asyncio.timeout(PATIENCE):
            while not condition(found := await self.authority()):
                await asyncio.sleep(0.1)  # what happens in other processes sets no event here
        return found

    # -- within

    async def _start(
        self, name: str, module: str, told: Mapping[str, Any], ready: re.Pattern[str], *, wait: bool = True
    ) -> None:
        command = [sys.executable, "-m", f"tests.chaos.{module}", json.dumps(told)]
        environment = {**clean_environment(), "MESH_CACHE_DIR": str(self.directory / "caches" / name)}
        process = self.processes[name] = await self._supervisor.start(name, command, environment, ready)
        if wait:
            await process.wait_ready()


async def until(mesh: Mesh, condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; it is looked at after each change that the client sees."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await mesh.changed()
    except TimeoutError:
        raise AssertionError(f"it did not come true: {mesh.state()}") from None


def identity_of(process: Mesh | MeshServer) -> IdentityState:
    """A client's or server's identity as it shows it."""
    state = process.state().identity if isinstance(process, Mesh) else process.status().identity
    assert state is not None
    return state


def serials(authority: pb.GetCertificateAuthorityResponse) -> dict[str, str]:
    """The newest certificate of each workload that is no operator, by its id."""
    return {each.id: each.serial for each in authority.workloads if "/service/" in each.spiffe_id}
