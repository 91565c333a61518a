"""A server as operators and tests see it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mesh_client.core.model import Endpoint
from mesh_client.core.registration import RegistrationStatus, Verdict
from mesh_client.identity import IdentityState


class Phase(enum.Enum):
    """Where a server's life stands; it only moves forward."""

    NEW = "new"
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    """Reports NOT_SERVING and waits for its callers to know; every call is still served."""
    STOPPING = "stopping"
    """Takes no new calls; those in flight have the grace period."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """A server in plain data."""

    service: str
    instance_id: str
    phase: Phase
    endpoint: Endpoint | None
    """What is registered; None before the start."""
    health: Verdict
    """What the last self-check found; not healthy before the start and once it is leaving."""
    registration: RegistrationStatus
    in_flight: int
    """Calls being served."""
    denied: int
    """Calls refused because of who called: no identity of the mesh, revoked, or allowed by no authorization rule."""
    identity: IdentityState | None
    """Who it is in the mesh; None in plaintext, where nobody is anybody."""
