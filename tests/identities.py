"""An identity whose certificates a test makes: what `mesh_client.identity.workload` gets from a control plane."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import grpc

from mesh_client.core.errors import IdentityError
from mesh_client.core.identity import Principal
from mesh_client.identity import IdentityState, PemCredentials
from tests.certificates import Certificate, TestAuthority


class TestIdentity:
    """Has what `take` gave it last. Bound to the running event loop once it has started.

    Args:
        principal: who it is.
        authority: signs its first certificate and is trusted; None for an identity that has no certificate yet.
    """

    __test__ = False

    def __init__(self, principal: Principal, authority: TestAuthority | None) -> None:
        self.principal = principal
        self.generation = 0
        self.revoked: frozenset[str] = frozenset()
        self.users = 0
        self.hopeless = True
        """Whether everything has been tried while there is no certificate."""
        self.workload_id = ""
        self._callbacks: list[Callable[[], None]] = []
        self._arrived = asyncio.Event()
        self._credentials: tuple[Certificate, bytes] | None = None
        if authority is not None:
            self.take(authority.issue(principal), authority.roots)

    @property
    def problem(self) -> str:
        return "" if self._credentials is not None else "the test has given no certificate"

    @property
    def failing(self) -> bool:
        return bool(self.problem) and self.hopeless

    def take(self, certificate: Certificate, roots: bytes) -> None:
        """Has this certificate and trusts these roots from now on."""
        self._credentials = (certificate, roots)
        self._configuration = grpc.ssl_server_certificate_configuration([(certificate.key, certificate.chain)], roots)
        self._channel_credentials = certificate.channel_credentials(roots)
        self.workload_id = certificate.workload_id
        self.generation += 1
        self._arrived.set()
        self._changed()

    def revoke(self, *workload_ids: str) -> None:
        """These workloads are revoked."""
        self.revoked = frozenset(workload_ids)
        self._changed()

    def _changed(self) -> None:
        for callback in tuple(self._callbacks):
            callback()

    async def start(self) -> None:
        self.users += 1

    async def stop(self) -> None:
        self.users -= 1

    async def ready(self) -> None:
        try:
            async with asyncio.timeout(0.2):
                await self._arrived.wait()
        except TimeoutError:
            raise IdentityError(self.problem) from None

    def on_change(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        if self.problem:
            raise IdentityError(self.problem)
        return self._channel_credentials

    def server_configuration(self) -> grpc.ServerCertificateConfiguration:
        if self.problem:
            raise IdentityError(self.problem)
        return self._configuration

    def confirm_after(self, applied: Callable[[], Awaitable[None]]) -> Callable[[], None]:
        return lambda: None

    def pem(self) -> PemCredentials:
        if self._credentials is None:
            raise IdentityError(self.problem)
        certificate, roots = self._credentials
        return PemCredentials(certificate.chain, certificate.key, roots)

    def state(self, now: float) -> IdentityState:
        return IdentityState(self.principal.spiffe_id, self.workload_id)

    def describe(self, now: float) -> str:
        return f"a certificate of the test, {now - time.time():.0f} s"
