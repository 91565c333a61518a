"""Wires one control plane: sources, catalog, publisher, streams and the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from mesh.v1 import admin_pb2, admin_pb2_grpc, discovery_pb2, registry_pb2, registry_pb2_grpc

from control_plane.admin import AdminServicer
from control_plane.catalog import Catalog
from control_plane.credentials import add_port
from control_plane.discovery import StreamHub
from control_plane.events import Event, PolicyDeleted, PolicyStored, SourceConnected
from control_plane.options import EMBEDDED, ControlPlaneOptions
from control_plane.policies import PolicyBook
from control_plane.publisher import Debounce, Publisher
from control_plane.registry import RegistryServicer
from control_plane.snapshot import Snapshot, build_snapshot
from control_plane.sources import PolicyStore, Source
from control_plane.sources.database import Database
from control_plane.sources.embedded import EmbeddedSource
from control_plane.sources.embedded_policies import EmbeddedPolicyStore
from control_plane.sources.last_good import LastGoodPolicies
from mesh_client.core.errors import InvalidValueError

_log = logging.getLogger(__name__)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Two control planes on one port would each serve half of the clients.
    ("grpc.so_reuseport", 0),
    # Clients ping every 10 s. gRPC's own minimum of 300 s would end their connections with too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that hangs or whose host is gone is noticed within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # With gRPC's default of 1000, many clients that come back at once would be refused.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 16 * 1024),
)


@dataclass(frozen=True, slots=True)
class _Registry:
    """What an operator's choice of registry comes to."""

    source: Source
    policies: PolicyStore
    leases: EmbeddedSource | None = None
    database: Database | None = None


def _open_registry(options: ControlPlaneOptions) -> _Registry:
    """The registry; nothing is read or connected yet.

    Raises:
        ConfigError: Consul's token cannot be read.
    """
    if options.registry == EMBEDDED:
        database = Database(options.data_dir)
        leases = EmbeddedSource(database)
        return _Registry(leases, EmbeddedPolicyStore(database), leases, database)
    # These bring in the HTTP client, which the embedded registry does without.
    from control_plane.sources.consul import ConsulSource
    from control_plane.sources.consul_http import ConsulToken, parse_registry
    from control_plane.sources.consul_policies import ConsulPolicyStore

    addresses = parse_registry(options.registry)
    file = options.consul_token_file
    token = ConsulToken(file=file) if file is not None else ConsulToken.find(options.consul_token)
    return _Registry(ConsulSource(addresses, token), ConsulPolicyStore(addresses, token))


