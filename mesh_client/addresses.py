"""Addresses as people write them: where a server listens, what it tells others to call, which registry it uses."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.model import check_address

CONTROL_PLANE_VARIABLE = "MESH_CONTROL_PLANE"
CONSUL_PORT = 8500
"""Of agents whose address has no port."""
REGISTRY_VARIABLE = "MESH_REGISTRY"


@dataclass(frozen=True, slots=True)
class HostPort:
    """A host and a port; an IPv6 address is held without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def wildcard(self) -> bool:
        """Whether it stands for every address of the host, and so is no address that others can call."""
        try:
            return ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False


def parse_host_port(text: str, name: str, *, lowest_port: int = 1) -> HostPort:
    """The host and port that ``host:port`` or ``[ipv6]:port`` states.

    Args:
        text: the text.
        name: what it is, for the error.
        lowest_port: 0 where "any free port" is allowed.

    Raises:
        ConfigError: it is neither, or the port is out of range.
    """
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not (port.isascii() and port.isdigit()) or not lowest_port <= int(port) <= 65535:
        raise ConfigError(f"{name}: {text!r} is not allowed; expected host:port with a port of {lowest_port} to 65535")
    result = HostPort(host, int(port))
    if bracketed != (":" in host):
        raise ConfigError(f"{name}: {text!r} is not allowed; expected an IPv6 address in brackets, as [::1]:port")
    if not result.wildcard:
        try:
            check_address(host, name)
        except InvalidValueError as error:
            raise ConfigError(str(error)) from None
    elif lowest_port:
        raise ConfigError(f"{name}: {text!r} is not allowed; expected an address that can be called")
    return result


def parse_control_planes(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Control-plane addresses from an argument, else from ``MESH_CONTROL_PLANE``; empty when neither names any.

    Raises:
        ConfigError: one of them is not ``host:port``.
    """
    if value is None:
        value = os.environ.get(CONTROL_PLANE_VARIABLE, "")
        name = CONTROL_PLANE_VARIABLE
    else:
        name = "control_plane"
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(dict.fromkeys(str(parse_host_port(part, name)) for part in parts if part.strip()))


@dataclass(frozen=True, slots=True)
class Registry:
    """Where a server registers.

    Attributes:
        kind: ``control-plane``, ``consul`` or ``none``.
        agent: the Consul agent, for ``consul``.
    """

    kind: str
    agent: HostPort | None = None


def parse_registry(value: str | None) -> Registry:
    """The registry from an argument, else from ``MESH_REGISTRY``, else the control plane's own.

    Control planes read the variable as well: what they call ``embedded`` is ``control-plane`` to a server. They take
    several Consul agents, ``consul://host:port,host:port``; a server registers with one, the first: with a second one
    its instance would be in the catalog twice once the first came back.

    Raises:
        ConfigError: it is none of ``control-plane``, ``embedded``, ``consul://host:port`` and ``none``.
    """
    name = "registry" if value is not None else REGISTRY_VARIABLE
    text = value if value is not None else os.environ.get(REGISTRY_VARIABLE) or "control-plane"
    if text in ("control-plane", "embedded", "none"):
        return Registry("none" if text == "none" else "control-plane")
    if text.startswith("consul://"):
        hosts = text.removeprefix("consul://").rstrip("/").split(",")
        agents = [parse_host_port(_with_consul_port(host.strip()), name) for host in hosts]
        return Registry("consul", agents[0])
    raise ConfigError(f"{name}: {text!r} is not allowed; expected control-plane, consul://host:port or none")


def _with_consul_port(host: str) -> str:
    return host if host.rpartition("]")[2].count(":") else f"{host}:{CONSUL_PORT}"


def address_towards(peer: HostPort) -> str:
    """This host's own address on the way to ``peer``. Resolves names, so it may block; sends nothing.

    Connecting a datagram socket only asks the kernel for a route (connect(2)).

    Raises:
        ConfigError: there is no route.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(peer.host, peer.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"cannot tell which of this host's addresses others should call: no route to {peer} ({error}); "
            "give advertise=host or a listening address that is not a wildcard"
        ) from error


def parse_peer_ip(peer: str) -> str:
    """The address in a gRPC peer string such as ``ipv4:10.0.0.7:5123`` or ``ipv6:%5B::1%5D:5123``; else empty."""
    kind, _, rest = peer.partition(":")
    if kind == "ipv4":
        return rest.rpartition(":")[0]
    if kind == "ipv6":
        return unquote(rest).rpartition(":")[0].strip("[]").partition("%")[0]
    return ""
