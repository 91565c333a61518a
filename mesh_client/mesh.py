"""A process's client of the mesh: what applications hold."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Self

import grpc.aio
from mesh.v1 import discovery_pb2, endpoint_pb2

from mesh_client.addresses import parse_control_planes
from mesh_client.attendance import Attendance
from mesh_client.attendance import wanted as attendance_wanted
from mesh_client.channel import MeshChannel
from mesh_client.core.errors import ConfigError
from mesh_client.core.events.metrics import add_events
from mesh_client.core.metric import MetricSet
from mesh_client.core.model import Locality, check_service_name
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.process_metrics import add_process, add_services
from mesh_client.core.store import EndpointsResource, Resolution
from mesh_client.discovery import Applied
from mesh_client.disk_cache import DiskCache, default_directory
from mesh_client.identity.settings import identity_settings
from mesh_client.interceptors import intercepted
from mesh_client.logs import name_logs
from mesh_client.mesh_state import MeshState, service_state
from mesh_client.metrics_server import SHARED, Leave, MetricsServer
from mesh_client.observed import CLIENTS
from mesh_client.resolver import Resolver
from mesh_client.telemetry import ReportedServer, report_interval
from mesh_client.transport import Transport
from mesh_client.transport_choice import make_transport

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.events import EventBus, OutboxStore

DEFAULT_CONTROL_PLANE = "127.0.0.1:7070"
USER_AGENT = "grpc-mesh-python/0.1.0"


class Mesh:
    """A client of the mesh. Made by `connect`; use it as an async context manager.

    Everything it hands out belongs to the event loop that entered it. Entering never waits for the control plane.
    """

    def __init__(self, resolver: Resolver, node_id: str, service: str, clock: Callable[[], float]) -> None:
        self.node_id = node_id
        self.service = service
        self._resolver = resolver
        self._clock = clock
        self._bus: EventBus | None = None
        self._metrics_servers: list[MetricsServer] = []
        self._leave_metrics: Leave = _nothing

    async def __aenter__(self) -> Self:
        """Starts following the control plane.

        Raises:
            ConfigError: it has been entered before.
        """
        await self._resolver.start()
        CLIENTS.add(self)
        self._leave_metrics = await SHARED.enter()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stops. Calls in flight are cancelled, events are stored already."""
        CLIENTS.discard(self)
        for server in self._metrics_servers:
            await server.close()
        try:
            if self._bus is not None:
                await self._bus.close()
        finally:
            await self._leave_metrics()
            await self._resolver.stop()

    def channel(self, service: str, *, interceptors: Sequence[grpc.aio.ClientInterceptor] = ()) -> grpc.aio.Channel:
        """A channel to a service, for any generated stub.

        The service is followed from now on; the first calls wait for the first word of it.

        Args:
            service: its name.
            interceptors: see each call once, before retries.

        Raises:
            ConfigError: the mesh client is not entered.
            InvalidValueError: the name is not a DNS label.
        """
        channel = MeshChannel(self._resolver.target(service))
        return intercepted(channel, interceptors) if interceptors else channel

    def events(
        self,
        *,
        broker: str | Sequence[str] | None = None,
        credentials: str | Path | None = None,
        roots: str | Path | None = None,
        outbox: str | Path | OutboxStore | None = None,
        max_events: int | None = None,
        max_bytes: int | None = None,
    ) -> EventBus:
        """The event bus of this process's service; the same one when it is asked for again. Needs the ``events`` extra.

        Without a broker, events stay in the outbox.

        Args:
            broker: as ``amqps://host:port/vhost``, a list or comma-separated; by default MESH_BROKER, else none.
            credentials: file with the service's user and password at the broker, one a line, mode 0600; by default
                MESH_BROKER_CREDENTIALS.
            roots: PEM file of the roots that the broker's certificate is verified by; by default MESH_BROKER_ROOTS,
                else the system's.
            outbox: SQLite file in which events wait, which may be the service's own database, or a ``postgresql://``
                address, or another kind of store; by default MESH_OUTBOX, else ``grpc-mesh/outbox/SERVICE.sqlite`` in
                XDG_STATE_HOME.
            max_events: that the outbox holds, 1 at least; by default 100,000.
            max_bytes: of their bodies; by default 256 MiB.

        Raises:
            ConfigError: the client belongs to no service, an argument or environment variable is wrong, the extra is
                not installed, or there is a bus already and options are given.
        """
        given = [broker, credentials, roots, outbox, max_events, max_bytes]
        if self._bus is None:
            try:
                from mesh_client.events.choice import make_bus
            except ModuleNotFoundError as error:
                raise ConfigError(f"{error.name} is not installed; install 'grpc-mesh[events]'") from None
            self._bus = make_bus(
                self.service,
                self._resolver.transport,
                self._resolver.tracer_provider,
                broker=broker,
                credentials=credentials,
                roots=roots,
                outbox=outbox,
                max_events=max_events,
                max_bytes=max_bytes,
                follow_policy=self._resolver.follow_policy,
            )
            if self._resolver.reports is not None:
                self._resolver.reports.events = self._bus
        elif any(option is not None for option in given):
            raise ConfigError("events: this client has an event bus already; give it its options when it is made")
        return self._bus

    @property
    def event_bus(self) -> EventBus | None:
        """The bus, if `events` has been called; servers of the same process start and drain it."""
        return self._bus

    def watch_policy(self, service: str, callback: Callable[[ServicePolicy], None]) -> Callable[[], None]:
        """Calls back with the policy of a service, now if it is known, and at each change. Returns what ends that."""
        return self._resolver.watch_policy(service, callback)

    def watch_endpoints(self, service: str, callback: Callable[[EndpointsResource | None], None]) -> Callable[[], None]:
        """Calls back with the endpoints of a service, now if it is known, and at each change.

        None stands for a service that the mesh does not know. Nothing is connected to. With ``applied`` of `connect`,
        endpoints are acknowledged once they are in force where they are handed on to.

        Returns:
            What ends that.

        Raises:
            ConfigError: the mesh client is not entered.
            InvalidValueError: the name is not a DNS label.
        """
        return self._resolver.watch_endpoints(service, callback)

    def known_as(self, instance_id: str) -> None:
        """Operators call this process by the id of an endpoint that it serves, too. A server of it says so."""
        if self._resolver.attendance is not None:
            self._resolver.attendance.known_as(instance_id)

    def state(self) -> MeshState:
        """What this client knows now."""
        discovery, identity = self._resolver.discovery, self._resolver.transport.identity
        return MeshState(
            self.node_id,
            discovery.detail,
            self._resolver.in_sync,
            discovery.age(self._clock()),
            tuple(service_state(target.service, self._clock()) for target in self._resolver.targets),
            None if identity is None else identity.state(time.time()),
        )

    async def serve_metrics(self, address: str = "127.0.0.1:9464") -> str:
        """Serves Prometheus metrics of this whole process, until this client is left. See docs/metrics.md.

        Args:
            address: where, ``host:port``; port 0 for any free one. Whoever can reach it can read them.

        Returns:
            Where they are, with the real port.

        Raises:
            ConfigError: the address cannot be used, or the ``metrics`` extra is not installed.
        """
        server = MetricsServer()
        served_at = await server.start(address)
        self._metrics_servers.append(server)
        return served_at

    def add_metrics(self, metrics: MetricSet, wall: float) -> None:
        """Adds what this client knows; ``wall`` is the time of day, seconds since the epoch."""
        resolver, now = self._resolver, self._clock()
        identity = resolver.transport.identity
        state = None if identity is None else identity.state(wall)
        add_services(metrics, [target.service for target in resolver.targets], now)
        add_process(
            metrics,
            self.node_id,
            age=resolver.discovery.age(now),
            in_sync=resolver.in_sync,
            reports=None if resolver.reports is None else (resolver.reports.sent, resolver.reports.accepted),
            certificate=None if state is None else (state.spiffe_id, state.expires),
        )
        if self._bus is not None:
            add_events(metrics, self._bus.state())

    def report_load_of(self, server: ReportedServer) -> Callable[[], None]:
        """Reports what a server of this process receives, beside what the process calls. Returns what ends that."""
        reports = self._resolver.reports
        return (lambda: None) if reports is None else reports.add_server(server)

    @property
    def control_planes(self) -> tuple[str, ...]:
        """Addresses of the control planes, as ``host:port``."""
        return self._resolver.addresses

    @property
    def transport(self) -> Transport:
        """What opens every channel of this client; servers of the same process share it."""
        return self._resolver.transport

    @property
    def tracer_provider(self) -> TracerProvider | None:
        """What it was given to make spans with; servers of the same process share it."""
        return self._resolver.tracer_provider

    async def changed(self) -> None:
        """Returns at the next change of the discovery stream, of the identity or of a service."""
        await self._resolver.changed()

    async def synced(self) -> None:
        """Returns when a control plane has confirmed everything that this client follows."""
        while not self._resolver.in_sync or any(
            target.service.resolution is Resolution.PENDING for target in self._resolver.targets
        ):
            await self.changed()


