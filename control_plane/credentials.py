"""The one place where the control plane opens its ports."""

from __future__ import annotations

import grpc
import grpc.aio

from mesh_client.core.errors import ConfigError


def add_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Opens a port on a server that is not started; the port that it got.

    Args:
        server: not started yet.
        address: ``host:port``; port 0 for any free one.
        credentials: what the server shows and asks for; None for plaintext.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise ConfigError(
            f"cannot listen on {address}: the port is taken, or the address is not one of this host"
        ) from None
