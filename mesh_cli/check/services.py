"""Checks of what runs in the mesh: policies, services, clients, edges, events, what operators have drained. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from mesh.v1 import admin_pb2, edge_service_pb2, telemetry_pb2

from mesh_cli.check.facts import Facts, PlaneFacts
from mesh_cli.check.findings import Finding, failure, or_passed, skipped, some, warning
from mesh_client.core.renewal import in_words

POLICIES, SERVICES, CLIENTS, EDGES, EVENTS = "policies", "services", "clients", "edges", "events"

LONG_WAITING = 60.0
"""Seconds after which an event that waits in an outbox, with a broker, is one that the broker does not take."""
_SENDERS = (telemetry_pb2.OUTBOX_RELAY_CONNECTED, telemetry_pb2.OUTBOX_RELAY_DISCONNECTED)
LONG_DRAINED = 3_600.0
"""Seconds after which somebody has probably forgotten that they drained an endpoint."""


def check_mesh(facts: Facts) -> list[Finding]:
    """All of it. Policies, services and edges are the same for every control plane; clients are each one's own."""
    if not facts.reached:
        return []
    first = facts.reached[0]
    findings = [*check_policies(first), *check_rules(facts), *check_services(facts), *check_drains(facts)]
    for plane in facts.reached:
        findings += check_clients(plane)
    sending = senders(facts.reached)
    outboxes = [finding for plane in facts.reached for finding in check_outboxes(plane, sending)]
    return [*findings, *check_edges(first), *outboxes]


def check_policies(plane: PlaneFacts) -> list[Finding]:
    """Every stored policy is valid, and so obeyed."""
    found = []
    for problem in plane.status.policy_problems:
        fields = some(
            (f"{error.path}: {error.message}" if error.path else error.message for error in problem.errors), 3
        )
        obeyed = f"version {problem.obeyed_version}" if problem.obeyed_version else "the defaults"
        edge = problem.kind == admin_pb2.POLICY_KIND_EDGE
        whose = f"the edge {problem.service}" if edge else problem.service
        fix = f"correct it with `mesh {'edge' if edge else 'policy'} apply`"
        found.append(failure(POLICIES, "valid", f"that of {whose} is not obeyed, but {obeyed}: {fields}", fix))
    if plane.policies is None and not found:
        return [skipped(POLICIES, "valid", f"{plane.address} cannot read what is stored now")]
    return or_passed(found, POLICIES, "valid", f"{len(plane.policies or ())} stored, all of them valid")


def check_rules(facts: Facts) -> list[Finding]:
    """Authorization rules name services that there are: others are mostly misspelt."""
    known = {service.service for plane in facts.reached for service in plane.status.services}
    known |= {client.service for plane in facts.reached for client in plane.status.clients}
    for plane in facts.reached:
        if plane.authority is not None:
            known |= {workload.spiffe_id.rpartition("/service/")[2] for workload in plane.authority.workloads}
    found = []
    for stored in facts.reached[0].policies or ():
        unknown = [
            caller
            for rule in stored.policy.authorization
            for caller in rule.callers
            if caller != "*" and not caller.startswith("operator:") and caller not in known
        ]
        if unknown:
            detail = f"that of {stored.service} allows callers that nobody has seen: {some(dict.fromkeys(unknown))}"
            found.append(warning(POLICIES, "callers", detail, "see whether they are misspelt, or not there yet"))
    return or_passed(found, POLICIES, "callers", "authorization rules name services that there are")


def check_services(facts: Facts) -> list[Finding]:
    """Every service has a healthy endpoint."""
    status = facts.reached[0].status
    found = []
    for service in status.services:
        if service.healthy:
            continue
        subscribers = sum(
            each.subscribers
            for plane in facts.reached
            for each in plane.status.services
            if each.service == service.service
        )
        there = f"{service.unhealthy} unhealthy, {service.draining} draining"
        detail = f"{service.service} has no healthy endpoint ({there}); {subscribers} clients subscribe to it"
        fix = f"see `mesh endpoints {service.service}` and `mesh logs {service.service}`"
        found.append((failure if subscribers else warning)(SERVICES, "endpoints", detail, fix))
    number = len(status.services)
    return or_passed(found, SERVICES, "endpoints", f"{number} services, each with a healthy endpoint")