def connect(
    control_plane: str | Sequence[str] | None = None,
    *,
    service: str | None = None,
    zone: str | None = None,
    region: str | None = None,
    cache_dir: str | Path | None = None,
    node_id: str | None = None,
    enrolment: str | Sequence[str] | None = None,
    token: str | None = None,
    token_file: str | Path | None = None,
    trust_roots: str | Path | None = None,
    trust_domain: str | None = None,
    attestation: str | None = None,
    identity_dir: str | Path | None = None,
    insecure: bool | None = None,
    applied: Applied | None = None,
    tracer_provider: TracerProvider | None = None,
    load_reports: float | None = None,
    rng: Random | None = None,
    clock: Callable[[], float] = monotonic,
) -> Mesh:
    """A client of the mesh; enter it with ``async with``.

    Args:
        control_plane: addresses as ``host:port``, a list or comma-separated; by default MESH_CONTROL_PLANE, else
            ``127.0.0.1:7070``.
        service: the service that this process belongs to; by default MESH_SERVICE, else none.
        zone: where it runs, for the same-zone preference; by default MESH_ZONE.
        region: likewise; by default MESH_REGION.
        cache_dir: where the last snapshot is kept for a start without a control plane; by default MESH_CACHE_DIR, else
            ``$XDG_CACHE_HOME/grpc-mesh``. An empty string keeps nothing.
        node_id: unique name of this process for operators; by default made up.
        enrolment: where it joins the mesh, as ``host:port``, a list or comma-separated; by default MESH_ENROLMENT, else
            each control plane's host at the next port.
        token: the join token by which it joins; by default MESH_TOKEN.
        token_file: the file that holds one, read whenever it is needed; by default MESH_TOKEN_FILE.
        trust_roots: PEM file of the roots to trust at joining; by default MESH_TRUST_ROOTS, else those whose hashes are
            in the join token.
        trust_domain: of the mesh; by default MESH_TRUST_DOMAIN, else the token's, else ``mesh.internal``.
        attestation: ``consul`` to join by the ACL token in CONSUL_HTTP_TOKEN or CONSUL_HTTP_TOKEN_FILE instead, which
            needs ``trust_roots``; by default MESH_ATTESTATION.
        identity_dir: where key and certificate are kept for the next start, readable by this user alone and used by
            this process alone; by default MESH_IDENTITY_DIR, else in memory only.
        insecure: True for plaintext without any identity; by default MESH_INSECURE. Never a fallback.
        applied: for whoever hands endpoints on to something else, such as a proxy. Awaited, with the services that have
            changed, before their endpoints are acknowledged, so that drains wait until they are in force there; after
            what watches them was called. It may take any time, and is cancelled when the stream ends.
        tracer_provider: makes spans; by default the process's, if it has one when the client is entered.
        load_reports: seconds between reports of what this process calls and how that goes to the control plane, 0.1 to
            60, or 0 for none; by default MESH_LOAD_REPORTS, such as ``5s`` or ``off``, else 5.
        rng: drives every random choice; by default seeded by the system.
        clock: seconds, monotonic; for tests, see `mesh_client.testing.FakeClock`. Waits and deadlines on the wire are
            real whatever it says.

    Raises:
        ConfigError, InvalidValueError: an argument or environment variable is wrong; the message says which.
    """
    addresses = parse_control_planes(control_plane) or (DEFAULT_CONTROL_PLANE,)
    service = _env("SERVICE", "") if service is None else service
    if service:
        check_service_name(service)
    locality = Locality(_env("REGION", "") if region is None else region, _env("ZONE", "") if zone is None else zone)
    settings = identity_settings(
        service,
        addresses,
        enrolment=enrolment,
        token=token,
        token_file=token_file,
        trust_roots=trust_roots,
        trust_domain=trust_domain,
        attestation=attestation,
        identity_dir=identity_dir,
        insecure=insecure,
    )
    transport = make_transport(settings)
    name_logs(service)
    return make_mesh(
        addresses,
        service,
        locality,
        transport,
        cache_dir=cache_dir,
        node_id=node_id,
        applied=applied,
        tracer_provider=tracer_provider,
        load_reports=load_reports,
        rng=rng,
        clock=clock,
    )


