"""What each page of the dashboard shows: what the servicers for operators answer, as JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import admin_pb2, authority_pb2, resource_pb2, trace_pb2, traffic_pb2

from control_plane.access import Access
from control_plane.admin import AdminServicer
from control_plane.dashboard.context import OwnContext, RefusedError
from control_plane.dashboard.layers import layers
from control_plane.identity.authority import AuthorityServicer
from control_plane.message_json import Json, to_json
from control_plane.policy_text import effective, stated_yaml, to_yaml
from control_plane.telemetry.operators import TrafficServicer
from control_plane.traces.queries import TraceQueryServicer

KINDS: Mapping[str, admin_pb2.PolicyKind.ValueType] = {
    "service": admin_pb2.POLICY_KIND_SERVICE,
    "edge": admin_pb2.POLICY_KIND_EDGE,
}
MAX_PARAMETER = 300
"""Characters of a parameter."""
MAX_SUBSCRIPTIONS = 200
"""Of a service, that are shown one by one."""

_POLICY = resource_pb2.RESOURCE_TYPE_SERVICE_POLICY
_TYPES = (_POLICY, resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS)
_NOBODY = "-"
"""Who calls without belonging to a service, in the picture."""

Parameters = Mapping[str, str]
Shown = dict[str, Json]


@dataclass(frozen=True, slots=True)
class Servicers:
    """Those that are asked.

    Attributes:
        admin: AdminService.
        traffic: TrafficService.
        traces: TraceQueryService.
        authority: AuthorityService; None without identity.
        access: who may ask.
        leaf_lifetime: of certificates, seconds.
    """

    admin: AdminServicer
    traffic: TrafficServicer
    traces: TraceQueryServicer
    authority: AuthorityServicer | None
    access: Access
    leaf_lifetime: float


@dataclass(frozen=True, slots=True)
class View:
    """A page with its parameters, by which what is shown can be found again.

    Attributes:
        name: of the page.
        parameters: by name, in their order.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]


class Views:
    """Answers what pages ask for.

    Args:
        servicers: that are asked.
    """

    def __init__(self, servicers: Servicers) -> None:
        self._servicers = servicers
        self._views: Mapping[str, Callable[[Parameters, OwnContext], Awaitable[Shown]]] = {
            "topology": self._topology,
            "service": self._service,
            "failures": self._failures,
            "traces": self._traces,
            "trace": self._trace,
            "policies": self._policies,
            "policy": self._policy,
            "certificates": self._certificates,
        }

    @property
    def names(self) -> Sequence[str]:
        """Of the views that there are."""
        return tuple(self._views)

    def view(self, name: str, parameters: Parameters) -> View | None:
        """A view, if there is one of that name, and its parameters are no longer than may be."""
        if name not in self._views or any(len(value) > MAX_PARAMETER for value in parameters.values()):
            return None
        return View(name, tuple(sorted(parameters.items())))

    async def show(self, view: View, context: OwnContext) -> Shown:
        """What the page shows now.

        Raises:
            RefusedError: whoever is signed in may not see it.
        """
        await self._servicers.access.require_operator(context, "use the dashboard")
        try:
            shown = await self._views[view.name](dict(view.parameters), context)
        except RefusedError as error:
            if error.code is grpc.StatusCode.PERMISSION_DENIED:
                raise
            shown = {"error": {"code": error.code.name, "details": error.details}}
        return shown

    async def _status(self, context: OwnContext) -> admin_pb2.GetStatusResponse:
        return await self._servicers.admin.GetStatus(admin_pb2.GetStatusRequest(), context.for_servicer)

    async def _topology(self, parameters: Parameters, context: OwnContext) -> Shown:
        del parameters
        status = await self._status(context)
        traffic = await self._servicers.traffic.GetTraffic(traffic_pb2.GetTrafficRequest(), context.for_servicer)
        clients = len(status.clients)
        del status.clients[:]  # thousands, and no part of this page
        named = (each.service for each in status.services)
        calls = [(edge.caller or _NOBODY, edge.service) for edge in traffic.edges]
        return {
            "status": to_json(status),
            "clients": clients,
            "traffic": to_json(traffic),
            "layers": [*_lists(layers(named, calls))],
        }

    async def _service(self, parameters: Parameters, context: OwnContext) -> Shown:
        service = parameters.get("service", "")
        admin, traffic = self._servicers.admin, self._servicers.traffic
        status = await self._status(context)
        known = next((each for each in status.services if each.service == service), None)
        explained = await traffic.Explain(traffic_pb2.ExplainRequest(service=service), context.for_servicer)
        calls = await traffic.GetTraffic(traffic_pb2.GetTrafficRequest(service=service), context.for_servicer)
        endpoints = admin_pb2.ListEndpointsResponse()
        if known is not None:
            request = admin_pb2.ListEndpointsRequest(service=service)
            endpoints = await admin.ListEndpoints(request, context.for_servicer)
        return {
            "service": service,
            "status": None if known is None else to_json(known),
            "explanation": to_json(explained),
            "traffic": to_json(calls),
            "endpoints": to_json(endpoints),
            "subscriptions": _subscriptions(status, service),
        }

    async def _failures(self, parameters: Parameters, context: OwnContext) -> Shown:
        request = traffic_pb2.ListFailuresRequest(service=parameters.get("service", ""))
        answer = await self._servicers.traffic.ListFailures(request, context.for_servicer)
        return to_json(answer)

    async def _traces(self, parameters: Parameters, context: OwnContext) -> Shown:
        wanted = trace_pb2.TraceFilter(
            service=parameters.get("service", ""),
            method=parameters.get("method", ""),
            errors=parameters.get("errors") == "1",
        )
        if slow := parameters.get("slow", ""):
            wanted.min_duration.CopyFrom(_milliseconds(slow))
        request = trace_pb2.ListTracesRequest(filter=wanted, limit=50)
        return to_json(await self._servicers.traces.ListTraces(request, context.for_servicer))

    async def _trace(self, parameters: Parameters, context: OwnContext) -> Shown:
        trace_id = parameters.get("id", "")
        found = await self._servicers.traces.GetTrace(
            trace_pb2.GetTraceRequest(trace_id=trace_id), context.for_servicer
        )
        explained: Json = None
        try:
            request = traffic_pb2.ExplainRequest(trace_id=found.summary.trace_id)
            explained = to_json(await self._servicers.traffic.Explain(request, context.for_servicer))
        except RefusedError:
            pass  # no failed call of it is kept
        return {"trace": to_json(found), "explanation": explained}

    async def _policies(self, parameters: Parameters, context: OwnContext) -> Shown:
        del parameters
        status = await self._status(context)
        counts = _policy_counts(status)
        shown: Shown = {"problems": [to_json(each) for each in status.policy_problems]}
        for name, kind in KINDS.items():
            request = admin_pb2.ListPoliciesRequest(kind=kind)
            answer = await self._servicers.admin.ListPolicies(request, context.for_servicer)
            shown[name] = [_stored(each) for each in answer.policies]
        shown["services"] = [
            {
                "service": each.service,
                "policy_version": each.policy_version,
                "has_policy": each.has_policy,
                "followers": followers,
                "current": current,
            }
            for each in status.services
            for followers, current in (counts.get(each.service, (0, 0)),)
        ]
        shown["edges"] = [to_json(each) for each in status.edges]
        return shown

    async def _policy(self, parameters: Parameters, context: OwnContext) -> Shown:
        kind, name = parameters.get("kind", "service"), parameters.get("name", "")
        if kind not in KINDS:
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"kind: expected one of {', '.join(KINDS)}")
        status = await self._status(context)
        stored: Json = None
        try:
            request = admin_pb2.GetPolicyRequest(kind=KINDS[kind], service=name)
            stored = _stored((await self._servicers.admin.GetPolicy(request, context.for_servicer)).policy)
        except RefusedError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
        known = next((each for each in status.services if each.service == name), None)
        edge = next((each for each in status.edges if each.edge == name), None)
        of_service = kind == "service"
        return {
            "kind": kind,
            "name": name,
            "stored": stored,
            "published": "" if known is None or not of_service else known.policy_version,
            "subscriptions": _subscriptions(status, name if of_service else "", (_POLICY,)),
            "edge": None if edge is None or of_service else to_json(edge),
        }

    async def _certificates(self, parameters: Parameters, context: OwnContext) -> Shown:
        del parameters
        if self._servicers.authority is None:
            return {"authority": None}
        asked: Any = context.for_servicer
        answer = await self._servicers.authority.GetCertificateAuthority(
            authority_pb2.GetCertificateAuthorityRequest(), asked
        )
        tokens = await self._servicers.authority.ListJoinTokens(authority_pb2.ListJoinTokensRequest(), asked)
        status = await self._status(context)
        nodes: dict[str, list[Json]] = {}
        for client in status.clients:
            nodes.setdefault(client.workload_id, []).append(client.node_id)
        return {
            "authority": to_json(answer),
            "leaf_lifetime": self._servicers.leaf_lifetime,
            "tokens": to_json(tokens)["tokens"],
            "nodes": {workload: nodes[workload] for workload in sorted(nodes) if workload},
        }