def check_drains(facts: Facts) -> list[Finding]:
    """Nobody has forgotten what they drained, and all control planes know of it."""
    found = []
    drained: dict[tuple[str, str], list[str]] = {}
    for plane in facts.reached:
        for drain in plane.diagnosis.drains if plane.diagnosis is not None else ():
            where = drained.setdefault((drain.service, drain.endpoint_id), [])
            where.append(plane.address)
            ago = facts.now - drain.since.seconds
            if len(where) == 1 and ago > LONG_DRAINED:
                who = drain.operator.rpartition("/operator/")[2]
                detail = f"{drain.service}/{drain.endpoint_id} was drained by {who} {in_words(ago)} ago"
                fix = f"`mesh drain {drain.service} {drain.endpoint_id} --undo`, unless that is meant"
                found.append(warning(SERVICES, "drains", detail, fix))
    for (service, endpoint), where in drained.items():
        others = [plane.address for plane in facts.reached if plane.address not in where]
        if others:
            detail = f"{service}/{endpoint} is drained for the clients of {some(where)}, and not of {some(others)}"
            found.append(warning(SERVICES, "drains", detail, f"repeat `mesh drain {service} {endpoint}`"))
    return or_passed(found, SERVICES, "drains", f"{len(drained)} drained by operators")


def check_clients(plane: PlaneFacts) -> list[Finding]:
    """Every client has what is current."""
    found = []
    later = {client.node_id: client for client in plane.later.clients} if plane.later is not None else {}
    for client in plane.status.clients:
        found += [*_rejections(client), *_unknown(client), *_lag(client, later.get(client.node_id))]
    number = len(plane.status.clients)
    return or_passed(found, CLIENTS, "up to date", f"{number} clients of {plane.address}")


def _rejections(client: admin_pb2.ClientStatus) -> Iterator[Finding]:
    for each in client.subscriptions:
        if each.rejection:
            kept = each.acknowledged_version or "none"
            detail = f"{client.node_id} does not take {each.current_version} of {each.service} and keeps {kept}: "
            detail += each.rejection
            yield failure(CLIENTS, "rejections", detail, "upgrade the client, or change the policy")


def _unknown(client: admin_pb2.ClientStatus) -> Iterator[Finding]:
    unknown = [
        each.service for each in client.subscriptions if not each.acknowledged_version and not each.current_version
    ]
    if unknown:
        detail = f"{client.node_id} asks for services that no registry lists: {some(dict.fromkeys(unknown))}"
        yield warning(CLIENTS, "unknown services", detail, "see whether they are misspelt, or not there yet")


def _lag(client: admin_pb2.ClientStatus, later: admin_pb2.ClientStatus | None) -> Iterator[Finding]:
    """Who has not acknowledged what was current a moment ago."""
    if later is None:
        return
    acknowledged = {(each.type, each.service): each for each in later.subscriptions}
    behind = []
    for each in client.subscriptions:
        now = acknowledged.get((each.type, each.service))
        stuck = now is not None and now.acknowledged_version == each.acknowledged_version != each.current_version
        if stuck and not each.rejection and each.current_version:
            behind.append(each.service)
    if behind:
        detail = f"{client.node_id} has not acknowledged what is current of {some(dict.fromkeys(behind))}"
        yield warning(
            CLIENTS, "lag", detail, f"it hangs, or its connection does: see `mesh logs {client.service or 'SERVICE'}`"
        )


def check_edges(plane: PlaneFacts) -> list[Finding]:
    """Every edge runs by its policy."""
    if not plane.status.edges:
        return []
    found = [finding for edge in plane.status.edges for finding in _edge(edge)]
    return or_passed(
        found, EDGES, "applied", f"{some(edge.edge for edge in plane.status.edges)}: run by their policies"
    )


