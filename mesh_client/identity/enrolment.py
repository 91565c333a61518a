"""Joining the mesh: the first certificate, from an enrolment port that is believed because of what was pinned."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Collection, Sequence
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from mesh.v1 import certificate_pb2, certificate_pb2_grpc

from mesh_client.addresses import parse_host_port
from mesh_client.core.errors import IdentityError
from mesh_client.core.handshake import explain
from mesh_client.core.identity import Principal
from mesh_client.core.renewal import in_words
from mesh_client.core.retry import PUSHBACK_KEY, parse_pushback
from mesh_client.identity.certificates import fingerprint, to_pem
from mesh_client.transport import CHANNEL_OPTIONS, authenticating_options, merge_options

ANSWER_TIMEOUT = 10.0
"""Seconds that one control plane has to answer before the next one is asked."""

REFUSALS = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
"""Answers that trying again soon cannot change."""

CLOCK_TOLERANCE = 300.0
"""Seconds that this host's clock may differ from a control plane's before that is said."""


class RefusedError(IdentityError):
    """A control plane answered, and said no."""


class BusyError(IdentityError):
    """A control plane asks to come back later.

    Attributes:
        delay: seconds.
    """

    def __init__(self, message: str, delay: float) -> None:
        super().__init__(message)
        self.delay = delay


async def fetch_root(address: str, pins: Collection[str]) -> bytes:
    """The trust root that an enrolment port presents and whose hash is pinned.

    Nothing else about the port is believed: whoever presents a root need not have its key. The connection proper
    verifies with it.

    Args:
        address: ``host:port``.
        pins: SHA-256 of the roots that may be trusted, lower-case hex.

    Returns:
        The root, DER.

    Raises:
        IdentityError: the port cannot be reached, or presents no such root.
    """
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            chain = await _presented_chain(address)
    except TimeoutError:
        raise IdentityError(f"{address}: no TLS handshake within {ANSWER_TIMEOUT:g} s") from None
    except (OSError, ssl.SSLError) as error:
        raise IdentityError(f"{address}: {error.strerror or error}") from None
    for certificate in chain:
        if fingerprint(certificate) in pins:
            return certificate
    raise IdentityError(
        f"{address}: it presents none of the trust roots that the join token names, so it was not believed; it is not "
        "this mesh's control plane, or the root has been rotated since: make a new token"
    )


async def _presented_chain(address: str) -> list[bytes]:
    host = parse_host_port(address, "enrolment")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # What is presented is only compared with a hash.
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(host.host, host.port, ssl=context)
    try:
        return _unverified_chain(writer.get_extra_info("ssl_object"))
    finally:
        writer.transport.abort()


def _unverified_chain(connection: Any) -> list[bytes]:
    """DER of what the other side presented. Public since Python 3.13, and there before."""
    if hasattr(connection, "get_unverified_chain"):
        return list(connection.get_unverified_chain())
    return [
        ssl.PEM_cert_to_DER_cert(certificate.public_bytes())
        for certificate in connection._sslobj.get_unverified_chain()
    ]


async def enrol(
    address: str,
    roots: Sequence[bytes],
    trust_domain: str,
    request: certificate_pb2.SignCertificateRequest,
) -> certificate_pb2.SignCertificateResponse:
    """Asks an enrolment port for a certificate.

    Args:
        address: ``host:port``.
        roots: DER; the control plane's certificate must lead up to one of them.
        trust_domain: of the mesh; the control plane must be this mesh's.
        request: with its attestation. Secret.

    Raises:
        IdentityError: it could not be asked, or said no.
    """
    name = Principal.control_plane(trust_domain).dns_name
    credentials = grpc.ssl_channel_credentials(to_pem(roots))
    options = merge_options(CHANNEL_OPTIONS, authenticating_options(name))
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        return await sign(channel, address, request)


async def sign(
    channel: grpc.aio.Channel, address: str, request: certificate_pb2.SignCertificateRequest
) -> certificate_pb2.SignCertificateResponse:
    """Asks for a certificate on a channel.

    Raises:
        IdentityError: it could not be asked, or said no.
    """
    try:
        return await certificate_pb2_grpc.CertificateServiceStub(channel).SignCertificate(
            request, timeout=ANSWER_TIMEOUT
        )
    except grpc.aio.AioRpcError as error:
        raise explained(address, error) from None


def explained(address: str, error: grpc.aio.AioRpcError) -> IdentityError:
    """What a control plane's answer, or its silence, means for whoever wants an identity."""
    code, details = error.code(), error.details() or ""
    if code in REFUSALS:
        return RefusedError(f"{address} refused: {code.name}: {details}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        pushback = parse_pushback(_text(error.trailing_metadata().get(PUSHBACK_KEY)))
        return BusyError(f"{address} is busy: {details}", pushback.delay or 0.0)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return IdentityError(f"{address}: no answer within {ANSWER_TIMEOUT:g} s")
    return IdentityError(
        f"{address}: {explain(details, 'the control plane', secure=True) or f'{code.name}: {details}'}"
    )


def clock_warning(certificate: bytes, now: float | None = None) -> str:
    """What a certificate that was issued just now says about this host's clock; empty when nothing.

    Args:
        certificate: DER.
        now: this host's time of day; by default now.
    """
    issued = x509.load_der_x509_certificate(certificate).not_valid_before_utc.timestamp()
    now = time.time() if now is None else now
    if now < issued:
        return f"this host's clock is at least {in_words(issued - now)} behind the control plane's"
    if now > issued + CLOCK_TOLERANCE:
        return f"this host's clock is at least {in_words(now - issued - CLOCK_TOLERANCE)} ahead of the control plane's"
    return ""


def _text(value: str | bytes | None) -> str | None:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value
