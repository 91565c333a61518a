"""The one place on the client library's side that makes channel and server credentials.

A `Transport` opens every channel and every port of the library: `PlaintextTransport` when plaintext was asked for by
name, `MutualTls` otherwise. Neither ever falls back to the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import grpc
import grpc.aio

from mesh_client import grpc_makers
from mesh_client.core.errors import ConfigError
from mesh_client.core.identity import Principal
from mesh_client.identity import Identity

log = logging.getLogger(__name__)

CHANNEL_OPTIONS: tuple[tuple[str, object], ...] = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)
"""A peer that hangs or vanishes without closing its connection is noticed within 15 s while a call is in flight."""

STREAM_OPTIONS: tuple[tuple[str, object], ...] = (
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)
"""Of long streams from a control plane. One that hangs is noticed by keepalive. Its snapshots are trusted in size."""

MAX_METADATA = 64 << 10
"""Bytes of metadata that a request to a server may have, with 32 for each entry. Edges let less pass. By default
gRPC refuses some requests of more than 8 KiB, at random, and all of more than 16."""

SERVER_OPTIONS: tuple[tuple[str, object], ...] = (
    ("grpc.max_metadata_size", MAX_METADATA),
    ("grpc.absolute_max_metadata_size", MAX_METADATA),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 30_000),
)
"""What servers need to be called by `CHANNEL_OPTIONS`: gRPC's own minimum of 300 s between pings would end such
connections with GOAWAY too_many_pings. Without SO_REUSEPORT a port that is taken is an error, not a silent sharing.
Whoever connects and says nothing is not waited for as long as gRPC would, 120 s."""

CONTEXT_LIFE = 60.0
"""Seconds for which a server resumes TLS sessions, and so the time by which a client can outlive its certificate."""

CONTROL_PLANE = "mesh:control-plane"
"""The control plane in place of a service's name, as `Principal.caller` writes it. No service has such a name."""


class Transport(Protocol):
    """Opens channels and ports. Bound to the event loop that started it."""

    @property
    def secure(self) -> bool:
        """Whether both sides of every connection prove who they are."""

    @property
    def identity(self) -> Identity | None:
        """Who this process is; None in plaintext, where nobody is anybody."""

    @property
    def problem(self) -> str:
        """Why no channel and no port can be opened now, in words; empty when they can."""

    @property
    def failing(self) -> bool:
        """Whether there is a problem, and everything that could solve it has been tried once and failed."""

    async def start(self) -> None:
        """Begins to get an identity, in the background. Each start is matched by one `stop`.

        Raises:
            ConfigError: its files are unsafe, another's, or used by another process.
        """

    async def stop(self) -> None:
        """Ends what `start` began. Channels and ports that are open stay so."""

    async def ready(self) -> None:
        """Returns when channels and ports can be opened.

        Raises:
            IdentityError: they could not within a bound; the message says why.
        """

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back, in the event loop, whenever `problem`, the credentials or the revoked workloads have changed.

        Returns what ends that.
        """

    @property
    def generation(self) -> int:
        """Grows with each change of credentials. Channels opened before still use the old ones."""

    def open_channel(self, target: str, server: str, options: Sequence[tuple[str, object]] = ()) -> grpc.aio.Channel:
        """A new channel, bound to the running event loop. It connects when first used.

        Args:
            target: ``host:port``, an IPv6 address in brackets.
            server: who must be there: a service's name, or `CONTROL_PLANE`.
            options: channel arguments on top of `CHANNEL_OPTIONS`, which they override.

        Raises:
            IdentityError: there is a `problem`.
        """

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Opens a port on a server that has not started; the port number, also when ``address`` asked for port 0.

        Raises:
            ConfigError: the port cannot be bound.
            IdentityError: there is a `problem`.
        """


class PlaintextTransport:
    """Neither encrypted nor authenticated. For those who asked for it."""

    secure = False
    identity = None
    problem = ""
    failing = False
    generation = 0

    async def start(self) -> None:
        """Warns."""
        log.warning("insecure, as asked: calls of this process are in plaintext, and nobody proves who they are")

    async def stop(self) -> None:
        """Nothing to do."""

    async def ready(self) -> None:
        """Returns at once."""

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Never calls back."""
        return lambda: None

    def open_channel(self, target: str, server: str, options: Sequence[tuple[str, object]] = ()) -> grpc.aio.Channel:
        """A new channel; whoever answers is taken for the server."""
        return open_channel(target, options)

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Opens a port; whoever calls it is served."""
        return add_port(server, address)


