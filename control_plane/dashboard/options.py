"""Where the dashboard listens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from control_plane.addresses import split_address
from control_plane.dashboard.requests import is_loopback
from mesh_client.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DashboardOptions:
    """Options of the dashboard.

    Raises:
        ConfigError: an option is wrong; the message names it.
    """

    address: str
    """``host:port``; port 0 for any free one."""
    certificate: Path | None = None
    """PEM file of the chain that it shows to browsers, the leaf first. None: plaintext, on the loopback interface."""
    key: Path | None = None
    """PEM file of its key, with mode 0600."""

    def __post_init__(self) -> None:
        split_address(self.address, "dashboard_listen")
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("dashboard_certificate and dashboard_key: give both or none")

    def check(self, *, insecure: bool) -> None:
        """Whether nobody but operators can reach what is shown.

        Args:
            insecure: there are no identities, so nobody can sign in.

        Raises:
            ConfigError: others could.
        """
        host, _ = split_address(self.address, "dashboard_listen")
        if is_loopback(host):
            return
        if insecure:
            raise ConfigError(
                f"dashboard_listen: {self.address!r} can be reached from other hosts, and without identity (insecure) "
                "whoever reaches it may do everything; listen on 127.0.0.1, or run the control plane with identity"
            )
        if self.certificate is None:
            raise ConfigError(
                f"dashboard_listen: {self.address!r} can be reached from other hosts, and what is sent there in "
                "plaintext can be read on the way; give dashboard_certificate and dashboard_key, or listen on 127.0.0.1"
            )
