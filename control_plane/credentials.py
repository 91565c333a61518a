"""The one place where the control plane makes its server credentials."""

from __future__ import annotations

import grpc.aio

from mesh_client.core.errors import ConfigError


def add_port(server: grpc.aio.Server, address: str) -> int:
    """Opens a plaintext port on a server that is not started; the port that it got.

    Args:
        server: not started yet.
        address: ``host:port``; port 0 for any free one.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken, or the address is not one of this host"
        ) from None