class MutualTls:
    """Both sides of every connection show a certificate of the mesh, and clients check the name of whom they meant."""

    secure = True

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    @property
    def problem(self) -> str:
        """Why there is no certificate yet."""
        return self.identity.problem

    @property
    def failing(self) -> bool:
        """Whether everything has been tried to get one."""
        return self.identity.failing

    @property
    def generation(self) -> int:
        """The identity's."""
        return self.identity.generation

    async def start(self) -> None:
        """Starts the identity.

        Raises:
            ConfigError: its files are unsafe, another's, or used by another process.
        """
        await self.identity.start()

    async def stop(self) -> None:
        """Stops the identity."""
        await self.identity.stop()

    async def ready(self) -> None:
        """Returns once there is a certificate.

        Raises:
            IdentityError: there was none within a bound; the message says why.
        """
        await self.identity.ready()

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back at each change of the identity."""
        return self.identity.on_change(callback)

    def open_channel(self, target: str, server: str, options: Sequence[tuple[str, object]] = ()) -> grpc.aio.Channel:
        """A new channel that speaks with nobody but the server that is meant.

        Raises:
            IdentityError: there is no certificate yet.
        """
        # The name is last, so that nothing overrides it.
        merged = merge_options(merge_options(CHANNEL_OPTIONS, options), authenticating_options(self._dns_name(server)))
        return grpc_makers.secure_channel(target, self.identity.channel_credentials(), options=merged)

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Opens a port that speaks with nobody but holders of a certificate of the mesh.

        Each new connection gets the certificate and the roots of that moment.

        Raises:
            ConfigError: the port cannot be bound.
            IdentityError: there is no certificate yet.
        """
        current = CurrentConfiguration(self.identity)
        # Grpc takes None for "no change"; its type information does not say so.
        fetch = cast("Callable[[], grpc.ServerCertificateConfiguration]", current.news)
        credentials = grpc.dynamic_ssl_server_credentials(
            current.configuration, fetch, require_client_authentication=True
        )
        return _bind(lambda: server.add_secure_port(address, credentials), address)

    def _dns_name(self, server: str) -> str:
        trust_domain = self.identity.principal.trust_domain
        if server == CONTROL_PLANE:
            return Principal.control_plane(trust_domain).dns_name
        return Principal.service(trust_domain, server).dns_name


class CurrentConfiguration:
    """What a port shows and trusts, asked for by grpc at each handshake, in threads of its own.

    Grpc makes a TLS context of each configuration, which is too much work for each handshake. But it resumes sessions
    of a context for two days, without looking at the client's certificate again: one that has ended since would do.
    So contexts are made anew every `CONTEXT_LIFE` seconds, changed or not.

    Args:
        identity: has the configuration.
        clock: seconds, monotonic.
    """

    def __init__(self, identity: Identity, clock: Callable[[], float] = time.monotonic) -> None:
        self._identity = identity
        self._clock = clock
        self._made_at = clock()
        self.configuration = identity.server_configuration()

    def news(self) -> grpc.ServerCertificateConfiguration | None:
        """The configuration if a context is to be made of it; None to go on with the last one."""
        configuration, now = self._identity.server_configuration(), self._clock()
        if configuration is self.configuration and now < self._made_at + CONTEXT_LIFE:
            return None
        self.configuration, self._made_at = configuration, now
        return configuration


def merge_options(
    defaults: Sequence[tuple[str, object]], overrides: Sequence[tuple[str, object]]
) -> list[tuple[str, object]]:
    """Channel arguments with each key once; an override wins over its default."""
    return list({**dict(defaults), **dict(overrides)}.items())


def authenticating_options(dns_name: str) -> tuple[tuple[str, object], ...]:
    """Channel arguments by which the other side's certificate must carry this DNS name, whatever its address is."""
    return (("grpc.ssl_target_name_override", dns_name), ("grpc.default_authority", dns_name))


def open_channel(target: str, options: Sequence[tuple[str, object]] = ()) -> grpc.aio.Channel:
    """A new plaintext channel to one target, bound to the running event loop. It connects when first used.

    Args:
        target: ``host:port``, an IPv6 address in brackets.
        options: channel arguments on top of `CHANNEL_OPTIONS`, which they override.
    """
    return grpc_makers.insecure_channel(target, options=merge_options(CHANNEL_OPTIONS, options))


def add_port(server: grpc.aio.Server, address: str) -> int:
    """Opens a plaintext port on a server that has not started; its number, also when ``address`` asked for port 0.

    Raises:
        ConfigError: the port cannot be bound.
    """
    return _bind(lambda: server.add_insecure_port(address), address)


def _bind(bind: Callable[[], int], address: str) -> int:
    try:
        return bind()
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address!r}: the address is not this host's, the port is taken, or it needs privileges; "
            "expected host:port with a free port, or port 0 for any"
        ) from error
