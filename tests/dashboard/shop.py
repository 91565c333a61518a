"""A secure control plane with a dashboard, and a shop that it watches: real processes, and load on them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from mesh.v1 import admin_pb2, discovery_pb2, operations_pb2, telemetry_pb2_grpc
from shop.v1 import orders_pb2
from shop.v1.orders_pb2_grpc import OrderServiceStub

import mesh_client
from mesh_cli.client import AdminClient
from mesh_cli.demo.identity import Identities
from mesh_cli.demo.supervisor import Process, Supervisor
from mesh_client.telemetry_convert import requests_of
from mesh_client.transport import CONTROL_PLANE
from tests import leaks
from tests.control_plane.load_reports import Process as Reporter
from tests.control_plane.otlp import export, otlp_request, otlp_span
from tests.dashboard.browser import eventually, guarded
from tests.ports import held_address

CALLER = "web"
EDGE = "edge"
"""Calls too, and reports none of it."""
COUNTS = {"orders": 2, "inventory": 1, "payments": 1}
REPORTS_EVERY = "200ms"
PAUSE = 0.05
"""Seconds between two orders."""
TIMEOUT = 20.0

_SERVES = re.compile(r"serves on (127\.0\.0\.1:\d+)")

Result = TypeVar("Result")


class Shop:
    """Runs in a thread of its own, so that tests may wait for the browser."""

    def __init__(self, directory: Path, addresses: tuple[str, str, str, str]) -> None:
        self.directory = directory
        self.address, self.enrolment_address, self.dashboard_address, self.otlp_address = addresses
        self.identities = Identities(directory)
        self.processes: dict[str, Process] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shop")
        self._thread.start()
        self._supervisor = Supervisor(directory)
        self._control_plane: subprocess.Popen[bytes] | None = None
        self._load: asyncio.Task[None] | None = None
        self._mesh: mesh_client.Mesh | None = None
        self._edge: mesh_client.Mesh | None = None

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Does something in the shop's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60.0)

    def link(self) -> str:
        """A link to the dashboard, as `mesh dashboard` gets it."""
        with AdminClient([self.address], TIMEOUT, self.identities.credentials()) as client:
            request = operations_pb2.CreateDashboardLinkRequest()
            return client.call(client.operations.CreateDashboardLink, request).url

    def start_control_plane(self) -> None:
        """Starts it, or starts it again where it was."""
        command = [
            *(sys.executable, "-m", "mesh_cli", "control-plane", "--data-dir", str(self.directory / "state")),
            *("--listen", self.address, "--enrol-listen", self.enrolment_address),
            *("--dashboard-listen", self.dashboard_address, "--otlp-listen", self.otlp_address),
        ]
        # By no event loop: its process, and what waits for it, would outlive the test that restarts it.
        with (self.directory / "control-plane.log").open("ab") as log:
            before = log.tell()
            self._control_plane = subprocess.Popen(guarded(*command), stdout=log, stderr=log, env=_inherited())
        leaks.keep(self._control_plane.pid)
        eventually(lambda: "mesh control-plane listening on " in self.log("control-plane", before))

    def start(self, service: str, number: int) -> None:
        """Starts one instance."""
        environment = {
            **self._client_environment(service),
            "MESH_REGISTRY": "control-plane",
            "MESH_TRACING": "1",
            "MESH_CACHE_DIR": str(self.directory / "cache" / f"{service}-{number}"),
            "SHOP_DATABASE": str(self.directory / f"{service}.sqlite"),
            "SHOP_INSTANCE": f"{service}-{number}",
        }
        name, command = f"{service}-{number}", [sys.executable, "-m", f"services.{service}"]
        self.processes[name] = self.run(self._start(name, command, environment, _SERVES))

    def kill_control_plane(self) -> None:
        """``kill -9``."""
        if self._control_plane is not None:
            self._control_plane.kill()
            self._control_plane.wait()

    def kill(self, name: str) -> None:
        """``kill -9`` of an instance."""
        self.run(self.processes[name].kill())

    def log(self, name: str, beyond: int = 0) -> str:
        """What a process has written, without the first bytes."""
        return (self.directory / f"{name}.log").read_bytes()[beyond:].decode()

    def send_trace(self, number: int, text: str, error: str) -> None:
        """Sends a trace of two spans that nobody made, from outside of the mesh."""

        async def send() -> None:
            spans = (otlp_span(number, 1, name=text), otlp_span(number, 2, 1, name=text, took=5.0, error=error))
            async with grpc.aio.insecure_channel(self.otlp_address) as channel:
                await export(channel, otlp_request(*spans, service_name=text, evil=text))

        self.run(send())

    def call_unreported(self, count: int) -> None:
        """Has orders called by somebody who sends no load reports; they ask for what is not there."""

        async def call() -> None:
            assert self._edge is not None
            orders = OrderServiceStub(self._edge.channel("orders"))
            for number in range(count):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    request = orders_pb2.GetOrderRequest(order_id=f"nothing-{number}")
                    await orders.GetOrder(request, timeout=TIMEOUT, wait_for_ready=True)

        self.run(call())

    def report_events(self, publisher: str, count: int) -> None:
        """Reports that the load has handled events, of which there is no broker here."""

        async def send() -> None:
            assert self._mesh is not None
            process = Reporter(f"{CALLER}-events", CALLER)
            process.handles(count, publisher)
            [request] = requests_of(process.report(0.0), 0.0)
            request.node.CopyFrom(discovery_pb2.Node(id=process.node.id, service=CALLER))
            request.epoch = process.epoch
            async with self._mesh.transport.open_channel(self.address, CONTROL_PLANE) as channel:
                stream = telemetry_pb2_grpc.TelemetryServiceStub(channel).Report()
                await stream.write(request)
                await stream.done_writing()
                async for _ in stream:
                    pass

        self.run(send())

    def begin(self) -> None:
        """Starts everything, and has orders placed from then on."""
        self.start_control_plane()
        self.run(self.identities.set_up(self.directory / "state", self.address, (*COUNTS, CALLER, EDGE)))
        for service, count in COUNTS.items():
            for number in range(1, count + 1):
                self.start(service, number)
        # Otherwise its first call may fail, because its instances do not know each other yet.
        eventually(self._in_sync)
        self.run(self._begin_load())

    def _in_sync(self) -> bool:
        """Whether every instance is listed, and has heard of those that it calls."""
        with AdminClient([self.address], TIMEOUT, self.identities.credentials()) as client:
            status = client.call(client.stub.GetStatus, admin_pb2.GetStatusRequest())
        return {each.service: each.healthy for each in status.services} == COUNTS and all(
            each.acknowledged_version == each.current_version != ""
            for process in status.clients
            for each in process.subscriptions
        )

    def end(self) -> None:
        """Stops everything."""
        try:
            self.run(self._end())
        finally:
            self.kill_control_plane()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _client_environment(self, service: str) -> dict[str, str]:
        return {
            "MESH_CONTROL_PLANE": self.address,
            "MESH_ENROLMENT": self.enrolment_address,
            "MESH_TOKEN_FILE": str(self.identities.token_file(service)),
            "MESH_LOAD_REPORTS": REPORTS_EVERY,
        }

    async def _start(
        self, name: str, command: list[str], environment: dict[str, str], ready: re.Pattern[str]
    ) -> Process:
        process = await self._supervisor.start(name, command, _inherited() | environment, ready)
        await process.wait_ready()
        return process

    async def _begin_load(self) -> None:
        self._mesh = await self._client(CALLER, 0.2)
        self._edge = await self._client(EDGE, 0.0)
        self._load = asyncio.create_task(self._place_orders(OrderServiceStub(self._mesh.channel("orders"))))

    async def _client(self, service: str, load_reports: float) -> mesh_client.Mesh:
        return await mesh_client.connect(
            self.address,
            service=service,
            enrolment=self.enrolment_address,
            token_file=self.identities.token_file(service),
            insecure=False,
            cache_dir="",
            load_reports=load_reports,
        ).__aenter__()

    async def _place_orders(self, orders: Any) -> None:
        number = 0
        while True:
            number += 1
            request = orders_pb2.PlaceOrderRequest(idempotency_key=f"k{number}", sku="espresso-beans", quantity=1)
            with contextlib.suppress(grpc.aio.AioRpcError):  # what fails is for the dashboard to tell
                await orders.PlaceOrder(request, timeout=TIMEOUT)
            await asyncio.sleep(PAUSE)

    async def _end(self) -> None:
        if self._load is not None:
            self._load.cancel()
            await asyncio.wait({self._load})
        for mesh in (self._mesh, self._edge):
            if mesh is not None:
                await mesh.__aexit__(None, None, None)
        await self._supervisor.kill_all()


def _inherited() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("MESH_", "SHOP_"))}


@contextmanager
def running_shop(directory: Path) -> Iterator[Shop]:
    """A shop under load, until the end of the block."""
    with ExitStack() as stack:
        one, two, three, four = (stack.enter_context(held_address()) for _ in range(4))
        shop = Shop(directory, (one, two, three, four))
        try:
            shop.begin()
            yield shop
        finally:
            shop.end()
