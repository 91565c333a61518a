"""The part of AdminService that is about stored policies, of all kinds."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
import grpc.aio
from mesh.v1 import admin_pb2, admin_pb2_grpc

from control_plane.access import Context, caller
from control_plane.convert import edge_policy_to_proto, field_errors_to_proto, policy_to_proto
from control_plane.documents import parse_document
from control_plane.sources import (
    NotStoredError,
    PolicyStore,
    StoredDocument,
    StoreUnavailableError,
    VersionConflictError,
)
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import FieldError, InvalidPolicyError, InvalidValueError
from mesh_client.core.model import check_service_name
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import Policy

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

KINDS: Mapping[type[Policy], admin_pb2.PolicyKind.ValueType] = {
    ServicePolicy: admin_pb2.POLICY_KIND_SERVICE,
    EdgePolicy: admin_pb2.POLICY_KIND_EDGE,
}
_BY_NUMBER: Mapping[int, type[Policy]] = {
    admin_pb2.POLICY_KIND_UNSPECIFIED: ServicePolicy,
    **{number: kind for kind, number in KINDS.items()},
}

_log = logging.getLogger(__name__)


class PolicyRpcs(admin_pb2_grpc.AdminServiceServicer):
    """Reads, checks, stores and deletes policies.

    Args:
        stores: where policies are stored, one for each kind.
        warn: what is valid in a policy, and may not be meant.
    """

    def __init__(self, stores: Iterable[PolicyStore], warn: Callable[[Policy], list[FieldError]]) -> None:
        self._stores = {store.kind: store for store in stores}
        self._warn = warn

    async def ListPolicies(
        self,
        request: admin_pb2.ListPoliciesRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ListPoliciesRequest, admin_pb2.ListPoliciesResponse],
    ) -> admin_pb2.ListPoliciesResponse:
        """All stored policies of one kind."""
        async with refusing(context):
            kind = _kind(request.kind)
            stored = await self._stores[kind].list()
        return admin_pb2.ListPoliciesResponse(policies=[_stored_to_proto(kind, document) for document in stored])

    async def GetPolicy(
        self,
        request: admin_pb2.GetPolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.GetPolicyRequest, admin_pb2.GetPolicyResponse],
    ) -> admin_pb2.GetPolicyResponse:
        """One stored policy."""
        async with refusing(context):
            kind, name = _kind(request.kind), check_service_name(request.service)
            stored = await self._stores[kind].get(name)
            if stored is None:
                raise NotStoredError(kind, name)
        return admin_pb2.GetPolicyResponse(policy=_stored_to_proto(kind, stored))

    async def ValidatePolicy(
        self,
        request: admin_pb2.ValidatePolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ValidatePolicyRequest, admin_pb2.ValidatePolicyResponse],
    ) -> admin_pb2.ValidatePolicyResponse:
        """The verdict on a document; nothing is stored."""
        async with refusing(context):
            kind = _kind(request.kind)
        try:
            policy = parse_document(request.document, kind)
        except InvalidPolicyError as error:
            return admin_pb2.ValidatePolicyResponse(errors=field_errors_to_proto(error.errors))
        response = admin_pb2.ValidatePolicyResponse(warnings=field_errors_to_proto(self._warn(policy)))
        _put(policy, response)
        return response

    async def ApplyPolicy(
        self,
        request: admin_pb2.ApplyPolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ApplyPolicyRequest, admin_pb2.ApplyPolicyResponse],
    ) -> admin_pb2.ApplyPolicyResponse:
        """Stores a policy, unless it is stored already or this is a dry run."""
        async with refusing(context):
            kind = _kind(request.kind)
            store = self._stores[kind]
            policy = parse_document(request.document, kind)
            document = request.document.encode()
            if_version = request.if_version if request.HasField("if_version") else None
            before = await store.get(policy.name)
            stored_version = "" if before is None else before.version
            if if_version is not None and if_version != stored_version:
                raise VersionConflictError(kind, policy.name, if_version, stored_version)
            if before is not None and before.document == document:
                after = before
            elif request.dry_run:
                after = StoredDocument(policy.name, document, "")
            else:
                after = await store.put(policy.name, document, if_version)
                _log.info(
                    "%s stored the policy of %s, version %s", who(context), kind.called(policy.name), after.version
                )
        return admin_pb2.ApplyPolicyResponse(
            before=admin_pb2.StoredPolicy(service=policy.name) if before is None else _stored_to_proto(kind, before),
            after=_stored_to_proto(kind, after),
            changed=before is None or _policy_of(kind, before) != policy,
            warnings=field_errors_to_proto(self._warn(policy)),
        )

    async def DeletePolicy(
        self,
        request: admin_pb2.DeletePolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.DeletePolicyRequest, admin_pb2.DeletePolicyResponse],
    ) -> admin_pb2.DeletePolicyResponse:
        """Deletes a stored policy."""
        async with refusing(context):
            kind, name = _kind(request.kind), check_service_name(request.service)
            await self._stores[kind].delete(name, request.if_version if request.HasField("if_version") else None)
        _log.info("%s deleted the policy of %s", who(context), kind.called(name))
        return admin_pb2.DeletePolicyResponse()


@asynccontextmanager
async def refusing(context: grpc.aio.ServicerContext[_Request, _Response]) -> AsyncIterator[None]:
    """Ends the call with the status code of the error that comes out of the block."""
    try:
        yield
    except (InvalidValueError, InvalidPolicyError) as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except NotStoredError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    except VersionConflictError as error:
        await context.abort(grpc.StatusCode.ABORTED, str(error))
    except StoreUnavailableError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


def who(context: Context) -> str:
    """Who asks, for the log."""
    return f"{caller(context) or 'somebody'} at {context.peer()}"


def _kind(number: int) -> type[Policy]:
    kind = _BY_NUMBER.get(number)
    if kind is None:
        raise InvalidValueError("kind", number, "a PolicyKind")
    return kind


def _policy_of(kind: type[Policy], stored: StoredDocument) -> Policy | None:
    try:
        return parse_document(stored.document, kind, stored.name)
    except InvalidPolicyError:
        return None


def _stored_to_proto(kind: type[Policy], stored: StoredDocument) -> admin_pb2.StoredPolicy:
    message = admin_pb2.StoredPolicy(service=stored.name, stored_version=stored.version)
    try:
        _put(parse_document(stored.document, kind, stored.name), message)
    except InvalidPolicyError as error:
        message.errors.extend(field_errors_to_proto(error.errors))
    return message


def _put(policy: Policy, message: admin_pb2.StoredPolicy | admin_pb2.ValidatePolicyResponse) -> None:
    """Puts the policy into the field of its kind."""
    if isinstance(policy, EdgePolicy):
        message.edge_policy.CopyFrom(edge_policy_to_proto(policy))
    elif isinstance(policy, ServicePolicy):
        message.policy.CopyFrom(policy_to_proto(policy))