def _stored(policy: admin_pb2.StoredPolicy) -> Shown:
    """A stored policy, with its YAML as it is edited and as it is obeyed."""
    message = policy.edge_policy if policy.HasField("edge_policy") else policy.policy
    valid = policy.HasField("edge_policy") or policy.HasField("policy")
    return {
        "name": policy.service,
        "stored_version": policy.stored_version,
        "errors": [to_json(each) for each in policy.errors],
        "yaml": stated_yaml(message) if valid else "",
        "effective": to_yaml(effective(message)) if valid else "",
    }


def _subscriptions(status: admin_pb2.GetStatusResponse, service: str, types: Iterable[int] = _TYPES) -> Shown:
    """Who follows a service, and which versions they have acknowledged; those that lag first."""
    found = [
        (client, subscription)
        for client in status.clients
        for subscription in client.subscriptions
        if subscription.service == service and subscription.type in types
    ]
    found.sort(key=lambda each: (_is_current(each[1]), each[0].node_id, each[1].type))
    rows: list[Json] = [
        {"node_id": client.node_id, "client": client.service, "peer": client.peer, **to_json(subscription)}
        for client, subscription in found[:MAX_SUBSCRIPTIONS]
    ]
    return {"all": len(found), "current": sum(_is_current(each) for _, each in found), "rows": rows}


def _is_current(subscription: admin_pb2.SubscriptionStatus) -> bool:
    return bool(subscription.current_version) and subscription.acknowledged_version == subscription.current_version


def _policy_counts(status: admin_pb2.GetStatusResponse) -> dict[str, tuple[int, int]]:
    """How many follow the policy of each service, and how many of them have what is current."""
    counts: dict[str, tuple[int, int]] = {}
    for client in status.clients:
        for each in client.subscriptions:
            if each.type == _POLICY:
                followers, current = counts.get(each.service, (0, 0))
                counts[each.service] = (followers + 1, current + _is_current(each))
    return counts


def _milliseconds(text: str) -> Duration:
    if not text.isdecimal() or len(text) > 9:
        raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, f"slow: {text!r} is not allowed; expected milliseconds")
    duration = Duration()
    duration.FromMilliseconds(int(text))
    return duration


def _lists(rows: Iterable[Iterable[str]]) -> Iterable[Json]:
    return ([*row] for row in rows)
