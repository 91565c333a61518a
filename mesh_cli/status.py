"""`mesh status`: one control plane, what it reads, the services it knows, and what its clients hold."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.v1 import admin_pb2, edge_service_pb2, resource_pb2, telemetry_pb2
from rich.console import Group, RenderableType
from rich.text import Text

from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Interval,
    Operator,
    Timeout,
    Watch,
    connect,
)
from mesh_cli.output import add_row, age, count, names, printable, reports_errors, table, to_json
from mesh_cli.policy_kind import EDGE, SERVICE
from mesh_cli.watch import show

_TYPES = {
    resource_pb2.RESOURCE_TYPE_SERVICE_POLICY: "policy",
    resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS: "endpoints",
}
_KINDS = {edge_service_pb2.EDGE_KIND_KONG: "kong", edge_service_pb2.EDGE_KIND_ENVOY: "envoy"}
_OUTCOMES = {
    edge_service_pb2.EDGE_OUTCOME_APPLIED: ("applied", "green"),
    edge_service_pb2.EDGE_OUTCOME_REJECTED: ("rejected", "bold red"),
    edge_service_pb2.EDGE_OUTCOME_FAILED: ("failed", "bold red"),
    edge_service_pb2.EDGE_OUTCOME_STANDBY: ("standby", "dim"),
}


@reports_errors
def status(
    as_json: AsJson = False,
    watch: Watch = False,
    interval: Interval = 2.0,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the control plane: sources, services, clients, edges and outboxes, bad policies, held removals."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        show(
            lambda: client.call(client.stub.GetStatus, admin_pb2.GetStatusRequest()),
            lambda answer: render_status(answer, client.address),
            to_json if as_json else None,
            interval if watch else None,
        )


def render_status(answer: admin_pb2.GetStatusResponse, address: str) -> RenderableType:
    """The whole status as tables, trouble first."""
    parts: list[RenderableType] = [
        Text.assemble(
            f"Control plane {printable(answer.control_plane)} at {address}, up {age(answer.uptime)}, ",
            f"trust domain {printable(answer.trust_domain)}" if answer.trust_domain else ("insecure", "red"),
            style="bold",
        )
    ]
    for section in (
        _sources(answer),
        _removal_hold(answer),
        _policy_problems(answer),
        _denials(answer),
        _services(answer),
        _clients(answer),
        _rejections(answer),
        _edges(answer),
        _outboxes(answer),
    ):
        rendered = list(section)
        if rendered:
            parts += [Text(), *rendered]
    return Group(*parts)


def _sources(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    if not answer.sources:
        return
    shown = table("SOURCE", "STATE", "FOR", "DETAIL")
    for source in answer.sources:
        state = Text("connected", style="green") if source.connected else Text("lost", style="bold red")
        detail = source.detail or "-"
        if not source.connected:
            detail += "; what it said last stays published"
        add_row(shown, source.name, state, age(source.since), detail)
    yield shown


def _removal_hold(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    if not answer.HasField("removal_hold"):
        return
    hold = answer.removal_hold
    yield Text(
        f"Held removals: the source has not listed {count(hold.endpoints, 'endpoint')} of {names(hold.services)} for "
        f"{age(hold.since)}. So many vanishing at once looks like a fault of the registry, so they stay published; "
        f"they are removed in {age(hold.remaining)}.",
        style="yellow",
    )
    yield Text("If they are really gone, run `mesh removals confirm`. If not, repair the registry.", style="yellow")


def _policy_problems(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    for problem in answer.policy_problems:
        obeyed = f"version {printable(problem.obeyed_version)}" if problem.obeyed_version else ""
        if problem.kind == admin_pb2.POLICY_KIND_EDGE:
            kind, whose, keep = EDGE, "gateways keep to ", obeyed or "what they have"
        else:
            kind, whose, keep = SERVICE, "clients keep to ", obeyed or "the defaults"
        yield Text(
            f"Invalid policy: the one stored for {kind.called(printable(problem.service))} is not obeyed; "
            f"{whose}{keep}. Correct it with `mesh {kind.command} apply`.",
            style="red",
        )
        for error in problem.errors:
            yield Text(printable(f"  {error.path}: {error.message}" if error.path else f"  {error.message}"))


def _denials(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    if not answer.denials:
        return
    shown = table("REFUSED", "TIMES", right=["TIMES"])
    for denials in answer.denials:
        add_row(shown, denials.caller, str(denials.count))
    yield shown
    yield Text("They asked for what their identity does not allow; the control plane's log says for what.")


def _services(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    if not answer.services:
        yield Text("No services are known: none is registered yet.")
        return
    numbers = ("HEALTHY", "UNHEALTHY", "DRAINING", "SUBSCRIBERS")
    shown = table("SERVICE", "SOURCE", *numbers, "ENDPOINTS", "POLICY", right=numbers)
    for service in answer.services:
        add_row(
            shown,
            service.service,
            service.source or "-",
            Text(str(service.healthy), style="" if service.healthy else "bold red"),
            Text(str(service.unhealthy), style="red" if service.unhealthy else ""),
            str(service.draining),
            str(service.subscribers),
            service.endpoints_version or "-",
            f"{service.policy_version}{'' if service.has_policy else ' (defaults)'}" if service.policy_version else "-",
        )
    yield shown


def _clients(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    if not answer.clients:
        yield Text("No clients are connected.")
        return
    shown = table("CLIENT", "OF", "PEER", "FOR", "SUBSCRIBED TO", "TYPE", "ACKNOWLEDGED", "CURRENT", "AGO", "STATE")
    for client in answer.clients:
        who = (client.node_id, client.service or "-", client.peer, age(client.connected))
        if not client.subscriptions:
            add_row(shown, *who, "-", "-", "-", "-", "-", "idle")
        for subscription in client.subscriptions:
            add_row(
                shown,
                *who,
                subscription.service,
                _TYPES.get(subscription.type, "-"),
                subscription.acknowledged_version or "-",
                subscription.current_version or "-",
                age(subscription.acknowledged_ago) if subscription.HasField("acknowledged_ago") else "-",
                subscription_state(subscription),
            )
            who = ("", "", "", "")
    yield shown


def subscription_state(subscription: admin_pb2.SubscriptionStatus) -> Text:
    """In a word: whether the client has what is current."""
    if subscription.rejection:
        return Text("rejected", style="bold red")
    if not subscription.acknowledged_version and not subscription.current_version:
        return Text("unknown service", style="yellow")
    if subscription.acknowledged_version == subscription.current_version:
        return Text("current", style="green")
    return Text("behind" if subscription.acknowledged_version else "waiting", style="yellow")


def _rejections(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    for client in answer.clients:
        for subscription in client.subscriptions:
            if subscription.rejection:
                kept = subscription.acknowledged_version
                yield Text(
                    printable(
                        f"Rejected: {client.node_id} does not take {_TYPES.get(subscription.type, 'resource')} "
                        f"{subscription.current_version} of {subscription.service} and keeps "
                        f"{kept or 'none'}: {subscription.rejection}"
                    ),
                    style="red",
                )


def _edges(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    if not answer.edges:
        return
    shown = table("EDGE", "CURRENT", "GATEWAY", "KIND", "OF", "PEER", "FOR", "APPLIED", "LAST RESULT", "AGO")
    for edge in answer.edges:
        stored = "" if edge.has_policy else " (none)"
        which = (edge.edge, f"{edge.policy_version}{stored}" if edge.policy_version else "-")
        if not edge.gateways:
            add_row(shown, *which, Text("no gateway", style="yellow"), *7 * ("-",))
        for gateway in edge.gateways:
            add_row(
                shown,
                *which,
                gateway.id,
                _KINDS.get(gateway.kind, "-"),
                gateway.service or "-",
                gateway.peer,
                age(gateway.connected),
                gateway.report.applied_version or "-",
                gateway_result(gateway, edge.policy_version),
                age(gateway.report.ago) if gateway.HasField("report") else "-",
            )
            which = ("", "")
    yield shown
    for edge in answer.edges:
        if edge.unknown_upstreams:
            services = names(edge.unknown_upstreams)
            yield Text(
                f"Edge {printable(edge.edge)} sends calls to what no registry lists: {services}.", style="yellow"
            )
        for gateway in edge.gateways:
            if gateway.report.detail:
                result = _OUTCOMES.get(gateway.report.outcome, ("unknown", ""))[0]
                yield Text(
                    printable(
                        f"{result.capitalize()}: {gateway.id} of edge {edge.edge} keeps "
                        f"{gateway.report.applied_version or 'none'} in place of policy "
                        f"{gateway.report.policy_version}: {gateway.report.detail}"
                    ),
                    style="red",
                )


def _outboxes(answer: admin_pb2.GetStatusResponse) -> Iterator[RenderableType]:
    if not answer.outboxes:
        return
    shown = table("OUTBOX OF", "PROCESS", "EVENTS", "ROOM", "OLDEST", "BROKER", right=["EVENTS", "ROOM"])
    for each in answer.outboxes:
        outbox = each.outbox
        sent = outbox.relay in (telemetry_pb2.OUTBOX_RELAY_CONNECTED, telemetry_pb2.OUTBOX_RELAY_STANDBY)
        add_row(
            shown,
            each.service or "-",
            each.node_id,
            str(outbox.events),
            str(outbox.max_events),
            age(each.oldest) if each.HasField("oldest") else "-",
            Text(printable(outbox.broker), style="" if sent else "yellow"),
        )
    yield shown
    for each in answer.outboxes:
        if each.outbox.refused:
            yield Text(
                printable(
                    f"{count(each.outbox.refused, 'event')} of {each.service} will never be taken by the broker, and "
                    "are put aside in mesh_outbox_refused."
                ),
                style="red",
            )


def gateway_result(gateway: admin_pb2.EdgeGatewayStatus, current: str) -> Text:
    """In a word: what became of the policy, as far as the gateway has said."""
    if not gateway.HasField("report"):
        return Text("waiting", style="yellow")
    word, style = _OUTCOMES.get(gateway.report.outcome, ("unknown", "yellow"))
    if gateway.report.outcome == edge_service_pb2.EDGE_OUTCOME_STANDBY:
        return Text(word, style=style)
    if current and gateway.report.policy_version != current:
        return Text(f"behind, {word} {printable(gateway.report.policy_version)}", style="yellow")
    return Text(word, style=style)
