"""What the rest of the library knows of this process's identity: who it is, and its credentials of now."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from mesh_client.core.identity import Principal


@dataclass(frozen=True, slots=True)
class IdentityState:
    """A process's identity in plain data, for operators and tests."""

    spiffe_id: str
    """Who it is; who it means to be while it has no certificate."""
    workload_id: str = ""
    """Constant through renewals; empty while there is no certificate, as everything below."""
    serial: str = ""
    """Serial number of the certificate, lower-case hex."""
    expires: float | None = None
    """When the certificate does, as seconds since the epoch."""
    root: str = ""
    """SHA-256 of the trusted root that the certificate leads up to, lower-case hex."""
    bundle_version: str = ""
    """Of the trust bundle in force."""
    last_error: str = ""
    """Why the last attempt to get or renew the certificate, or to follow the trust bundle, failed; empty since one
    succeeded."""
    warning: str = ""
    """What an operator should know now: that expiry nears and nothing renews, or that there is no certificate."""


@dataclass(frozen=True, slots=True)
class PemCredentials:
    """What a program that is no part of this process needs to speak as this workload, each part in PEM."""

    certificate: bytes = field(repr=False)
    """The leaf first, without the root."""
    key: bytes = field(repr=False)
    """PKCS #8. Secret: for files that others cannot read, and for whoever must show the certificate."""
    roots: bytes = field(repr=False)
    """Whom to trust."""


class Identity(Protocol):
    """A process's identity: its key, its certificate, and whom it trusts. Bound to the event loop that started it."""

    @property
    def principal(self) -> Principal:
        """Who it is, or means to be while there is no certificate."""

    @property
    def generation(self) -> int:
        """0 before the first certificate; grows with each new certificate or set of roots."""

    @property
    def problem(self) -> str:
        """Why there is no certificate, in words; empty when there is one. One that has expired is still one."""

    @property
    def failing(self) -> bool:
        """Whether there is a problem, and everything that could solve it has been tried once and failed."""

    @property
    def revoked(self) -> frozenset[str]:
        """Ids of revoked workloads, whose calls are refused."""

    async def start(self) -> None:
        """Begins to get a certificate and to keep it fresh, in the background. Each start is matched by one `stop`.

        Raises:
            ConfigError: its files are unsafe, another's, or used by another process.
        """

    async def stop(self) -> None:
        """Ends what `start` began."""

    async def ready(self) -> None:
        """Returns once there is a certificate.

        Raises:
            IdentityError: there was none within a bound; the message says why.
        """

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Calls back, in the event loop, when anything of the above has changed. Returns what ends that."""

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """The same object for one generation, so that its channels can share connections.

        Raises:
            IdentityError: there is no certificate.
        """

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        """For handshakes from now on. May be called from any thread.

        Raises:
            IdentityError: there is no certificate.
        """

    def pem(self) -> PemCredentials:
        """For programs that speak in this workload's name, such as an edge. They follow `generation`.

        Raises:
            IdentityError: there is no certificate.
        """

    def confirm_after(self, applied: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        """For whoever hands credentials on: trust bundles are acknowledged once this has returned as well.

        So that nobody takes a root for trusted by everybody before it is. Returns what ends that.

        Args:
            applied: returns when the credentials of now are in force there. It may take any time.
        """

    def state(self, now: float) -> IdentityState:
        """As it is at ``now``, seconds since the epoch."""

    def describe(self, now: float) -> str:
        """In a few words, for explanations of failed calls, such as ``certificate valid for 23 h``."""
