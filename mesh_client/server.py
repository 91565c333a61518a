"""The way to make a server that is part of the mesh."""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from mesh_client import grpc_makers
from mesh_client.access_log import access_log_rate
from mesh_client.addresses import HostPort, Registry, parse_control_planes, parse_host_port, parse_registry
from mesh_client.core.errors import ConfigError
from mesh_client.core.model import Endpoint, Locality, check_address, check_service_name
from mesh_client.identity.settings import identity_settings
from mesh_client.logs import name_logs
from mesh_client.mesh import DEFAULT_CONTROL_PLANE
from mesh_client.server_settings import ServerSettings
from mesh_client.transport import SERVER_OPTIONS, Transport, merge_options
from mesh_client.transport_choice import make_transport

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.core.policy import ServicePolicy
    from mesh_client.mesh import Mesh
    from mesh_client.mesh_server import MeshServer

ZONE_VARIABLE = "MESH_ZONE"
REGION_VARIABLE = "MESH_REGION"

MAX_DRAIN_TIMEOUT = 300.0
"""Seconds; the control plane's own bound."""


def server(
    service: str,
    *,
    control_plane: str | Sequence[str] | None = None,
    registry: str | None = None,
    address: str = "127.0.0.1:0",
    advertise: str | None = None,
    instance_id: str | None = None,
    weight: int = 1,
    zone: str | None = None,
    region: str | None = None,
    metadata: Mapping[str, str] | None = None,
    drain_timeout: float = 10.0,
    grace: float = 10.0,
    check_interval: float = 3.0,
    max_connection_age: float = 600.0,
    max_connection_age_grace: float = 300.0,
    enrolment: str | Sequence[str] | None = None,
    token: str | None = None,
    token_file: str | Path | None = None,
    trust_roots: str | Path | None = None,
    trust_domain: str | None = None,
    attestation: str | None = None,
    identity_dir: str | Path | None = None,
    insecure: bool | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    options: Sequence[tuple[str, object]] = (),
    migration_thread_pool: Executor | None = None,
    compression: grpc.Compression | None = None,
    reflection: bool = True,
    access_log: float | None = None,
    mesh: Mesh | None = None,
    policy: ServicePolicy | None = None,
    tracer_provider: TracerProvider | None = None,
) -> MeshServer:
    """A server for one instance of a service; nothing is opened or registered before it starts.

    Generated ``add_...Servicer_to_server`` functions take it as it is. Needs the ``server`` extra, and the ``consul``
    extra to register with Consul.

    Args:
        service: the name that callers give to ``mesh.channel``; a DNS label.
        control_plane: addresses as ``host:port``, a list or comma-separated; by default those of ``mesh``, else
            ``MESH_CONTROL_PLANE``, else ``127.0.0.1:7070``.
        registry: ``control-plane``, or ``embedded`` as control planes call it; ``consul://host:port`` of the host's
            own agent, with the ACL token in ``CONSUL_HTTP_TOKEN`` or in the file ``CONSUL_HTTP_TOKEN_FILE``; or
            ``none`` for a server that is found by other means. By default ``MESH_REGISTRY``, else ``control-plane``.
        address: where to listen, as ``host:port``; port 0 for any free one.
        advertise: where others reach it, as ``host`` or ``host:port``; by default the listening address, or, if that
            is a wildcard, the host's address towards the registry.
        instance_id: unique within the service; by default made up.
        weight: share of calls relative to other instances, 1 to 1000.
        zone: where it runs; by default ``MESH_ZONE``.
        region: where it runs; by default ``MESH_REGION``.
        metadata: labels that traffic splits select by.
        drain_timeout: seconds to wait at most, when stopping, until every client knows; 0 to 300.
        grace: seconds that calls in flight have to finish, once no new ones come.
        check_interval: seconds between self-checks, 0.05 to 60. A TTL check with Consul lasts three times as long.
        max_connection_age: seconds that a connection is used for new calls, 1 to 86400: callers then make another one
            and show their certificate of that moment. No call fails.
        max_connection_age_grace: seconds that calls on such a connection have then to finish, 0 to 86400. Streams that
            go on for longer end with UNAVAILABLE.
        enrolment: as for `mesh_client.connect`, and so on to ``insecure``: how the server proves who it is.
        token: likewise.
        token_file: likewise.
        trust_roots: likewise.
        trust_domain: likewise.
        attestation: likewise.
        identity_dir: likewise.
        insecure: likewise; a plaintext server knows none of its callers.
        interceptors: as for `grpc.aio.server`.
        options: as for `grpc.aio.server`; they override those that the mesh sets, such as ``grpc.max_metadata_size``.
        migration_thread_pool: as for `grpc.aio.server`.
        compression: as for `grpc.aio.server`.
        reflection: whether to serve gRPC reflection.
        access_log: share of successful calls that are logged, 0 to 1, beside every failed one, by the logger
            ``mesh_client.access``; by default MESH_ACCESS_LOG, else there is no access log.
        mesh: a client of the same service, whose identity the server shares and through which it reads its policy; by
            default it has its own.
        policy: a fixed policy in place of the control plane's.
        tracer_provider: makes spans; by default that of ``mesh``, else the process's as it is now.

    Raises:
        InvalidValueError: a name, label or weight is out of range.
        ConfigError: an address, duration, choice of registry or way to prove an identity is not allowed, or an extra is
            not installed.
    """
    check_service_name(service)
    chosen_registry = parse_registry(registry)
    if control_plane is None and mesh is not None:
        control_plane = mesh.control_planes
    control_planes = parse_control_planes(control_plane)
    if not control_planes and chosen_registry.kind != "none":
        control_planes = (DEFAULT_CONTROL_PLANE,)
    settings = ServerSettings(
        service=service,
        control_planes=control_planes,
        registry=chosen_registry,
        bind=parse_host_port(address, "address", lowest_port=0),
        advertised=_parse_advertise(advertise),
        endpoint=Endpoint(
            id=instance_id if instance_id is not None else f"{service}-{secrets.token_hex(4)}",
            address="localhost",
            port=1,
            weight=weight,
            locality=_locality(region, zone),
            metadata=dict(metadata or {}),
        ),
        drain_timeout=_seconds("drain_timeout", drain_timeout, 0.0, MAX_DRAIN_TIMEOUT),
        grace=_seconds("grace", grace, 0.0, 86_400.0),
        check_interval=_seconds("check_interval", check_interval, 0.05, 60.0),
        reflection=reflection,
        access_log=access_log_rate(access_log),
    )
    age = _seconds("max_connection_age", max_connection_age, 1.0, 86_400.0)
    age_grace = _seconds("max_connection_age_grace", max_connection_age_grace, 0.0, 86_400.0)
    ages = (
        ("grpc.max_connection_age_ms", round(age * 1000)),
        ("grpc.max_connection_age_grace_ms", round(age_grace * 1000)),
    )
    identity: dict[str, Any] = {
        "enrolment": enrolment,
        "token": token,
        "token_file": token_file,
        "trust_roots": trust_roots,
        "trust_domain": trust_domain,
        "attestation": attestation,
        "identity_dir": identity_dir,
        "insecure": insecure,
    }
    if mesh is None:
        transport = make_transport(identity_settings(service, control_planes, **identity))
    else:
        transport = _shared_transport(mesh, service, [name for name, value in identity.items() if value is not None])
    if transport.secure and policy is None and mesh is None and not control_planes:
        raise ConfigError(
            "policy: a secure server must know whom it may serve; give policy=, or a control plane to ask"
        )
    _require_extras(settings.registry)
    inner = grpc_makers.server(
        migration_thread_pool=migration_thread_pool,
        interceptors=interceptors,
        options=merge_options([*SERVER_OPTIONS, *ages], options),
        compression=compression,
    )
    name_logs(service, settings.endpoint.id)
    from mesh_client.mesh_server import MeshServer  # only now is it certain that the server extra is there

    if tracer_provider is None and mesh is not None:
        tracer_provider = mesh.tracer_provider
    return MeshServer(settings, inner, transport, mesh, policy, tracer_provider)


