"""AdminService: what operators see and do."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import grpc
import grpc.aio
from mesh.v1 import admin_pb2, admin_pb2_grpc

from control_plane.access import Access, Context, caller
from control_plane.catalog import Catalog, RemovalHold, ServiceView, SourceState
from control_plane.convert import (
    duration_to_proto,
    endpoint_to_proto,
    field_errors_to_proto,
    kind_to_proto,
    policy_to_proto,
)
from control_plane.discovery import ClientState, StreamHub
from control_plane.documents import parse_document
from control_plane.policies import PolicyBook
from control_plane.publisher import Publisher
from control_plane.sources import (
    NotStoredError,
    PolicyStore,
    StoredDocument,
    StoreUnavailableError,
    VersionConflictError,
)
from control_plane.subscription import SubscriptionState
from mesh_client.core.errors import InvalidPolicyError, InvalidValueError
from mesh_client.core.model import Health, check_service_name
from mesh_client.core.policy import ServicePolicy

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")

_SHOWN_DENIALS = 20

_log = logging.getLogger(__name__)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """Serves ``mesh.v1.AdminService``. To be made inside the event loop.

    Args:
        control_plane: name of this control plane.
        catalog: services, endpoints, sources and what the mass removal guard holds.
        book: which policies hold, and which stored ones do not.
        policies: where policies are stored.
        publisher: what is published.
        hub: who is connected.
        access: who was refused; by default there are no identities.
    """

    def __init__(
        self,
        control_plane: str,
        catalog: Catalog,
        book: PolicyBook,
        policies: PolicyStore,
        publisher: Publisher,
        hub: StreamHub,
        access: Access | None = None,
    ) -> None:
        self._access = access or Access(None)
        self._control_plane = control_plane
        self._catalog = catalog
        self._book = book
        self._policies = policies
        self._publisher = publisher
        self._hub = hub
        self._started_at = _now()

    async def GetStatus(
        self,
        request: admin_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[admin_pb2.GetStatusRequest, admin_pb2.GetStatusResponse],
    ) -> admin_pb2.GetStatusResponse:
        """Everything at this moment."""
        now = _now()
        view = self._catalog.view(now)
        return admin_pb2.GetStatusResponse(
            control_plane=self._control_plane,
            uptime=duration_to_proto(now - self._started_at),
            sources=[_source_to_proto(source, now) for source in view.sources],
            clients=[self._client_to_proto(client, now) for client in self._hub.clients()],
            services=[self._service_to_proto(view.services[name]) for name in sorted(view.services)],
            policy_problems=[
                admin_pb2.PolicyProblem(
                    service=problem.service,
                    errors=field_errors_to_proto(problem.errors),
                    obeyed_version=problem.obeyed_version,
                )
                for problem in self._book.problems
            ],
            removal_hold=None if view.hold is None else _hold_to_proto(view.hold, now),
            trust_domain=self._access.trust_domain,
            denials=[
                admin_pb2.Denials(caller=who, count=count)
                for who, count in self._access.denials.most_common(_SHOWN_DENIALS)
            ],
        )

    async def ListEndpoints(
        self,
        request: admin_pb2.ListEndpointsRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ListEndpointsRequest, admin_pb2.ListEndpointsResponse],
    ) -> admin_pb2.ListEndpointsResponse:
        """The endpoints of one service, those included that are leaving."""
        async with _refusing(context):
            service = check_service_name(request.service)
        now = _now()
        view = self._catalog.view(now).services.get(service)
        if view is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no registry lists a service {service}")
        resource = self._publisher.snapshot.endpoints.get(service)
        return admin_pb2.ListEndpointsResponse(
            endpoints=[
                admin_pb2.EndpointStatus(
                    endpoint=endpoint_to_proto(record.endpoint),
                    source=record.source,
                    age=duration_to_proto(now - record.changed_at),
                    held=record.held,
                )
                for record in view.records
            ],
            version="" if resource is None else resource.version,
        )

    async def ListPolicies(
        self,
        request: admin_pb2.ListPoliciesRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ListPoliciesRequest, admin_pb2.ListPoliciesResponse],
    ) -> admin_pb2.ListPoliciesResponse:
        """All stored policies."""
        async with _refusing(context):
            stored = await self._policies.list()
        return admin_pb2.ListPoliciesResponse(policies=[_stored_to_proto(document) for document in stored])

    async def GetPolicy(
        self,
        request: admin_pb2.GetPolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.GetPolicyRequest, admin_pb2.GetPolicyResponse],
    ) -> admin_pb2.GetPolicyResponse:
        """One stored policy."""
        async with _refusing(context):
            stored = await self._stored(check_service_name(request.service))
        return admin_pb2.GetPolicyResponse(policy=_stored_to_proto(stored))

    async def ValidatePolicy(
        self,
        request: admin_pb2.ValidatePolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ValidatePolicyRequest, admin_pb2.ValidatePolicyResponse],
    ) -> admin_pb2.ValidatePolicyResponse:
        """The verdict on a document; nothing is stored."""
        try:
            policy = parse_document(request.document, ServicePolicy)
        except InvalidPolicyError as error:
            return admin_pb2.ValidatePolicyResponse(errors=field_errors_to_proto(error.errors))
        return admin_pb2.ValidatePolicyResponse(policy=policy_to_proto(policy))

    async def ApplyPolicy(
        self,
        request: admin_pb2.ApplyPolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ApplyPolicyRequest, admin_pb2.ApplyPolicyResponse],
    ) -> admin_pb2.ApplyPolicyResponse:
        """Stores a policy, unless it is stored already or this is a dry run."""
        async with _refusing(context):
            policy = parse_document(request.document, ServicePolicy)
            document = request.document.encode()
            if_version = request.if_version if request.HasField("if_version") else None
            before = await self._policies.get(policy.service)
            stored_version = "" if before is None else before.version
            if if_version is not None and if_version != stored_version:
                raise VersionConflictError(policy.service, if_version, stored_version)
            if before is not None and before.document == document:
                after = before
            elif request.dry_run:
                after = StoredDocument(policy.service, document, "")
            else:
                after = await self._policies.put(policy.service, document, if_version)
                _log.info("%s stored the policy of %s, version %s", _who(context), policy.service, after.version)
        return admin_pb2.ApplyPolicyResponse(
            before=admin_pb2.StoredPolicy(service=policy.service) if before is None else _stored_to_proto(before),
            after=_stored_to_proto(after),
            changed=before is None or _policy_of(before) != policy,
        )

    async def DeletePolicy(
        self,
        request: admin_pb2.DeletePolicyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.DeletePolicyRequest, admin_pb2.DeletePolicyResponse],
    ) -> admin_pb2.DeletePolicyResponse:
        """Deletes a stored policy."""
        async with _refusing(context):
            service = check_service_name(request.service)
            await self._policies.delete(service, request.if_version if request.HasField("if_version") else None)
        _log.info("%s deleted the policy of %s", _who(context), service)
        return admin_pb2.DeletePolicyResponse()

    async def ConfirmRemovals(
        self,
        request: admin_pb2.ConfirmRemovalsRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ConfirmRemovalsRequest, admin_pb2.ConfirmRemovalsResponse],
    ) -> admin_pb2.ConfirmRemovalsResponse:
        """Publishes what the mass removal guard holds."""
        confirmed = self._catalog.confirm_removals(_now())
        _log.info("%s confirmed the removal of %d endpoints", _who(context), confirmed)
        self._publisher.publish_now()
        return admin_pb2.ConfirmRemovalsResponse(endpoints=confirmed)

    async def _stored(self, service: str) -> StoredDocument:
        stored = await self._policies.get(service)
        if stored is None:
            raise NotStoredError(service)
        return stored

    def _client_to_proto(self, client: ClientState, now: float) -> admin_pb2.ClientStatus:
        return admin_pb2.ClientStatus(
            node_id="" if client.node is None else client.node.id,
            service="" if client.node is None else client.node.service,
            peer=client.peer,
            connected=duration_to_proto(now - client.connected_at),
            subscriptions=[self._subscription_to_proto(state, now) for state in client.subscriptions],
            workload_id=client.workload_id,
        )

    def _subscription_to_proto(self, state: SubscriptionState, now: float) -> admin_pb2.SubscriptionStatus:
        current = self._publisher.snapshot.get(state.kind, state.service)
        current_version = "" if current is None else current.version
        return admin_pb2.SubscriptionStatus(
            type=kind_to_proto(state.kind),
            service=state.service,
            acknowledged_version=state.acknowledged_version,
            current_version=current_version,
            acknowledged_ago=None if state.acknowledged_at is None else duration_to_proto(now - state.acknowledged_at),
            rejection=state.rejection if state.rejected_version == current_version else "",
        )

    def _service_to_proto(self, view: ServiceView) -> admin_pb2.ServiceStatus:
        snapshot = self._publisher.snapshot
        endpoints = snapshot.endpoints.get(view.service)
        policy = snapshot.policies.get(view.service)
        health = Counter(record.endpoint.health for record in view.records)
        return admin_pb2.ServiceStatus(
            service=view.service,
            source=", ".join(view.sources),
            endpoints_version="" if endpoints is None else endpoints.version,
            policy_version="" if policy is None else policy.version,
            healthy=health[Health.HEALTHY],
            unhealthy=health[Health.UNHEALTHY],
            draining=health[Health.DRAINING],
            subscribers=self._hub.subscriber_count(view.service),
            has_policy=self._book.has_policy(view.service),
        )


@asynccontextmanager
async def _refusing(context: grpc.aio.ServicerContext[_Request, _Response]) -> AsyncIterator[None]:
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


def _who(context: Context) -> str:
    """Who asks, for the log."""
    return f"{caller(context) or 'somebody'} at {context.peer()}"


def _now() -> float:
    return asyncio.get_running_loop().time()


def _source_to_proto(source: SourceState, now: float) -> admin_pb2.SourceStatus:
    return admin_pb2.SourceStatus(
        name=source.name,
        connected=source.connected,
        detail=source.detail,
        since=duration_to_proto(now - source.since),
    )


def _hold_to_proto(hold: RemovalHold, now: float) -> admin_pb2.RemovalHold:
    return admin_pb2.RemovalHold(
        endpoints=hold.endpoints,
        services=hold.services,
        since=duration_to_proto(now - hold.since),
        remaining=duration_to_proto(hold.until - now),
    )


def _policy_of(stored: StoredDocument) -> ServicePolicy | None:
    try:
        return parse_document(stored.document, ServicePolicy, stored.service)
    except InvalidPolicyError:
        return None


def _stored_to_proto(stored: StoredDocument) -> admin_pb2.StoredPolicy:
    try:
        policy = parse_document(stored.document, ServicePolicy, stored.service)
    except InvalidPolicyError as error:
        return admin_pb2.StoredPolicy(
            service=stored.service, stored_version=stored.version, errors=field_errors_to_proto(error.errors)
        )
    return admin_pb2.StoredPolicy(service=stored.service, stored_version=stored.version, policy=policy_to_proto(policy))
