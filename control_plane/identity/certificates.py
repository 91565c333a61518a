"""CertificateService: first certificates on the enrolment port; renewals and the trust bundle on the mesh port."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
import grpc.aio
from cryptography import x509
from google.protobuf.message import DecodeError
from mesh.v1 import certificate_pb2 as pb

from control_plane.access import Access
from control_plane.identity import ca
from control_plane.identity.bundle_stream import BundleStream, WatchContext, to_bundle
from control_plane.identity.csr import check_request
from control_plane.identity.errors import (
    AttestationUnavailableError,
    InvalidTokenError,
    IssuerNotValidError,
    NotRenewableError,
    RevokedError,
    StoreUnavailableError,
    WrongServiceError,
)
from control_plane.identity.limits import CallerLimits, StreamLimits, address_of
from mesh_client.core.caller import Caller
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import check_service_name
from mesh_client.core.retry import PUSHBACK_KEY

if TYPE_CHECKING:
    from control_plane.identity.attestation import ConsulAttestation
    from control_plane.identity.certificate_authority import CertificateAuthority

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_SignContext = grpc.aio.ServicerContext[pb.SignCertificateRequest, pb.SignCertificateResponse]

REFUSED = "the attestation is not accepted; the control plane's log says why"
"""Whatever is wrong with it: whoever guesses learns nothing."""

MAX_AT_ONCE = 100
"""First certificates that one address may be asking for at once: whoever begins many and ends none shuts nobody out."""
MAX_CONSUL_AT_ONCE = 8
"""Consul tokens of one address that Consul is asked about at once; one that it does not know takes half a second."""
SEND_TIMEOUT = 5.0
"""Seconds that a caller without an identity has to send what it has begun to send."""

MAX_CHAIN = 8
"""Certificates of a caller that are looked at, the leaf first."""
MAX_STREAMS = 16
"""Streams of the trust bundle that one workload may have open: one would do."""

_log = logging.getLogger(__name__)


_SERVICE = pb.DESCRIPTOR.services_by_name["CertificateService"]


def add_certificate_service(servicer: EnrolmentServicer | RenewalServicer, server: grpc.aio.Server) -> None:
    """Adds one of the two to a server that is not started."""
    # Callers see no difference. A unary handler is not asked before the request is there, which for a caller that never
    # sends one is never.
    sign = (
        grpc.stream_unary_rpc_method_handler(
            servicer.SignCertificate, response_serializer=pb.SignCertificateResponse.SerializeToString
        )
        if isinstance(servicer, EnrolmentServicer)
        else grpc.unary_unary_rpc_method_handler(
            servicer.SignCertificate,
            request_deserializer=pb.SignCertificateRequest.FromString,
            response_serializer=pb.SignCertificateResponse.SerializeToString,
        )
    )
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "SignCertificate": sign,
        "WatchTrustBundle": grpc.stream_stream_rpc_method_handler(
            servicer.WatchTrustBundle,
            request_deserializer=pb.WatchTrustBundleRequest.FromString,
            response_serializer=pb.WatchTrustBundleResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))


class EnrolmentServicer:
    """On the enrolment port: nobody has a certificate yet."""

    def __init__(self, authority: CertificateAuthority) -> None:
        self._authority = authority
        rate = authority.options.enrolments_per_second
        self._limits = CallerLimits(rate, math.ceil(5 * rate))
        self._at_once = StreamLimits(MAX_AT_ONCE)
        self._consul = _consul(authority.options.consul)
        self._consul_at_once = StreamLimits(MAX_CONSUL_AT_ONCE)

    async def SignCertificate(
        self, requests: AsyncIterator[bytes], context: _SignContext
    ) -> pb.SignCertificateResponse:
        """A first certificate, by attestation."""
        peer = context.peer()
        with self._at_once.admit(address_of(peer)) as admitted:
            if not admitted:
                _log.debug("%s asks for too many certificates at once", peer)
                await _come_back(context, 1.0, "too many certificates are asked for at once")
            return await self._sign(await _received(requests, context), peer, context)

    async def _sign(
        self, request: pb.SignCertificateRequest, peer: str, context: _SignContext
    ) -> pb.SignCertificateResponse:
        await _admit(self._limits, address_of(peer), context)
        try:
            leaf = await self._attest(request, check_service_name(request.service), peer)
        except InvalidTokenError as error:
            await _refuse(context, grpc.StatusCode.UNAUTHENTICATED, REFUSED, error)
        except WrongServiceError as error:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, "the attestation is for another service", error)
        except RevokedError as error:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, str(error), error)
        except InvalidValueError as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error), error)
        except (IssuerNotValidError, StoreUnavailableError, AttestationUnavailableError) as error:
            await _unavailable(context, error)
        return _signed(leaf, self._authority)

    async def WatchTrustBundle(
        self, request_iterator: AsyncIterator[pb.WatchTrustBundleRequest], context: WatchContext
    ) -> None:
        """Not here."""
        del request_iterator
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the trust bundle is on the mesh port")

    async def _attest(self, request: pb.SignCertificateRequest, service: str, peer: str) -> ca.Leaf:
        csr = request.certificate_signing_request
        match request.WhichOneof("attestation"):
            case "join_token":
                return await self._authority.issuance.by_token(request.join_token, service, csr, peer)
            case "consul_token" if self._consul is not None:
                # Looked at before Consul is asked: whoever sends nonsense costs nobody else anything.
                check_request(csr)
                with self._consul_at_once.admit(address_of(peer)) as admitted:
                    if not admitted:
                        raise AttestationUnavailableError(f"{MAX_CONSUL_AT_ONCE} Consul tokens are asked about already")
                    attested_by = await self._consul.attest(request.consul_token, service)
                return await self._authority.issuance.attested(service, csr, attested_by, peer)
            case "consul_token":
                raise InvalidTokenError("Consul's tokens attest nothing here: that takes a registry of Consul's")
            case _:
                raise InvalidTokenError("there is no attestation")


class RenewalServicer:
    """On the mesh port: the connection says who somebody is."""

    def __init__(self, authority: CertificateAuthority, access: Access) -> None:
        self._authority = authority
        self._access = access
        rate = authority.options.renewals_per_second
        self._limits = CallerLimits(rate, math.ceil(10 * rate))
        self._streams = StreamLimits(MAX_STREAMS)

    async def SignCertificate(
        self, request: pb.SignCertificateRequest, context: _SignContext
    ) -> pb.SignCertificateResponse:
        """The next certificate of whoever calls."""
        caller, chain = await self._identified(context, "renew a certificate")
        await _admit(self._limits, caller.workload_id, context)
        try:
            if request.WhichOneof("attestation") is not None:
                raise InvalidValueError("attestation", "a token", "nothing on the mesh port: the certificate attests")
            if request.service and request.service != caller.service:
                raise WrongServiceError(f"{caller} asked for a certificate of another service")
            leaf = await self._authority.issuance.renew(
                caller, chain, request.certificate_signing_request, context.peer()
            )
        except (WrongServiceError, NotRenewableError, RevokedError) as error:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, str(error), error)
        except InvalidValueError as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error), error)
        except (IssuerNotValidError, StoreUnavailableError) as error:
            await _unavailable(context, error)
        return _signed(leaf, self._authority)

    async def WatchTrustBundle(
        self, request_iterator: AsyncIterator[pb.WatchTrustBundleRequest], context: WatchContext
    ) -> None:
        """The bundle now and at each change; what is acknowledged is remembered."""
        caller, chain = await self._identified(context, "watch the trust bundle")
        with self._streams.admit(caller.workload_id) as admitted:
            if not admitted:
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"the workload has {MAX_STREAMS} streams of the trust bundle"
                )
            try:
                await self._authority.note(caller, chain)
            except StoreUnavailableError as error:
                _log.error("%s is not remembered: %s", caller, error)
            await BundleStream(self._authority, self._access, caller).run(request_iterator, context)

    async def _identified(
        self, context: grpc.aio.ServicerContext[_Request, _Response], action: str
    ) -> tuple[Caller, list[x509.Certificate]]:
        """Whoever calls, and the certificates that they showed, the leaf first."""
        caller = await self._access.require_caller(context, action)
        chain = peer_chain(context.auth_context())
        if caller is None or not chain:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the connection shows no certificate")
        return caller, chain


def peer_chain(properties: Mapping[str, Iterable[bytes]]) -> list[x509.Certificate]:
    """The certificates that the other side of a connection showed, the leaf first; empty when there are none."""
    leaf, others = list(properties.get("x509_pem_cert", ())), list(properties.get("x509_pem_cert_chain", ()))
    if len(leaf) != 1:
        return []
    try:
        first = x509.load_pem_x509_certificate(leaf[0])
        rest = [each for part in others for each in x509.load_pem_x509_certificates(part)]
    except (ValueError, x509.InvalidVersion):
        return []
    # Who signed whom is looked for among them, so there must not be many.
    return [first, *(each for each in rest if each != first)][:MAX_CHAIN]


def _consul(registry: str) -> ConsulAttestation | None:
    if not registry:
        return None
    # These bring in the HTTP client, which others do without.
    from control_plane.identity.attestation import ConsulAttestation
    from control_plane.sources.consul_http import parse_registry

    return ConsulAttestation(parse_registry(registry))


def _signed(leaf: ca.Leaf, authority: CertificateAuthority) -> pb.SignCertificateResponse:
    return pb.SignCertificateResponse(certificate_chain=leaf.chain(), trust_bundle=to_bundle(authority.bundle))


async def _received(requests: AsyncIterator[bytes], context: _SignContext) -> pb.SignCertificateRequest:
    """The request of somebody without an identity, who may never send it or send anything."""
    try:
        async with asyncio.timeout(SEND_TIMEOUT):
            received = await anext(aiter(requests), None)
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"the request did not come within {SEND_TIMEOUT:g} s")
    if received is None:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "there is no request")
    try:
        return pb.SignCertificateRequest.FromString(received)
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is no SignCertificateRequest")


async def _admit(limits: CallerLimits, caller: str, context: _SignContext) -> None:
    wait = limits.take(caller, time.monotonic())
    if wait:
        # One line for each refusal would let a caller fill the log.
        _log.debug("%s asks too often for certificates", caller)
        await _come_back(context, wait, "certificates are asked for too often")


async def _come_back(context: _SignContext, wait: float, why: str) -> NoReturn:
    pushback = (PUSHBACK_KEY, str(math.ceil(wait * 1000)))
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why, (pushback,))


async def _refuse(context: _SignContext, code: grpc.StatusCode, words: str, reason: Exception) -> NoReturn:
    _log.warning("no certificate for %s: %s", context.peer(), reason)
    await context.abort(code, words)


async def _unavailable(context: _SignContext, reason: Exception) -> NoReturn:
    _log.error("no certificate for %s: %s", context.peer(), reason)
    await context.abort(
        grpc.StatusCode.UNAVAILABLE, "certificates cannot be signed now; the control plane's log says why"
    )