class ControlPlane:
    """One control plane: watches a registry, streams to clients.

    Args:
        options: what the operator chose.
        source: in place of the registry that the options name, for tests.
        policies: in place of that registry's policy store, for tests.
    """

    def __init__(
        self, options: ControlPlaneOptions, *, source: Source | None = None, policies: PolicyStore | None = None
    ) -> None:
        self._options = options
        self._registry = _open_registry(options)
        self._source = source or self._registry.source
        self._policies = policies or self._registry.policies
        if options.data_dir is not None and policies is None:
            self._policies = LastGoodPolicies(self._policies, options.data_dir)
        self._catalog = Catalog(options.catalog)
        self._book = PolicyBook()
        self._publisher = Publisher(self._compile, Debounce(options.debounce_quiet, options.debounce_maximum))
        self._hub = StreamHub(self._publisher, self._emit, options.control_plane_id, options.max_streams)
        self._unread = {self._source.name, self._policies.name}
        self._policy_wait: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._serving: asyncio.Task[None] | None = None
        self._stopped = False
        self._done = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self.port = 0
        """Where it listens, once started."""

    @property
    def address(self) -> str:
        """``host:port`` where it listens, once started."""
        return f"{self._options.address.rpartition(':')[0]}:{self.port}"

    async def start(self) -> None:
        """Listens and begins to read the registry; clients are answered once that was read.

        Raises:
            ConfigError: the address or the data directory cannot be used.
        """
        if self._registry.database is not None:
            await self._registry.database.open()
        server = grpc.aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((self._hub.handler(),))
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryServicer(self._registry.leases, self._hub, self._options.registry), server
        )
        admin = AdminServicer(
            self._options.control_plane_id, self._catalog, self._book, self._policies, self._publisher, self._hub
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [
            descriptor.full_name
            for file in (admin_pb2, discovery_pb2, registry_pb2, health_pb2)
            for descriptor in file.DESCRIPTOR.services_by_name.values()
        ]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        try:
            self.port = add_port(server, self._options.address)
            await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
            await server.start()
        except BaseException:
            await self._close_database()
            raise
        self._server = server
        self._tasks = [
            asyncio.create_task(self._run(self._source.run(self._emit)), name=self._source.name),
            asyncio.create_task(self._run(self._policies.run(self._emit)), name=self._policies.name),
        ]
        _log.info("control plane %s listens on %s", self._options.control_plane_id, self.address)

    async def stop(self, grace: float = 1.0) -> None:
        """Ends streams with UNAVAILABLE so that clients go elsewhere, lets other calls finish, closes the registry.

        Args:
            grace: seconds that calls in flight have.
        """
        if self._stopped:
            await self._done.wait()
            return
        self._stopped = True
        if self._policy_wait is not None:
            self._policy_wait.cancel()
        self._publisher.close()
        self._hub.close()
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace)
            self._server = None
        tasks = [*self._tasks, *([self._serving] if self._serving is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close_database()
        self._done.set()

    async def wait(self) -> None:
        """Returns when it was stopped.

        Raises:
            Exception: what a source raised, which it should not have; the control plane must be stopped.
        """
        stopped = asyncio.create_task(self._done.wait())
        try:
            await asyncio.wait([stopped, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    raise error
            await stopped
        finally:
            stopped.cancel()

    async def _run(self, source: Coroutine[object, object, None]) -> None:
        await source
        raise RuntimeError("a source ended by itself")

    def _emit(self, event: Event) -> None:
        """Takes one event of a source in. Never raises: what one service says wrong must not stop the others."""
        try:
            if isinstance(event, PolicyStored | PolicyDeleted):
                changed = self._book.apply(event)
            else:
                changed = self._catalog.apply(event, asyncio.get_running_loop().time())
        except InvalidValueError as error:
            _log.warning("%s is ignored: %s", type(event).__name__, error)
            return
        if changed:
            self._publisher.notify()
        if isinstance(event, SourceConnected) and event.source in self._unread:
            self._read(event.source)

    def _read(self, source: str) -> None:
        """A source was read whole for the first time."""
        self._unread.discard(source)
        if source == self._policies.name and self._book.unread:
            self._book.unread = False
            self._publisher.notify()
        if self._publisher.opened.is_set() or self._source.name in self._unread:
            return
        if self._unread:
            loop = asyncio.get_running_loop()
            self._policy_wait = loop.call_later(self._options.policy_wait, self._go_without_policies)
            return
        self._open()

    def _go_without_policies(self) -> None:
        _log.error(
            "policies cannot be read from %s: calls are made by the default policy; servers keep the policies that "
            "they have, and secure ones that have none serve nobody",
            self._policies.name,
        )
        self._book.unread = True
        self._open()

    def _open(self) -> None:
        if self._policy_wait is not None:
            self._policy_wait.cancel()
        self._publisher.open()
        self._serving = asyncio.create_task(self._health.set("", health_pb2.HealthCheckResponse.SERVING))

    def _compile(self, previous: Snapshot, now: float) -> tuple[Snapshot, float | None]:
        view = self._catalog.view(now)
        services = {name: service.published for name, service in view.services.items()}
        return build_snapshot(services, self._book.policy, previous), view.next_deadline

    async def _close_database(self) -> None:
        if self._registry.database is not None:
            await self._registry.database.close()


async def serve(options: ControlPlaneOptions) -> None:
    """Runs a control plane until SIGTERM or SIGINT; says on standard output when it listens.

    Raises:
        ConfigError: it cannot start as asked.
    """
    # A collection of everything that thousands of streams hold takes longer than sending a change to them, and what a
    # stream leaves behind is freed without one.
    gc.set_threshold(100_000, 50, 100)
    plane = ControlPlane(options)
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await plane.start()
    try:
        sys.stdout.write(f"mesh control-plane listening on {plane.address}\n")
        sys.stdout.flush()
        failed = asyncio.create_task(plane.wait())
        signalled = asyncio.create_task(asked.wait())
        try:
            await asyncio.wait([failed, signalled], return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
        finally:
            signalled.cancel()
            failed.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await failed
    finally:
        await plane.stop()
