"""AdminService: what operators see and do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import grpc
import grpc.aio
from mesh.v1 import admin_pb2

from control_plane.access import Access
from control_plane.admin_policies import KINDS, PolicyRpcs, refusing, who
from control_plane.catalog import Catalog, RemovalHold, SourceState
from control_plane.catalog_service import ServiceView
from control_plane.convert import duration_to_proto, endpoint_to_proto, field_errors_to_proto, kind_to_proto
from control_plane.discovery import ClientState, StreamHub
from control_plane.edges import EdgeHub, EdgeState, follower_to_proto
from control_plane.policies import PolicyBook
from control_plane.publisher import Publisher
from control_plane.sources import PolicyStore
from control_plane.subscription import SubscriptionState
from control_plane.telemetry.answers import outbox_to_proto
from control_plane.telemetry.recorder import OutboxReport
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import FieldError
from mesh_client.core.model import Health, check_service_name
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import Policy

_SHOWN_DENIALS = 20

_log = logging.getLogger(__name__)


class AdminServicer(PolicyRpcs):
    """Serves ``mesh.v1.AdminService``. To be made inside the event loop.

    Args:
        control_plane: name of this control plane.
        catalog: services, endpoints, sources and what the mass removal guard holds.
        book: which policies of services hold, and which stored ones do not.
        policies: where policies are stored, one for each kind.
        publisher: what is published.
        hub: who is connected.
        edges: who follows the policies of edges.
        outboxes: who knows outboxes of events, by service and process.
        access: who was refused; by default there are no identities.
    """

    def __init__(
        self,
        control_plane: str,
        catalog: Catalog,
        book: PolicyBook[ServicePolicy],
        policies: Iterable[PolicyStore],
        publisher: Publisher,
        hub: StreamHub,
        *,
        edges: EdgeHub,
        outboxes: Sequence[Callable[[], Iterable[tuple[str, str, OutboxReport]]]] = (),
        access: Access | None = None,
    ) -> None:
        super().__init__(policies, self._warnings)
        self._access = access or Access(None)
        self._control_plane = control_plane
        self._catalog = catalog
        self._book = book
        self._publisher = publisher
        self._hub = hub
        self._edges = edges
        self._outboxes = outboxes
        self._started_at = _now()

    async def GetStatus(
        self,
        request: admin_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[admin_pb2.GetStatusRequest, admin_pb2.GetStatusResponse],
    ) -> admin_pb2.GetStatusResponse:
        """Everything at this moment."""
        now = _now()
        view = self._catalog.view(now)
        outboxes = [each for known in self._outboxes for each in known()]
        told = sorted((each for each in outboxes if not each[2].is_quiet), key=lambda each: each[:2])
        return admin_pb2.GetStatusResponse(
            control_plane=self._control_plane,
            uptime=duration_to_proto(now - self._started_at),
            sources=[_source_to_proto(source, now) for source in view.sources],
            clients=[self._client_to_proto(client, now) for client in self._hub.clients()],
            services=[self._service_to_proto(view.services[name]) for name in sorted(view.services)],
            policy_problems=[
                admin_pb2.PolicyProblem(
                    kind=KINDS[kind],
                    service=problem.name,
                    errors=field_errors_to_proto(problem.errors),
                    obeyed_version=problem.obeyed_version,
                )
                for kind, problems in ((ServicePolicy, self._book.problems), (EdgePolicy, self._edges.book.problems))
                for problem in problems
            ],
            removal_hold=None if view.hold is None else _hold_to_proto(view.hold, now),
            trust_domain=self._access.trust_domain,
            denials=[
                admin_pb2.Denials(caller=caller, count=count)
                for caller, count in self._access.denials.most_common(_SHOWN_DENIALS)
            ],
            edges=[self._edge_to_proto(edge, view.services, now) for edge in self._edges.states()],
            outboxes=[
                admin_pb2.OutboxStatus(
                    service=service,
                    node_id=node_id,
                    outbox=outbox_to_proto(outbox),
                    oldest=None if outbox.oldest is None else duration_to_proto(max(0.0, time.time() - outbox.oldest)),
                )
                for service, node_id, outbox in told
            ],
            sent_outboxes=len(outboxes) - len(told),
        )

    async def ListEndpoints(
        self,
        request: admin_pb2.ListEndpointsRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ListEndpointsRequest, admin_pb2.ListEndpointsResponse],
    ) -> admin_pb2.ListEndpointsResponse:
        """The endpoints of one service, those included that are leaving."""
        async with refusing(context):
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
                    drained_by=record.drained_by,
                )
                for record in view.records
            ],
            version="" if resource is None else resource.version,
        )

    async def ConfirmRemovals(
        self,
        request: admin_pb2.ConfirmRemovalsRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ConfirmRemovalsRequest, admin_pb2.ConfirmRemovalsResponse],
    ) -> admin_pb2.ConfirmRemovalsResponse:
        """Publishes what the mass removal guard holds."""
        confirmed = self._catalog.confirm_removals(_now())
        _log.info("%s confirmed the removal of %d endpoints", who(context), confirmed)
        self._publisher.publish_now()
        return admin_pb2.ConfirmRemovalsResponse(endpoints=confirmed)

    def _warnings(self, policy: Policy) -> list[FieldError]:
        if not isinstance(policy, EdgePolicy):
            return []
        known = self._catalog.view(_now()).services
        return [
            FieldError(
                f"services.{name}.upstream",
                f"no registry lists a service {service.upstream!r} now; until one does, calls are answered with 503",
            )
            for name, service in policy.services.items()
            if service.upstream not in known
        ]

    def _edge_to_proto(self, state: EdgeState, services: Mapping[str, ServiceView], now: float) -> admin_pb2.EdgeStatus:
        return admin_pb2.EdgeStatus(
            edge=state.edge,
            policy_version=state.policy_version,
            has_policy=self._edges.book.has_policy(state.edge),
            unknown_upstreams=[name for name in state.upstreams if name not in services],
            gateways=[follower_to_proto(follower, now) for follower in state.followers],
        )

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