def make_mesh(
    addresses: Sequence[str],
    service: str,
    locality: Locality,
    transport: Transport,
    *,
    cache_dir: str | Path | None = None,
    node_id: str | None = None,
    applied: Applied | None = None,
    tracer_provider: TracerProvider | None = None,
    load_reports: float | None = None,
    rng: Random | None = None,
    clock: Callable[[], float] = monotonic,
) -> Mesh:
    """A client over a transport that is there already; everything else as for `connect`, and validated."""
    if cache_dir is None:
        cache_dir = os.environ.get("MESH_CACHE_DIR", default_directory())
    cache = DiskCache.for_control_planes(Path(cache_dir), addresses, service) if str(cache_dir) else None
    node_id = node_id or f"{service or 'client'}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    node = discovery_pb2.Node(
        id=node_id,
        service=service,
        locality=endpoint_pb2.Locality(region=locality.region, zone=locality.zone),
        user_agent=USER_AGENT,
    )
    rng = rng or Random()
    resolver = Resolver(
        addresses,
        node,
        locality,
        cache,
        rng,
        clock,
        transport,
        applied=applied,
        tracer_provider=tracer_provider,
        report_interval=report_interval(load_reports),
        attendance=Attendance(service, node_id, rng) if attendance_wanted() else None,
    )
    return Mesh(resolver, node_id, service, clock)


async def _nothing() -> None:
    """There is nothing to leave."""


def _env(name: str, default: str) -> str:
    return os.environ.get(f"MESH_{name}") or default
