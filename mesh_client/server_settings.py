"""What a server is to be."""

from __future__ import annotations

from dataclasses import dataclass

from mesh_client.addresses import HostPort, Registry
from mesh_client.core.model import Endpoint


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server is to be, validated, with the environment's part in it."""

    service: str
    control_planes: tuple[str, ...]
    registry: Registry
    bind: HostPort
    advertised: HostPort | None
    endpoint: Endpoint
    """The endpoint with a placeholder for address and port."""
    drain_timeout: float
    grace: float
    check_interval: float
    reflection: bool
    access_log: float | None
    """Share of successful calls that is logged; None for no access log."""
