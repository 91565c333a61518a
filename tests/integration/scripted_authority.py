"""Control planes that give, refuse or spoil certificates as a test says: real ports, real certificates, real lies."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mesh.v1 import certificate_pb2, certificate_pb2_grpc

from mesh_client.core.identity import Principal
from mesh_client.identity.certificates import fingerprint, from_pem
from tests.certificates import Certificate, TestAuthority

ORDERS = Principal.service("mesh.internal", "orders")

Request = certificate_pb2.SignCertificateRequest
Response = certificate_pb2.SignCertificateResponse
Context = grpc.aio.ServicerContext[Any, Any]


def root_of(authority: TestAuthority) -> bytes:
    """Its root, DER."""
    (root,) = from_pem(authority.roots)
    return root


def bundle_of(authority: TestAuthority, **changes: Any) -> certificate_pb2.TrustBundle:
    """A trust bundle of its one root."""
    root = root_of(authority)
    stated: dict[str, Any] = {
        "trust_domain": authority.trust_domain,
        "version": "v1",
        "roots": [root],
        "signing_root": fingerprint(root),
    }
    return certificate_pb2.TrustBundle(**{**stated, **changes})


def join_token(*authorities: TestAuthority, service: str = "orders", ttl: float = 600.0, domain: str = "") -> str:
    """A token that nobody signed, which names the roots of these authorities."""
    payload = {
        "id": "0123456789abcdef",
        "service": service,
        "expires": int(time.time() + ttl),
        "roots": [fingerprint(root_of(authority)) for authority in authorities],
        "domain": domain or authorities[0].trust_domain,
    }
    encoded = base64.urlsafe_b64encode(json.dumps(payload).encode()).rstrip(b"=").decode()
    return f"mesh1.{encoded}.c2VjcmV0LXNpZ25hdHVyZQ"


def signed(authority: TestAuthority, request: Request, principal: Principal = ORDERS, **options: Any) -> Response:
    """What an honest control plane answers."""
    key = x509.load_der_x509_csr(request.certificate_signing_request).public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    certificate = authority.issue(principal, public_key=key, **options)
    return Response(certificate_chain=from_pem(certificate.chain), trust_bundle=bundle_of(authority))


def public_key(request: Request) -> bytes:
    """The key that a request is for."""
    key = x509.load_der_x509_csr(request.certificate_signing_request).public_key()
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


Sign = Callable[[Request, Context], Awaitable[Response]]


@dataclass
class Scripted(certificate_pb2_grpc.CertificateServiceServicer):
    """Answers as it is told, and remembers what it was asked."""

    sign: Sign
    bundle: certificate_pb2.TrustBundle | None = None
    refusal: str = ""
    """Why nobody may watch the trust bundle."""
    requests: list[Request] = field(default_factory=list)
    acknowledged: list[certificate_pb2.WatchTrustBundleRequest] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def SignCertificate(self, request: Request, context: Context) -> Response:
        self.requests.append(request)
        return await self.sign(request, context)

    async def WatchTrustBundle(
        self, request_iterator: AsyncIterator[certificate_pb2.WatchTrustBundleRequest], context: Context
    ) -> AsyncIterator[certificate_pb2.WatchTrustBundleResponse]:
        if self.refusal:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, self.refusal)
        if self.bundle is not None:
            yield certificate_pb2.WatchTrustBundleResponse(trust_bundle=self.bundle)
        async for request in request_iterator:
            self.acknowledged.append(request)
            self.changed.set()


def shows(certificate: Certificate, *more: bytes) -> grpc.ServerCredentials:
    """Credentials of an enrolment port that shows a certificate and more of its chain, and asks for none."""
    return grpc.ssl_server_credentials([(certificate.key, certificate.chain + b"".join(more))])


@asynccontextmanager
async def serving(servicer: Scripted, credentials: grpc.ServerCredentials | None) -> AsyncIterator[str]:
    """A port that it answers on; plaintext without credentials."""
    server = grpc.aio.server()
    certificate_pb2_grpc.add_CertificateServiceServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def mute() -> AsyncIterator[str]:
    """A port that takes connections and never says a word."""
    writers: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        writers.append(writer)

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
