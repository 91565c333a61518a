"""Addresses as operators write them."""

from __future__ import annotations

from mesh_client.core.errors import ConfigError


def split_address(address: str, name: str = "address") -> tuple[str, int]:
    """Host and port of ``host:port``.

    Args:
        address: the text.
        name: what it is, for the error.

    Raises:
        ConfigError: it is something else.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535 or (":" in host) != host.startswith("["):
        raise ConfigError(f"{name}: {address!r} is not allowed; expected host:port, an IPv6 host in brackets")
    return host.removeprefix("[").removesuffix("]"), int(port)
