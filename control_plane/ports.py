"""The gRPC servers of a control plane, before anything is added to them."""

from __future__ import annotations

import grpc.aio

from control_plane.access import Access
from control_plane.gate import Gate
from control_plane.options import ControlPlaneOptions

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Two control planes on one port would each serve half of the clients.
    ("grpc.so_reuseport", 0),
    # Clients ping every 10 s. gRPC's own minimum of 300 s would end their connections with too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that hangs or whose host is gone is noticed within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # With gRPC's default of 1000, many clients that come back at once would be refused.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 16 * 1024),
    # Whoever connects and says nothing is not waited for as long as gRPC would, 120 s. Thousands of clients that come
    # back at once have their handshakes one after another.
    ("grpc.server_handshake_timeout_ms", 30_000),
)

_OF_STRANGERS: tuple[tuple[str, int], ...] = (
    # A request for a certificate is 2 KiB.
    ("grpc.max_receive_message_length", 64 * 1024),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.max_concurrent_streams", 16),
    # Nobody has business there for longer than one request takes.
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
)

_STRANGERS_AT_ONCE = 1_000

_OF_THIS_HOST: tuple[tuple[str, int], ...] = (
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_metadata_size", 8 * 1024),
    # Exporters of others ping by gRPC's own rules.
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
)


def mesh_server(options: ControlPlaneOptions, access: Access) -> grpc.aio.Server:
    """A server for those who have an identity, or for everybody when there are none."""
    ages = (
        ("grpc.max_connection_age_ms", int(options.connection_age * 1000)),
        ("grpc.max_connection_age_grace_ms", int(options.connection_age_grace * 1000)),
    )
    return grpc.aio.server(interceptors=[Gate(access)] if access.secure else (), options=[*SERVER_OPTIONS, *ages])


def enrolment_server() -> grpc.aio.Server:
    """A server for whoever comes: it takes little, and not for long."""
    return grpc.aio.server(
        options=tuple({**dict(SERVER_OPTIONS), **dict(_OF_STRANGERS)}.items()),
        maximum_concurrent_rpcs=_STRANGERS_AT_ONCE,
    )


def otlp_server() -> grpc.aio.Server:
    """A server for processes of this host that send traces without an identity."""
    return grpc.aio.server(
        options=tuple({**dict(SERVER_OPTIONS), **dict(_OF_THIS_HOST)}.items()),
        maximum_concurrent_rpcs=_STRANGERS_AT_ONCE,
    )
