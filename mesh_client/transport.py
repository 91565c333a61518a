"""The one place on the client library's side that makes channel and server credentials.

Calls run in plaintext; whoever adds identity changes this file and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

from mesh_client.core.errors import ConfigError

CHANNEL_OPTIONS: tuple[tuple[str, object], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
"""A peer that hangs or vanishes without closing its connection is noticed within 15 s while a call is in flight."""

SERVER_OPTIONS: tuple[tuple[str, object], ...] = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
"""What servers need to be called by `CHANNEL_OPTIONS`: gRPC's own minimum of 300 s between pings would end such
connections with GOAWAY too_many_pings. Without SO_REUSEPORT a port that is taken is an error, not a silent sharing."""


def merge_options(
    defaults: Sequence[tuple[str, object]], overrides: Sequence[tuple[str, object]]
) -> list[tuple[str, object]]:
    """Channel arguments with each key once; an override wins over its default."""
    return list({**dict(defaults), **dict(overrides)}.items())


def open_channel(target: str, options: Sequence[tuple[str, object]] = ()) -> grpc.aio.Channel:
    """A new channel to one target, bound to the running event loop. It connects when first used.

    Args:
        target: ``host:port``, an IPv6 address in brackets.
        options: channel arguments on top of `CHANNEL_OPTIONS`, which they override.
    """
    return grpc.aio.insecure_channel(target, options=merge_options(CHANNEL_OPTIONS, options))


def add_port(server: grpc.aio.Server, address: str) -> int:
    """Opens a port on a server that has not started; the port number, also when ``address`` asked for port 0.

    Raises:
        ConfigError: the port cannot be bound.
    """
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address!r}: the address is not this host's, the port is taken, or it needs privileges; "
            "expected host:port with a free port, or port 0 for any"
        ) from error
