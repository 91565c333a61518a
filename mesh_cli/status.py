"""`mesh status`: one control plane, what it reads, the services it knows, and what its clients hold."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.v1 import admin_pb2, resource_pb2
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
from mesh_cli.watch import show

_TYPES = {
    resource_pb2.RESOURCE_TYPE_SERVICE_POLICY: "policy",
    resource_pb2.RESOURCE_TYPE_SERVICE_ENDPOINTS: "endpoints",
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
    """Show the control plane: its sources, services and clients, rejected and invalid policies, held removals."""
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
        obeyed = f"version {printable(problem.obeyed_version)}" if problem.obeyed_version else "the defaults"
        service = printable(problem.service)
        yield Text(
            f"Invalid policy: the one stored for {service} is not obeyed; clients keep to {obeyed}. "
            f"Correct it with `mesh policy apply`.",
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