def _edge(edge: admin_pb2.EdgeStatus) -> Iterator[Finding]:
    if edge.unknown_upstreams:
        detail = f"{edge.edge} sends calls to services that no registry lists: {some(edge.unknown_upstreams)}"
        yield warning(EDGES, "upstreams", detail, "start them, or correct the policy with `mesh edge apply`")
    if edge.has_policy and not edge.gateways:
        detail = f"{edge.edge} has a policy, and no gateway that follows it"
        yield warning(EDGES, "gateways", detail, "start its gateway, or `mesh edge delete` the policy")
    if edge.gateways and not edge.has_policy:
        detail = f"{edge.edge} has a gateway and no policy, so it exposes nothing"
        yield warning(EDGES, "gateways", detail, "`mesh edge apply` a policy")
    for gateway in edge.gateways:
        if not gateway.HasField("report"):
            yield warning(EDGES, "reports", f"{gateway.id} of {edge.edge} has said nothing yet", "see its log")
            continue
        report = gateway.report
        if report.outcome == edge_service_pb2.EDGE_OUTCOME_REJECTED:
            kept = report.applied_version or "none"
            detail = (
                f"{gateway.id} of {edge.edge} cannot obey {report.policy_version} and keeps {kept}: {report.detail}"
            )
            yield failure(EDGES, "reports", detail, "correct the policy with `mesh edge apply`")
        elif report.outcome == edge_service_pb2.EDGE_OUTCOME_FAILED:
            detail = f"{gateway.id} of {edge.edge} cannot be told {report.policy_version}: {report.detail}"
            yield failure(EDGES, "reports", detail, "see whether its edge runs; the gateway goes on trying")


def senders(planes: Iterable[PlaneFacts]) -> set[str]:
    """Services of which a process speaks that sends what is in their outbox, or would."""
    return {each.service for plane in planes for each in plane.status.outboxes if each.outbox.relay in _SENDERS}


def check_outboxes(plane: PlaneFacts, sending: Collection[str] = ()) -> list[Finding]:
    """Everything that is published is sent; nothing is said where nobody has an outbox.

    Args:
        plane: what it says; of outboxes that are well, how many there are.
        sending: services with a process that sends, or would, and so says itself why events wait.
    """
    known = len(plane.status.outboxes) + plane.status.sent_outboxes
    if not known:
        return []
    return or_passed(
        _outboxes(plane, sending),
        EVENTS,
        "broker",
        f"{known} outboxes known to {plane.address}, from which all is sent",
    )


def _outboxes(plane: PlaneFacts, sending: Collection[str]) -> Iterator[Finding]:
    for each in plane.status.outboxes:
        outbox = each.outbox
        who, waiting = f"{each.node_id} of {each.service}", f"{outbox.events} of {outbox.max_events} events wait"
        if outbox.refused:
            detail = f"{who}: the broker will never take {outbox.refused} of its events"
            yield warning(
                EVENTS, "refused", detail, "they are in mesh_outbox_refused; raise the broker's limit on sizes"
            )
        if outbox.relay == telemetry_pb2.OUTBOX_RELAY_NO_BROKER:
            yield warning(EVENTS, "broker", f"{who} has no broker: {waiting}", "name one in MESH_BROKER")
        elif outbox.relay == telemetry_pb2.OUTBOX_RELAY_DISCONNECTED:
            yield warning(EVENTS, "broker", f"{who}: {waiting}: {outbox.broker}", "repair the connection to the broker")
        elif outbox.events and each.oldest.ToTimedelta().total_seconds() > LONG_WAITING:
            fix = "subscribe a group to them, or publish them with mandatory=False; see its log"
            if outbox.relay == telemetry_pb2.OUTBOX_RELAY_STANDBY:
                if each.service in sending:
                    continue
                fix = f"another process of {each.service} has to send them, and reports nothing: see whether it hangs"
            yield warning(EVENTS, "waiting", f"{who}: {waiting}, for longer than a minute", fix)
