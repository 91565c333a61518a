"""A process's client of the mesh: what applications hold."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from mesh_client.core.breaker import BreakerState
from mesh_client.core.model import Health, Locality, check_service_name
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.service import Service
from mesh_client.core.store import EndpointsResource, Resolution
from mesh_client.discovery import Applied
from mesh_client.disk_cache import DiskCache, default_directory
from mesh_client.identity import IdentityState
from mesh_client.identity.settings import identity_settings
from mesh_client.interceptors import intercepted
from mesh_client.logs import name_logs
from mesh_client.resolver import Resolver
from mesh_client.transport import Transport
from mesh_client.transport_choice import make_transport

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

DEFAULT_CONTROL_PLANE = "127.0.0.1:7070"
USER_AGENT = "grpc-mesh-python/0.1.0"


@dataclass(frozen=True, slots=True)
class EndpointState:
    """One endpoint as this client sees it."""

    id: str
    target: str
    health: Health
    zone: str
    outstanding: int
    """Calls in flight."""
    ejected: bool


@dataclass(frozen=True, slots=True)
class ServiceState:
    """One service as this client sees it."""

    service: str
    resolution: Resolution
    policy_version: str
    endpoints_version: str
    endpoints: tuple[EndpointState, ...]
    breaker: BreakerState
    calls: int
    """Calls since the start that the concurrency limit and the breaker let through."""
    retries: int
    """Retries since the start that the budget granted."""


@dataclass(frozen=True, slots=True)
class MeshState:
    """What this client knows and whom it hears it from."""

    node_id: str
    control_plane: str
    """State of the discovery stream, in words."""
    in_sync: bool
    """Whether a control plane has confirmed, on the stream that is open, what is held."""
    age: float | None
    """Seconds since the last confirmation; 0 while in sync, None if there was none."""
    services: tuple[ServiceState, ...]
    identity: IdentityState | None = None
    """Who this process is in the mesh; None in plaintext, where nobody is anybody."""


class Mesh:
    """A client of the mesh. Made by `connect`; use it as an async context manager.

    Everything it hands out belongs to the event loop that entered it. Entering never waits for the control plane.
    """

    def __init__(self, resolver: Resolver, node_id: str, service: str, clock: Callable[[], float]) -> None:
        self.node_id = node_id
        self.service = service
        self._resolver = resolver
        self._clock = clock

    async def __aenter__(self) -> Self:
        """Starts following the control plane.

        Raises:
            ConfigError: it has been entered before.
        """
        await self._resolver.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stops. Calls in flight are cancelled."""
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
            tuple(_service_state(target.service, self._clock()) for target in self._resolver.targets),
            None if identity is None else identity.state(time.time()),
        )

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
        attendance=Attendance(service, node_id, rng) if attendance_wanted() else None,
    )
    return Mesh(resolver, node_id, service, clock)


def _env(name: str, default: str) -> str:
    return os.environ.get(f"MESH_{name}") or default


def _service_state(service: Service, now: float) -> ServiceState:
    return ServiceState(
        service.name,
        service.resolution,
        service.policy_version,
        service.endpoints_version,
        tuple(
            EndpointState(
                node.endpoint.id,
                node.endpoint.target,
                node.endpoint.health,
                node.endpoint.locality.zone,
                node.load.outstanding,
                node.ejected,
            )
            for node in service.nodes
        ),
        service.breaker.state(now),
        service.calls,
        service.retries,
    )
