"""What a client of the mesh knows, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_client.core.breaker import BreakerState
from mesh_client.core.model import Health
from mesh_client.core.service import Service
from mesh_client.core.store import Resolution
from mesh_client.identity import IdentityState


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


def service_state(service: Service, now: float) -> ServiceState:
    """What a client knows of a service at ``now``, in seconds of its own clock."""
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
