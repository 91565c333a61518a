"""What an operator can set about traces."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from control_plane.traces.allowance import ReportLimits
from control_plane.traces.links import TraceLinks
from control_plane.traces.store import TraceLimits
from mesh_client.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Settings of one trace view.

    Raises:
        ConfigError: one is wrong; the message names it.
    """

    limits: TraceLimits | None = field(default_factory=TraceLimits)
    """What is kept. None: nothing, and nobody may send any."""
    report_limits: ReportLimits = field(default_factory=ReportLimits)
    """What may be sent."""
    otlp_address: str | None = None
    """``host:port`` of a port that takes OTLP in plaintext from processes of this host that have no identity in the
    mesh; loopback alone. None: there is no such port."""
    jaeger_ui: str = ""
    """Where people open Jaeger, for links. Empty: nowhere."""

    def __post_init__(self) -> None:
        TraceLinks(self.jaeger_ui)
        if self.otlp_address is None:
            return
        if self.limits is None:
            raise ConfigError("otlp_address: no traces are kept, so nobody can send any; leave it out")
        host = self.otlp_address.rpartition(":")[0].removeprefix("[").removesuffix("]")
        if host != "localhost" and not _is_loopback(host):
            raise ConfigError(
                f"otlp_address: {self.otlp_address!r} is not allowed: what comes there is in plaintext and from "
                "anybody, so it is on the loopback interface alone; expected 127.0.0.1:4317 or [::1]:4317"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
