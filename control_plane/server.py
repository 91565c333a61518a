"""Wires one control plane: sources, catalog, publisher, streams and the gRPC server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from mesh.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    authority_pb2,
    certificate_pb2,
    discovery_pb2,
    edge_service_pb2,
    operations_pb2,
    operations_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    telemetry_pb2,
    traffic_pb2,
)

from control_plane.access import Access
from control_plane.admin import AdminServicer
from control_plane.catalog import Catalog
from control_plane.credentials import add_port
from control_plane.dashboard.links import DashboardLinks
from control_plane.dashboard.options import DashboardOptions
from control_plane.discovery import StreamHub
from control_plane.edges import EdgeHub
from control_plane.events import Event, PolicyDeleted, PolicyStored, SourceConnected
from control_plane.identity.authority import AuthorityServicer
from control_plane.identity.certificate_authority import CertificateAuthority
from control_plane.identity.services import add_enrolment_services, add_mesh_services
from control_plane.operations.diagnosis import Diagnosis
from control_plane.operations.drains import OperatorDrains
from control_plane.operations.own_log import OwnLog
from control_plane.operations.servicer import OperationsServicer
from control_plane.options import ControlPlaneOptions
from control_plane.policies import PolicyBook
from control_plane.ports import enrolment_server, mesh_server
from control_plane.publisher import Debounce, Publisher
from control_plane.registry import RegistryServicer
from control_plane.registry_choice import open_registry, remembering
from control_plane.snapshot import Snapshot, build_snapshot
from control_plane.sources import PolicyStore, PolicyStoreEvent, Source
from control_plane.telemetry.station import Telemetry
from control_plane.traces.view import TraceView
from mesh_client.core.errors import InvalidTransitionError, InvalidValueError
from mesh_client.core.policy import ServicePolicy
from mesh_client.tasks import end_tasks

if TYPE_CHECKING:
    from control_plane.dashboard.server import Dashboard
    from control_plane.event_publisher import EventPublisher
    from control_plane.metrics_server import MetricsServer

_log = logging.getLogger(__name__)


class ControlPlane:
    """One control plane: watches a registry, streams to clients.

    Args:
        options: what the operator chose.
        source: in place of the registry that the options name, for tests.
        policies: in place of that registry's policy store, for tests.
        log: of this process, for operators; None for one that they cannot ask.
    """

    def __init__(
        self,
        options: ControlPlaneOptions,
        *,
        source: Source | None = None,
        policies: PolicyStore | None = None,
        log: OwnLog | None = None,
    ) -> None:
        self._options = options
        self._registry = open_registry(options)
        self._source = source or self._registry.source
        self._policies = policies or remembering(self._registry.policies, options)
        self._edge_policies = remembering(self._registry.edge_policies, options)
        self._catalog = Catalog(options.catalog)
        self._book = PolicyBook(ServicePolicy)
        self._publisher = Publisher(self._compile, Debounce(options.debounce_quiet, options.debounce_maximum))
        self.authority = None if options.insecure else CertificateAuthority(options.identity_options)
        """Who signs certificates; None without identity."""
        self.access = Access(None) if self.authority is None else Access(self.authority.trust_domain, self.authority)
        """Who may do what."""
        self._edges = EdgeHub(self.access)
        self._hub = StreamHub(
            self._publisher,
            self._emit,
            options.control_plane_id,
            options.max_streams,
            access=self.access,
            edges_missing=self._edges.missing,
        )
        self.traces = TraceView(options.traces, self.access)
        """The last traces."""
        self._telemetry: Telemetry | None = None
        self._metrics: MetricsServer | None = None
        self._events: EventPublisher | None = None
        self._links = DashboardLinks()
        self._dashboard: Dashboard | None = None
        self._drains = OperatorDrains(self._catalog, self._hub, options.data_dir)
        self._operations = OperationsServicer(
            options.control_plane_id,
            self.access,
            options.max_streams,
            log,
            self._drains,
            Diagnosis(options, self._catalog, self._hub, self.authority, self._registry.ask_consul),
            self._links,
        )
        self._unread = {self._source.name, self._policies.name}
        self._policy_wait: asyncio.TimerHandle | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._serving: asyncio.Task[None] | None = None
        self._stopped = False
        self._done = asyncio.Event()
        self._servers: list[grpc.aio.Server] = []
        self._health = health.aio.HealthServicer()
        self.port = 0
        """Where it listens, once started."""
        self.enrolment_port = 0
        """Where workloads get their first certificates, once started; 0 without identity."""

    @property
    def telemetry(self) -> Telemetry:
        """Load reports, and what can be asked about them; once started.

        Raises:
            InvalidTransitionError: it has not been started.
        """
        if self._telemetry is None:
            raise InvalidTransitionError("there are load reports once the control plane has started")
        return self._telemetry

    @property
    def event_publisher(self) -> EventPublisher | None:
        """Publishes what happens, where a broker is configured; once started."""
        return self._events

    @property
    def metrics_address(self) -> str:
        """``host:port`` where metrics are served, once started; empty for nowhere."""
        return "" if self._metrics is None else self._metrics.address

    @property
    def dashboard_url(self) -> str:
        """Where the dashboard is, once started; empty for nowhere."""
        return self._links.url

    @property
    def address(self) -> str:
        """``host:port`` where it listens, once started."""
        return f"{self._options.address.rpartition(':')[0]}:{self.port}"

    @property
    def enrolment_address(self) -> str:
        """``host:port`` where workloads get their first certificates, once started; empty without identity."""
        host = self._options.enrols_at.rpartition(":")[0]
        return "" if self.authority is None else f"{host}:{self.enrolment_port}"

    async def start(self) -> None:
        """Listens and begins to read the registry; clients are answered once that was read.

        Raises:
            ConfigError: the address or the data directory cannot be used.
        """
        if self.authority is None:
            _log.warning("insecure, as asked: everything is in plaintext, and everybody may do everything")
        try:
            if self._registry.database is not None:
                await self._registry.database.open()
            if self.authority is not None:
                await self.authority.open()
                self.authority.on_change(self.access.cut_revoked)
            self._events = self._publish_events()
            self._drains.restore()
            await self._listen()
        except BaseException:
            await asyncio.gather(*(server.stop(None) for server in self._servers))
            await self._close_stores()
            raise
        if self._events is not None:
            self._events.start(self.telemetry.recorder)
        self._tasks = [
            asyncio.create_task(self._run(self._source.run(self._emit)), name=self._source.name),
            asyncio.create_task(self._run(self._policies.run(self._emit)), name=self._policies.name),
            asyncio.create_task(self._run(self._edge_policies.run(self._emit_edge)), name=self._edge_policies.name),
            asyncio.create_task(self._run(self._drains.run()), name="drains by operators"),
        ]
        _log.info("control plane %s listens on %s", self._options.control_plane_id, self.address)
        if self.authority is not None:
            _log.info("workloads of %s enrol on %s", self.authority.trust_domain, self.enrolment_address)

    async def _listen(self) -> None:
        options, authority = self._options, self.authority
        server = mesh_server(options, self.access)
        server.add_generic_rpc_handlers((self._hub.handler(), self._edges.handler()))
        registry_pb2_grpc.add_RegistryServiceServicer_to_server(
            RegistryServicer(self._registry.leases, self._hub, options.registry, self.access), server
        )
        self._telemetry = Telemetry(self._catalog, self._book, self._publisher, self._hub, self.access)
        self._telemetry.add_to(server)
        outboxes = [self._telemetry.recorder.outboxes, *([] if self._events is None else [self._events.outboxes])]
        admin = AdminServicer(
            options.control_plane_id,
            self._catalog,
            self._book,
            (self._policies, self._edge_policies),
            self._publisher,
            self._hub,
            edges=self._edges,
            outboxes=outboxes,
            access=self.access,
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
        operations_pb2_grpc.add_OperationsServiceServicer_to_server(self._operations, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        services = (
            admin_pb2,
            discovery_pb2,
            edge_service_pb2,
            operations_pb2,
            registry_pb2,
            telemetry_pb2,
            traffic_pb2,
            health_pb2,
        )
        files = [each.DESCRIPTOR for each in services]
        files += self.traces.add_mesh_services(server)
        if authority is not None:
            add_mesh_services(authority, server, self.access)
            files += [authority_pb2.DESCRIPTOR, certificate_pb2.DESCRIPTOR]
        names = [each.full_name for file in files for each in file.services_by_name.values()]
        reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        enrolment = None
        if authority is None:
            self.port = add_port(server, options.address)
        else:
            enrolment = enrolment_server()
            add_enrolment_services(authority, enrolment)
            self.enrolment_port = add_port(enrolment, options.enrols_at, authority.enrolment_credentials())
            self.port = add_port(server, options.address, authority.mesh_credentials())
        plain = self.traces.plain_server()
        self._hub.opened()
        for each in (enrolment, server, plain):
            if each is not None:
                await each.start()
                self._servers.append(each)
        if options.metrics_address is not None:
            await self._serve_metrics(options.metrics_address, self._telemetry)
        if options.dashboard is not None:
            await self._serve_dashboard(options.dashboard, admin, self._telemetry)

    def _publish_events(self) -> EventPublisher | None:
        if not self._options.broker:
            return None
        # Brings in the AMQP client.
        from control_plane.event_publisher import EventPublisher

        return EventPublisher(
            self._options,
            catalog=self._catalog,
            book=self._book,
            publisher=self._publisher,
            hub=self._hub,
            authority=self.authority,
        )

    async def _serve_metrics(self, address: str, telemetry: Telemetry) -> None:
        # These bring in an HTTP server, and what writes metrics.
        from control_plane.metrics import ControlPlaneCollector, Observed
        from control_plane.metrics_server import MetricsServer

        observed = Observed(
            self._options.control_plane_id,
            self._catalog,
            self._book,
            self._publisher,
            self._hub,
            self._edges,
            self.access,
            telemetry,
            self.authority,
            self._events,
        )
        self._metrics = MetricsServer(ControlPlaneCollector(observed))
        await self._metrics.start(address)

    async def _serve_dashboard(self, options: DashboardOptions, admin: AdminServicer, telemetry: Telemetry) -> None:
        from control_plane.dashboard.server import Dashboard
        from control_plane.dashboard.views import Servicers

        authority = None if self.authority is None else AuthorityServicer(self.authority, self.access)
        lifetime = self._options.identity.leaf_lifetime
        servicers = Servicers(admin, telemetry.operators, self.traces.queries, authority, self.access, lifetime)
        self._dashboard = Dashboard(servicers, self._links, self._options.data_dir)
        await self._dashboard.start(options)

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
        self._edges.close()
        self.traces.close()
        if self._telemetry is not None:
            self._telemetry.close()
        await self._operations.close()
        if self._servers:
            await self._health.enter_graceful_shutdown()
            await asyncio.gather(*(server.stop(grace) for server in self._servers))
            self._servers.clear()
        await end_tasks(*self._tasks, self._serving)
        if self._events is not None:
            await self._events.close()
        await self._drains.save()
        await self._close_stores()
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
                if self._events is not None:
                    self._events.policy_changed(event.name)
            else:
                changed = self._catalog.apply(event, asyncio.get_running_loop().time())
        except InvalidValueError as error:
            _log.warning("%s is ignored: %s", type(event).__name__, error)
            return
        if changed:
            self._publisher.notify()
            self._drains.changed()
        if isinstance(event, SourceConnected) and event.source in self._unread:
            self._read(event.source)

    def _emit_edge(self, event: PolicyStoreEvent) -> None:
        """Takes one event of the store of edge policies in. Edges are not waited for: the mesh goes without them."""
        if isinstance(event, PolicyStored | PolicyDeleted):
            self._edges.apply(event)
            return
        self._emit(event)
        if isinstance(event, SourceConnected):
            self._edges.read()

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
        if self._events is not None:
            self._events.begin()
        self._serving = asyncio.create_task(self._health.set("", health_pb2.HealthCheckResponse.SERVING))

    def _compile(self, previous: Snapshot, now: float) -> tuple[Snapshot, float | None]:
        view = self._catalog.view(now)
        services = {name: service.published for name, service in view.services.items()}
        for name in self._book.names:  # a service that handles events need not be registered for calls
            if self._book.is_provisional(name) or self._book.policy(name)[0].events:
                services.setdefault(name, ())
        return build_snapshot(services, self._book.policy, previous), view.next_deadline

    async def _close_stores(self) -> None:
        if self._dashboard is not None:
            await self._dashboard.close()
        if self._metrics is not None:
            await self._metrics.close()
        if self.authority is not None:
            await self.authority.close()
        if self._registry.database is not None:
            await self._registry.database.close()
