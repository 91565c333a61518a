"""AuthorityService: join tokens, workloads and their revocation, rotation of the trust root. For operators alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp
from mesh.v1 import authority_pb2 as pb
from mesh.v1 import authority_pb2_grpc

from control_plane.access import Access
from control_plane.identity import ca
from control_plane.identity.certificates import peer_chain
from control_plane.identity.errors import (
    IssuerNotValidError,
    RotationRefusedError,
    StoreUnavailableError,
    TooManyTokensError,
)
from control_plane.identity.issuance import DEFAULT_TTL
from control_plane.identity.records import TokenRecord
from control_plane.identity.rotation import below, unconfirmed
from mesh_client.core.caller import Caller
from mesh_client.core.errors import ConfigError, InvalidValueError

if TYPE_CHECKING:
    from control_plane.identity.certificate_authority import AuthorityStatus, CertificateAuthority

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_log = logging.getLogger(__name__)


def add_authority_service(servicer: AuthorityServicer, server: grpc.aio.Server) -> None:
    """Adds it to a server."""
    authority_pb2_grpc.add_AuthorityServiceServicer_to_server(servicer, server)


class AuthorityServicer(authority_pb2_grpc.AuthorityServiceServicer):
    """What operators do with identities. Everything that changes something is logged with who asked for it."""

    def __init__(self, authority: CertificateAuthority, access: Access) -> None:
        self._authority = authority
        self._access = access

    async def CreateJoinToken(
        self,
        request: pb.CreateJoinTokenRequest,
        context: grpc.aio.ServicerContext[pb.CreateJoinTokenRequest, pb.CreateJoinTokenResponse],
    ) -> pb.CreateJoinTokenResponse:
        """Makes a join token."""
        caller = await self._operator(context, "create join tokens")
        ttl = request.ttl.seconds + request.ttl.nanos / 1e9 if request.HasField("ttl") else DEFAULT_TTL
        uses = request.uses if request.HasField("uses") else 1
        try:
            created = await self._authority.create_token(request.service, ttl, uses, caller.spiffe_id)
        except (InvalidValueError, TooManyTokensError, StoreUnavailableError) as error:
            await _abort(context, error)
        _log.info(
            "%s created join token %s for %s, %d uses, until %d",
            caller,
            created.details.id,
            created.details.service,
            uses,
            created.details.expires,
        )
        return pb.CreateJoinTokenResponse(token=created.text, details=_token(created.details))

    async def ListJoinTokens(
        self,
        request: pb.ListJoinTokensRequest,
        context: grpc.aio.ServicerContext[pb.ListJoinTokensRequest, pb.ListJoinTokensResponse],
    ) -> pb.ListJoinTokensResponse:
        """Join tokens that are good still."""
        del request
        await self._operator(context, "list join tokens")
        try:
            found = await self._authority.tokens()
        except StoreUnavailableError as error:
            await _abort(context, error)
        return pb.ListJoinTokensResponse(tokens=map(_token, found))

    async def RevokeJoinToken(
        self,
        request: pb.RevokeJoinTokenRequest,
        context: grpc.aio.ServicerContext[pb.RevokeJoinTokenRequest, pb.RevokeJoinTokenResponse],
    ) -> pb.RevokeJoinTokenResponse:
        """Makes a join token worthless."""
        caller = await self._operator(context, "revoke join tokens")
        try:
            done = await self._authority.revoke_token(request.id)
        except StoreUnavailableError as error:
            await _abort(context, error)
        if not done:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such join token that is good still")
        _log.info("%s revoked join token %s", caller, request.id)
        return pb.RevokeJoinTokenResponse()

    async def GetCertificateAuthority(
        self,
        request: pb.GetCertificateAuthorityRequest,
        context: grpc.aio.ServicerContext[pb.GetCertificateAuthorityRequest, pb.GetCertificateAuthorityResponse],
    ) -> pb.GetCertificateAuthorityResponse:
        """Roots, workloads, and where a rotation stands."""
        del request
        await self._operator(context, "see the certificate authority")
        try:
            return _authority(await self._authority.status())
        except StoreUnavailableError as error:
            await _abort(context, error)

    async def RotateTrustRoot(
        self,
        request: pb.RotateTrustRootRequest,
        context: grpc.aio.ServicerContext[pb.RotateTrustRootRequest, pb.RotateTrustRootResponse],
    ) -> pb.RotateTrustRootResponse:
        """One step of a rotation."""
        caller = await self._operator(context, "rotate the trust root")
        step = request.step
        try:
            if step == pb.ROTATION_STEP_ADD:
                await self._authority.add_root()
            elif step == pb.ROTATION_STEP_OVERLAP:
                await self._authority.overlap(force=request.force)
            elif step == pb.ROTATION_STEP_RETIRE:
                await self._authority.retire(force=request.force)
            else:
                raise InvalidValueError("step", step, "ADD, OVERLAP or RETIRE")
        except RotationRefusedError as error:
            _log.warning("%s was refused the rotation step %s: %s", caller, pb.RotationStep.Name(step), error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except (InvalidValueError, IssuerNotValidError, StoreUnavailableError, ConfigError, OSError) as error:
            await _abort(context, error)
        _log.warning(
            "%s took the rotation step %s%s", caller, pb.RotationStep.Name(step), " by force" if request.force else ""
        )
        try:
            return pb.RotateTrustRootResponse(authority=_authority(await self._authority.status()))
        except StoreUnavailableError as error:
            await _abort(context, error)

    async def RevokeWorkload(
        self,
        request: pb.RevokeWorkloadRequest,
        context: grpc.aio.ServicerContext[pb.RevokeWorkloadRequest, pb.RevokeWorkloadResponse],
    ) -> pb.RevokeWorkloadResponse:
        """Revokes a workload, or all of a service."""
        caller = await self._operator(context, "revoke workloads")
        try:
            if request.WhichOneof("which") == "service":
                found = await self._authority.revoke(service=request.service)
            else:
                found = await self._authority.revoke(workload_id=request.workload_id)
        except (InvalidValueError, StoreUnavailableError) as error:
            await _abort(context, error)
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such workload with a certificate that is good")
        _log.warning("%s revoked the workloads %s", caller, ", ".join(found))
        return pb.RevokeWorkloadResponse(workload_ids=found)

    async def _operator(self, context: grpc.aio.ServicerContext[_Request, _Response], action: str) -> Caller:
        caller = await self._access.require_operator(context, action)
        if caller is None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "that takes an operator's identity")
        chain = peer_chain(context.auth_context())
        if chain:
            try:
                await self._authority.note(caller, chain)
            except StoreUnavailableError as error:
                _log.error("%s is not remembered: %s", caller, error)
        return caller


def _when(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds))


def _token(record: TokenRecord) -> pb.JoinToken:
    return pb.JoinToken(
        id=record.id,
        service=record.service,
        expires=_when(record.expires),
        uses_left=record.uses_left,
        uses=record.uses,
        created_by=record.created_by,
    )


def _authority(status: AuthorityStatus) -> pb.GetCertificateAuthorityResponse:
    state = status.state
    return pb.GetCertificateAuthorityResponse(
        trust_domain=status.bundle.trust_domain,
        bundle_version=status.bundle.version,
        roots=[
            pb.TrustRoot(
                fingerprint=name,
                expires=_when(ca.expires(root)),
                signing=name == state.signing,
                workloads=len(below(name, status.dependents)),
                unconfirmed=len(unconfirmed(name, status.dependents)),
            )
            for name, root in ((ca.fingerprint(root), root) for root in state.trusted)
        ],
        workloads=[
            pb.Workload(
                id=each.id,
                spiffe_id=each.spiffe_id,
                serial=each.serial,
                expires=_when(each.expires),
                root=each.root,
                bundle_version=each.bundle_version,
                attested_by=each.attested_by,
                revoked=each.revoked,
            )
            for each in status.workloads
        ],
        issuer=status.kind,
        issuer_expires=_when(status.state.issuer.expires),
    )


async def _abort(context: grpc.aio.ServicerContext[_Request, _Response], error: Exception) -> NoReturn:
    if isinstance(error, InvalidValueError):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if isinstance(error, TooManyTokensError):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    _log.error("an operator's request failed: %s", error)
    await context.abort(grpc.StatusCode.UNAVAILABLE, "it cannot be done now; the control plane's log says why")