def _shared_transport(mesh: Mesh, service: str, given: Sequence[str]) -> Transport:
    if given:
        raise ConfigError(f"{given[0]}: the server shares the identity of its mesh=; give it to mesh_client.connect")
    identity = mesh.transport.identity
    if identity is not None and identity.principal.caller != service:
        raise ConfigError(
            f"mesh: it is {identity.principal.caller}'s, whose identity a server of {service} cannot share; "
            f"make it with mesh_client.connect(service={service!r})"
        )
    return mesh.transport


def _parse_advertise(advertise: str | None) -> HostPort | None:
    """The address to advertise; port 0 stands for the one that is listened on."""
    if advertise is None:
        return None
    if advertise.startswith("[") or advertise.count(":") == 1:
        return parse_host_port(advertise, "advertise")
    return HostPort(check_address(advertise, "advertise"), 0)


def _locality(region: str | None, zone: str | None) -> Locality:
    return Locality(
        region=os.environ.get(REGION_VARIABLE, "") if region is None else region,
        zone=os.environ.get(ZONE_VARIABLE, "") if zone is None else zone,
    )


def _seconds(name: str, value: float, least: float, most: float) -> float:
    if not (math.isfinite(value) and least <= value <= most):
        raise ConfigError(f"{name}: {value!r} is not allowed; expected seconds, {least:g} to {most:g}")
    return float(value)


def _require_extras(registry: Registry) -> None:
    needed = [("grpc_health", "server"), ("grpc_reflection", "server")]
    if registry.agent is not None:
        needed.append(("consul", "consul"))
    for module, extra in needed:
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{module} is not installed; install 'grpc-mesh[{extra}]'")
