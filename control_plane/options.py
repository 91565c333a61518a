"""What an operator can set."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from control_plane.catalog import CatalogSettings
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.model import check_address


@dataclass(frozen=True, slots=True)
class ControlPlaneOptions:
    """Options of one control plane. Times are in seconds.

    Raises:
        ConfigError: an option is wrong; the message names it.
    """

    address: str = "127.0.0.1:0"
    """Where to listen, ``host:port``; port 0 for any free one. An IPv6 address stands in brackets."""
    registry: str = "embedded"
    """``embedded``, or ``consul://host:port``."""
    data_dir: Path | None = None
    """Where the embedded registry keeps its state. None: in memory, lost at the end."""
    consul_token: str = field(default="", repr=False)
    """ACL token for Consul. Secret: never logged."""
    max_streams: int = 10_000
    """Discovery streams at once; further ones are refused with RESOURCE_EXHAUSTED. 1 to 1000000."""
    debounce_quiet: float = 0.02
    """Changes are published after this long without another one."""
    debounce_maximum: float = 0.2
    """Changes are published after this long at the latest."""
    catalog: CatalogSettings = field(default_factory=CatalogSettings)
    """Mass removal guard, and when services are forgotten."""
    control_plane_id: str = field(default_factory=lambda: f"control-plane-{uuid.uuid4().hex[:8]}")
    """Name of this process in responses and status."""

    def __post_init__(self) -> None:
        split_address(self.address)
        if not 1 <= self.max_streams <= 1_000_000:
            raise ConfigError(f"max_streams: {self.max_streams} is not allowed; expected 1 to 1000000")
        if not 0.0 <= self.debounce_quiet <= self.debounce_maximum:
            raise ConfigError(
                f"debounce_quiet: {self.debounce_quiet} is not allowed; expected 0 to debounce_maximum "
                f"({self.debounce_maximum})"
            )
        if self.registry != "embedded":
            consul_address(self.registry)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535 or (":" in host) != host.startswith("["):
        raise ConfigError(f"address: {address!r} is not allowed; expected host:port, an IPv6 host in brackets")
    return host.removeprefix("[").removesuffix("]"), int(port)


def consul_address(registry: str) -> str:
    """``host:port`` of ``consul://host:port``.

    Raises:
        ConfigError: it is something else.
    """
    scheme, _, address = registry.partition("://")
    try:
        if scheme != "consul":
            raise ConfigError("the scheme is not consul")
        host, port = split_address(address)
        check_address(host)
        if not port:
            raise ConfigError("port 0 is not one to call")
    except (ConfigError, InvalidValueError) as error:
        raise ConfigError(
            f"registry: {registry!r} is not allowed; expected embedded, or consul://host:port ({error})"
        ) from None
    return address
