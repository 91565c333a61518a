"""A real certificate authority on real ports, and the identities of workloads that ask it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509

from control_plane.access import Access
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.certificate_authority import CertificateAuthority
from control_plane.identity.options import IdentityOptions
from control_plane.identity.services import add_enrolment_services, add_mesh_services
from mesh_client.core.caller import Caller
from mesh_client.identity.settings import IdentitySettings, identity_settings
from mesh_client.identity.workload import WorkloadIdentity
from mesh_client.testing import InMemoryControlPlane
from mesh_client.transport import SERVER_OPTIONS
from tests.ports import held_address

PATIENCE = 20.0
"""Seconds that a condition may take to come true."""


def at_once(failures: int, rng: Random, *, refused: bool) -> float:
    """Waits between attempts that tests have time for; those after refusals differ by their length."""
    del failures, rng
    return 0.2 if refused else 0.02


async def until(identity: WorkloadIdentity, condition: Callable[[], bool]) -> None:
    """Returns when the condition holds; it is looked at after each change of the identity."""
    changed = asyncio.Event()
    unsubscribe = identity.on_change(changed.set)
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await changed.wait()
                changed.clear()
    finally:
        unsubscribe()


def messages(caplog: pytest.LogCaptureFixture, least: int = logging.WARNING) -> list[str]:
    """What has been logged by the library, from a level on."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= least and record.name.startswith("mesh_client")
    ]


class WatchedAuthority(CertificateAuthority):
    """Tells a test what workloads acknowledge."""

    def __init__(self, options: IdentityOptions) -> None:
        super().__init__(options)
        self._confirmed = asyncio.Event()

    async def confirm(self, workload_id: str, bundle: TrustBundle) -> None:
        await super().confirm(workload_id, bundle)
        self._tell()

    async def note(self, caller: Caller, chain: list[x509.Certificate]) -> None:
        await super().note(caller, chain)
        self._tell()

    def _tell(self) -> None:
        event, self._confirmed = self._confirmed, asyncio.Event()
        event.set()

    async def confirmed(self) -> None:
        """Returns once every workload has the bundle of now in force, and was seen below its newest root."""
        async with asyncio.timeout(PATIENCE):
            while True:
                event = self._confirmed
                if all(
                    known.bundle_version == self.bundle.version and known.seen_root == known.root
                    for known in (await self.status()).workloads
                ):
                    return
                await event.wait()


@dataclass
class IdentityRig:
    """A certificate authority with its two ports, which a test takes away and gives back."""

    authority: WatchedAuthority
    stack: AsyncExitStack
    enrolment: str
    mesh: str
    plane: InMemoryControlPlane = field(default_factory=InMemoryControlPlane)
    _enrolment_server: grpc.aio.Server | None = None
    _mesh_server: grpc.aio.Server | None = None

    async def open_enrolment(self) -> None:
        """Opens the enrolment port, always at the same address."""
        server = self._enrolment_server = grpc.aio.server(options=SERVER_OPTIONS)
        add_enrolment_services(self.authority, server)
        server.add_secure_port(self.enrolment, self.authority.enrolment_credentials())
        await server.start()

    async def open_mesh(self, options: tuple[tuple[str, Any], ...] = ()) -> None:
        """Opens the mesh port, likewise."""
        server = self._mesh_server = grpc.aio.server(options=[*SERVER_OPTIONS, *options])
        access = Access(self.authority.trust_domain, self.authority)
        self.stack.callback(self.authority.on_change(access.cut_revoked))
        add_mesh_services(self.authority, server, access)
        self.plane.add_to(server)
        server.add_secure_port(self.mesh, self.authority.mesh_credentials())
        await server.start()

    async def close_enrolment(self) -> None:
        """Takes the enrolment port away."""
        server, self._enrolment_server = self._enrolment_server, None
        if server is not None:
            await server.stop(None)

    async def close_mesh(self) -> None:
        """Takes the mesh port away."""
        server, self._mesh_server = self._mesh_server, None
        if server is not None:
            await server.stop(None)

    async def token(self, service: str = "orders", *, uses: int = 1, ttl: float = 600.0) -> str:
        """A new join token."""
        return (await self.authority.create_token(service, ttl, uses, "spiffe://mesh.internal/operator/test")).text

    def settings(self, service: str = "orders", **options: Any) -> IdentitySettings:
        """Settings towards this authority."""
        options = {"enrolment": self.enrolment, "insecure": False, **options}
        settings = identity_settings(service, (self.mesh,), **options)
        assert settings is not None
        return settings

    def identity(self, settings: IdentitySettings, **options: Any) -> WorkloadIdentity:
        """An identity that has not started, quick to try again."""
        return WorkloadIdentity(settings, **{"rng": Random(7), "retry": at_once, **options})

    @asynccontextmanager
    async def joined(self, service: str = "orders", **options: Any) -> AsyncIterator[WorkloadIdentity]:
        """An identity that has its certificate and follows the trust bundle."""
        identity = self.identity(self.settings(service, **{"token": await self.token(service), **options}))
        await identity.start()
        try:
            await identity.ready()
            yield identity
        finally:
            await identity.stop()


@asynccontextmanager
async def open_rig(directory: Path | None = None, **options: Any) -> AsyncIterator[IdentityRig]:
    """A rig with both ports open. Renewals are not limited, so that short lives can be tested."""
    options = {"data_dir": directory, "renewals_per_second": 1000.0, **options}
    authority = WatchedAuthority(dataclasses.replace(IdentityOptions(), **options))
    await authority.open()
    try:
        async with AsyncExitStack() as stack:
            enrolment, mesh = (stack.enter_context(held_address()) for _ in range(2))
            rig = IdentityRig(authority, stack, enrolment, mesh)
            await rig.open_enrolment()
            await rig.open_mesh()
            stack.push_async_callback(rig.close_enrolment)
            stack.push_async_callback(rig.close_mesh)
            yield rig
    finally:
        await authority.close()
