"""A certificate authority on real ports, and workloads with certificates of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mesh.v1 import authority_pb2_grpc, certificate_pb2, certificate_pb2_grpc

from control_plane.access import Access
from control_plane.identity import ca
from control_plane.identity.certificate_authority import CertificateAuthority
from control_plane.identity.options import IdentityOptions
from control_plane.identity.services import add_enrolment_services, add_mesh_services
from mesh_client.core.identity import Principal

TIMEOUT = 30.0
"""Seconds for anything."""


class Clock:
    """The system's clock, which can be set."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def request_for(
    key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType, subject: x509.Name | None = None
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject or x509.Name([]))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def to_pem(certificates: Any) -> bytes:
    return b"".join(
        x509.load_der_x509_certificate(each).public_bytes(serialization.Encoding.PEM) for each in certificates
    )


@dataclass(frozen=True, slots=True)
class Workload:
    """Somebody with a certificate."""

    key: bytes
    chain: bytes
    roots: bytes

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.chain)

    @property
    def workload_id(self) -> str:
        return self.certificate.subject.rfc4514_string().removeprefix("CN=")

    @property
    def id(self) -> str:
        return self.certificate.subject.rfc4514_string().removeprefix("CN=")

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.roots, self.key, self.chain)


@dataclass(frozen=True, slots=True)
class Plane:
    """One control plane's identity part, served."""

    authority: CertificateAuthority
    access: Access
    clock: Clock
    enrolment_port: int
    mesh_port: int

    @property
    def name(self) -> str:
        return Principal.control_plane(self.authority.trust_domain).dns_name

    def channel(self, port: int, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
        options = [("grpc.ssl_target_name_override", self.name), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)

    @asynccontextmanager
    async def enrolment(self) -> AsyncIterator[certificate_pb2_grpc.CertificateServiceAsyncStub]:
        async with self.channel(self.enrolment_port, grpc.ssl_channel_credentials(self.authority.roots_pem)) as channel:
            yield certificate_pb2_grpc.CertificateServiceStub(channel)

    @asynccontextmanager
    async def mesh(self, workload: Workload) -> AsyncIterator[certificate_pb2_grpc.CertificateServiceAsyncStub]:
        async with self.channel(self.mesh_port, workload.credentials) as channel:
            yield certificate_pb2_grpc.CertificateServiceStub(channel)

    @asynccontextmanager
    async def operators(self, workload: Workload) -> AsyncIterator[authority_pb2_grpc.AuthorityServiceAsyncStub]:
        async with self.channel(self.mesh_port, workload.credentials) as channel:
            yield authority_pb2_grpc.AuthorityServiceStub(channel)

    async def token(self, service: str = "orders", ttl: float = 3600.0, uses: int = 1) -> str:
        return (await self.authority.create_token(service, ttl, uses, "spiffe://mesh.internal/operator/test")).text

    async def join(self, service: str = "orders") -> Workload:
        """A workload that has enrolled by a fresh token."""
        key = new_key()
        request = certificate_pb2.SignCertificateRequest(
            certificate_signing_request=request_for(key), service=service, join_token=await self.token(service)
        )
        async with self.enrolment() as stub:
            return signed(key, await stub.SignCertificate(request, timeout=TIMEOUT))

    async def renew(self, workload: Workload, service: str = "") -> Workload:
        key = new_key()
        request = certificate_pb2.SignCertificateRequest(certificate_signing_request=request_for(key), service=service)
        async with self.mesh(workload) as stub:
            return signed(key, await stub.SignCertificate(request, timeout=TIMEOUT))

    def forged(self, principal: Principal, *, starts: float = 0.0, ends: float = 3600.0) -> Workload:
        """What the issuer itself never signs: a certificate for anybody, for any time from now."""
        key, now = new_key(), time.time()
        leaf = ca.issue(
            self.authority._authority.state.issuer,
            principal,
            "0123456789abcdef",
            key.public_key(),
            serial=1,
            now=now,
            ends=now + ends,
        )
        if starts:
            builder = x509.CertificateBuilder(
                leaf.certificate.issuer,
                leaf.certificate.subject,
                key.public_key(),
                2,
                leaf.certificate.not_valid_before_utc + dt.timedelta(seconds=starts),
                leaf.certificate.not_valid_before_utc + dt.timedelta(seconds=starts + 3600),
                list(leaf.certificate.extensions),
            )
            signed_later = builder.sign(leaf.issuer.key, hashes.SHA256())
            leaf = dataclasses.replace(leaf, certificate=signed_later)
        return Workload(key_pem(key), leaf.chain_pem(), self.authority.roots_pem)

    async def operator(self, directory: Path, name: str = "alice") -> Workload:
        files = await self.authority.create_operator(name, directory / f"operator-{name}")
        return Workload(files.key.read_bytes(), files.chain.read_bytes(), files.roots.read_bytes())


def signed(key: ec.EllipticCurvePrivateKey, answer: certificate_pb2.SignCertificateResponse) -> Workload:
    return Workload(key_pem(key), to_pem(answer.certificate_chain), to_pem(answer.trust_bundle.roots))


class Watch:
    """A stream of the trust bundle that acknowledges what it gets, once told to."""

    def __init__(self, stub: certificate_pb2_grpc.CertificateServiceAsyncStub) -> None:
        self._call = stub.WatchTrustBundle(timeout=6 * TIMEOUT)

    async def begin(self, version: str = "") -> certificate_pb2.TrustBundle:
        await self._call.write(certificate_pb2.WatchTrustBundleRequest(version=version))
        return await self.next()

    async def next(self) -> certificate_pb2.TrustBundle:
        async with asyncio.timeout(TIMEOUT):
            answer = await self._call.read()
        assert isinstance(answer, certificate_pb2.WatchTrustBundleResponse)
        return answer.trust_bundle

    async def acknowledge(self, version: str) -> None:
        await self._call.write(certificate_pb2.WatchTrustBundleRequest(version=version))

    async def end(self) -> None:
        await self._call.done_writing()
        async with asyncio.timeout(TIMEOUT):
            while await self._call.read() is not grpc.aio.EOF:
                pass  # what was under way
        assert await self._call.code() is grpc.StatusCode.OK

    async def code(self) -> grpc.StatusCode:
        """How it ends, whatever comes before."""
        async with asyncio.timeout(TIMEOUT):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self._call.read() is not grpc.aio.EOF:
                    pass
            return await self._call.code()


async def until(condition: Callable[[], Any]) -> None:
    """Returns once an awaitable condition holds."""
    async with asyncio.timeout(TIMEOUT):
        while not await condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def opened(
    options: IdentityOptions | None = None, clock: Clock | None = None
) -> AsyncIterator[CertificateAuthority]:
    """A certificate authority without ports."""
    authority = CertificateAuthority(options or IdentityOptions(), clock or Clock())
    await authority.open()
    try:
        yield authority
    finally:
        await authority.close()


@asynccontextmanager
async def plane(options: IdentityOptions | None = None) -> AsyncIterator[Plane]:
    """A certificate authority on its two ports."""
    clock = Clock()
    async with opened(options, clock) as authority:
        access = Access(authority.trust_domain, authority)
        unsubscribe = authority.on_change(access.cut_revoked)
        enrolment, mesh = grpc.aio.server(), grpc.aio.server()
        add_enrolment_services(authority, enrolment)
        add_mesh_services(authority, mesh, access)
        ports = (
            enrolment.add_secure_port("127.0.0.1:0", authority.enrolment_credentials()),
            mesh.add_secure_port("127.0.0.1:0", authority.mesh_credentials()),
        )
        await enrolment.start()
        await mesh.start()
        try:
            yield Plane(authority, access, clock, *ports)
        finally:
            unsubscribe()
            await asyncio.gather(enrolment.stop(0), mesh.stop(0))
