"""CertificateService: first certificates on the enrolment port; renewals and the trust bundle on the mesh port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import grpc.aio
from cryptography import x509
from mesh.v1 import certificate_pb2 as pb

from control_plane.access import Access
from control_plane.identity import ca
from control_plane.identity.bundle import TrustBundle
from control_plane.identity.issuance import NotRenewableError, WrongServiceError
from control_plane.identity.store import RevokedError, StoreUnavailableError
from control_plane.identity.tokens import InvalidTokenError
from mesh_client.core.caller import Caller
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import check_service_name

if TYPE_CHECKING:
    from control_plane.identity.certificate_authority import CertificateAuthority

_SignContext = grpc.aio.ServicerContext[pb.SignCertificateRequest, pb.SignCertificateResponse]
_WatchContext = grpc.aio.ServicerContext[pb.WatchTrustBundleRequest, pb.WatchTrustBundleResponse]

REFUSED = "the attestation is not accepted; the control plane's log says why"
"""Whatever is wrong with it: whoever guesses learns nothing."""

_log = logging.getLogger(__name__)


_SERVICE = pb.DESCRIPTOR.services_by_name["CertificateService"]


def add_certificate_service(servicer: EnrolmentServicer | RenewalServicer, server: grpc.aio.Server) -> None:
    """Adds one of the two to a server that is not started."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "SignCertificate": grpc.unary_unary_rpc_method_handler(
            servicer.SignCertificate,
            request_deserializer=pb.SignCertificateRequest.FromString,
            response_serializer=pb.SignCertificateResponse.SerializeToString,
        ),
        "WatchTrustBundle": grpc.stream_stream_rpc_method_handler(
            servicer.WatchTrustBundle,
            request_deserializer=pb.WatchTrustBundleRequest.FromString,
            response_serializer=pb.WatchTrustBundleResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))


def to_bundle(bundle: TrustBundle) -> pb.TrustBundle:
    """The bundle as a message."""
    return pb.TrustBundle(
        trust_domain=bundle.trust_domain,
        version=bundle.version,
        roots=bundle.roots,
        signing_root=bundle.signing_root,
        revoked_workloads=sorted(bundle.revoked),
    )


class EnrolmentServicer:
    """On the enrolment port: nobody has a certificate yet."""

    def __init__(self, authority: CertificateAuthority) -> None:
        self._authority = authority

    async def SignCertificate(
        self, request: pb.SignCertificateRequest, context: _SignContext
    ) -> pb.SignCertificateResponse:
        """A first certificate, by attestation."""
        peer = context.peer()
        try:
            service = check_service_name(request.service)
            kind = request.WhichOneof("attestation")
            if kind == "join_token":
                leaf = await self._authority.issuance.by_token(
                    request.join_token, service, request.certificate_signing_request, peer
                )
            else:
                raise InvalidTokenError("there is no attestation that this control plane knows")
        except InvalidTokenError as error:
            await _refuse(context, grpc.StatusCode.UNAUTHENTICATED, REFUSED, error)
        except WrongServiceError as error:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, "the attestation is for another service", error)
        except InvalidValueError as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error), error)
        except (ca.IssuerNotValidError, StoreUnavailableError) as error:
            await _unavailable(context, error)
        return _signed(leaf, self._authority)

    async def WatchTrustBundle(
        self, request_iterator: AsyncIterator[pb.WatchTrustBundleRequest], context: _WatchContext
    ) -> None:
        """Not here."""
        del request_iterator
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the trust bundle is on the mesh port")


class RenewalServicer:
    """On the mesh port: the connection says who somebody is."""

    def __init__(self, authority: CertificateAuthority, access: Access) -> None:
        self._authority = authority
        self._access = access

    async def SignCertificate(
        self, request: pb.SignCertificateRequest, context: _SignContext
    ) -> pb.SignCertificateResponse:
        """The next certificate of whoever calls."""
        caller = await self._access.require_caller(context, "renew a certificate")
        current = _certificate(context)
        if caller is None or current is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the connection shows no certificate")
        try:
            if request.WhichOneof("attestation") is not None:
                raise InvalidValueError("attestation", "a token", "nothing on the mesh port: the certificate attests")
            if request.service and request.service != caller.service:
                raise WrongServiceError(f"{caller} asked for a certificate of another service")
            leaf = await self._authority.issuance.renew(
                caller, current, request.certificate_signing_request, context.peer()
            )
        except (WrongServiceError, NotRenewableError, RevokedError) as error:
            await _refuse(context, grpc.StatusCode.PERMISSION_DENIED, str(error), error)
        except InvalidValueError as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, str(error), error)
        except (ca.IssuerNotValidError, StoreUnavailableError) as error:
            await _unavailable(context, error)
        return _signed(leaf, self._authority)

    async def WatchTrustBundle(
        self, request_iterator: AsyncIterator[pb.WatchTrustBundleRequest], context: _WatchContext
    ) -> None:
        """The bundle now and at each change; what is acknowledged is remembered."""
        caller = await self._access.require_caller(context, "watch the trust bundle")
        changed = asyncio.Event()
        changed.set()
        sent: dict[str, TrustBundle] = {}
        reading = asyncio.create_task(self._read(request_iterator, caller, sent), name="trust bundle acknowledgements")
        reading.add_done_callback(lambda _: changed.set())
        unsubscribe = self._authority.on_change(changed.set)
        cut = False

        def end() -> None:
            nonlocal cut
            cut = True
            changed.set()

        try:
            with self._access.cut_when_revoked(caller, end):
                while True:
                    await changed.wait()
                    changed.clear()
                    if cut:
                        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "the workload has been revoked")
                    if reading.done():
                        return
                    bundle = self._authority.bundle
                    if bundle.version not in sent:
                        # What was in force before can still be acknowledged, but nothing older.
                        while len(sent) > 1:
                            sent.pop(next(iter(sent)))
                        sent[bundle.version] = bundle
                        await context.write(pb.WatchTrustBundleResponse(trust_bundle=to_bundle(bundle)))
        finally:
            unsubscribe()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[pb.WatchTrustBundleRequest],
        caller: Caller | None,
        sent: dict[str, TrustBundle],
    ) -> None:
        confirmed = ""
        async for request in requests:
            bundle = sent.get(request.version)
            if bundle is None or caller is None or bundle.version == confirmed:
                continue  # nothing that was sent on this stream, or nothing new
            try:
                await self._authority.confirm(caller.workload_id, bundle)
            except StoreUnavailableError as error:
                _log.error("an acknowledgement of %s is lost: %s", caller, error)
            else:
                confirmed = bundle.version


def _signed(leaf: ca.Leaf, authority: CertificateAuthority) -> pb.SignCertificateResponse:
    return pb.SignCertificateResponse(certificate_chain=leaf.chain(), trust_bundle=to_bundle(authority.bundle))


def _certificate(context: _SignContext) -> x509.Certificate | None:
    found = list(context.auth_context().get("x509_pem_cert", ()))
    try:
        return x509.load_pem_x509_certificate(found[0]) if len(found) == 1 else None
    except ValueError:
        return None


async def _refuse(context: _SignContext, code: grpc.StatusCode, words: str, reason: Exception) -> NoReturn:
    _log.warning("no certificate for %s: %s", context.peer(), reason)
    await context.abort(code, words)


async def _unavailable(context: _SignContext, reason: Exception) -> NoReturn:
    _log.error("no certificate for %s: %s", context.peer(), reason)
    await context.abort(
        grpc.StatusCode.UNAVAILABLE, "certificates cannot be signed now; the control plane's log says why"
    )
