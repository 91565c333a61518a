"""`mesh top`: who calls whom, and who handles whose events: how often, how well, how fast. From load reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, TypeVar

import typer
from mesh.v1 import traffic_pb2
from rich.console import Group, RenderableType
from rich.text import Text

from mesh_cli.client import AdminClient
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Timeout,
    checked_service,
    complete_service,
    connect,
    span,
)
from mesh_cli.output import add_row, count, names, reports_errors, seconds, table, to_json
from mesh_cli.traffic_form import PERCENTILES, percentile, rate, share, within
from mesh_cli.watch import show

Order = Literal["name", "rate", "failures", "p99"]
Load = TypeVar("Load")

_FIGURES = ("CALLS/S", "SUCCESS", "P50", "P95", "P99")


@reports_errors
def top(
    service: Annotated[
        str | None,
        typer.Argument(
            metavar="SERVICE",
            callback=lambda text: text if text is None else checked_service(text),
            autocompletion=complete_service,
            help="One service: who calls it, its methods, its endpoints, and what it calls.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        float,
        typer.Option(
            "--window", parser=span, metavar="TIME", show_default="1m", help="How far back figures go, at most 10m."
        ),
    ] = 60.0,
    sort: Annotated[Order, typer.Option("--sort", help="What comes first.")] = "name",
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, max=3600.0, metavar="SECONDS", help="How often it is shown anew.")
    ] = 2.0,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show live who calls whom: calls a second, success, percentiles, breakers and ejections. Ends with Ctrl-C.

    And who handles whose events; their times are those of the handlers.
    """
    request = traffic_pb2.GetTrafficRequest(service=service or "")
    request.window.FromNanoseconds(round(window * 1e9))
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        show(
            lambda: _fetch(client, request),
            lambda answer: render_traffic(answer, service or "", sort),
            to_json if as_json else None,
            None if once else interval,
        )


def _fetch(client: AdminClient, request: traffic_pb2.GetTrafficRequest) -> traffic_pb2.GetTrafficResponse:
    return client.call(client.traffic.GetTraffic, request)


def render_traffic(answer: traffic_pb2.GetTrafficResponse, service: str, sort: Order = "name") -> RenderableType:
    """The answer as tables."""
    told = f"{count(answer.reporting, 'process')} report" + ("s" if answer.reporting == 1 else "")
    about = f"{service}: calls" if service else "Calls"
    parts: list[RenderableType] = [Text(f"{about} of the last {within(answer.window)}; {told}", style="bold")]
    if not answer.reporting:
        parts += [Text(), Text("No process reports its calls: see MESH_LOAD_REPORTS, and `mesh status` for clients.")]
    elif not answer.edges and not answer.events:
        what = f"Nobody has called {service}, and it has called nobody," if service else "Nobody has called anybody"
        parts += [Text(), Text(f"{what} within the last 10 minutes.")]
    if service:
        parts += _service_parts(answer, service, sort)
    elif answer.edges:
        parts += [Text(), _edges(answer.edges, sort, "CALLER", "SERVICE")]
    if answer.events:
        parts += [Text(), _events(answer.events, sort)]
    return Group(*parts)


def _service_parts(answer: traffic_pb2.GetTrafficResponse, service: str, sort: Order) -> Iterator[RenderableType]:
    callers = [edge for edge in answer.edges if edge.service == service]
    callees = [edge for edge in answer.edges if edge.caller == service]
    if callers:
        yield from (Text(), _edges(callers, sort, "CALLER"))
    if answer.methods:
        shown = table("METHOD", *_FIGURES, "RETRIES", right=[*_FIGURES, "RETRIES"])
        for method in _sorted(answer.methods, sort, lambda each: (each.calls, each.method)):
            retries = str(method.retries or "-")
            add_row(shown, method.method.removeprefix("/"), *_figures(method.calls), retries)
        yield from (Text(), shown)
    if answer.endpoints:
        shown = table("ENDPOINT", "ATTEMPTS/S", *_FIGURES[1:], "", right=["ATTEMPTS/S", *_FIGURES[1:]])
        for endpoint in _sorted(answer.endpoints, sort, lambda each: (each.attempts, each.endpoint_id)):
            ejected = f"ejected by {count(endpoint.ejected_by, 'process')}" if endpoint.ejected_by else ""
            add_row(shown, endpoint.endpoint_id, *_figures(endpoint.attempts), Text(ejected, style="yellow"))
        yield from (Text(), shown)
    if callees:
        yield from (Text(), _edges(callees, sort, "CALLS"))


def _edges(edges: Sequence[traffic_pb2.EdgeTraffic], sort: Order, *who: str) -> RenderableType:
    shown = table(*who, *_FIGURES, "RETRIES", "IN FLIGHT", "", right=[*_FIGURES, "RETRIES", "IN FLIGHT"])
    for edge in _sorted(edges, sort, lambda each: (each.calls, f"{each.caller} {each.service}")):
        named = {"CALLER": edge.caller or "-", "SERVICE": edge.service, "CALLS": edge.service}
        figures = (*_figures(edge.calls), str(edge.retries or "-"), str(edge.in_flight or "-"))
        add_row(shown, *(named[each] for each in who), *figures, _trouble(edge))
    return shown


def _events(events: Sequence[traffic_pb2.EventTraffic], sort: Order) -> RenderableType:
    """Event edges. The times are those of handlers: how long events are on their way is among the metrics."""
    shown = table("PUBLISHER", "HANDLED BY", "EVENT", "EVENTS/S", *_FIGURES[1:], right=["EVENTS/S", *_FIGURES[1:]])
    for each in _sorted(events, sort, lambda each: (each.handled, f"{each.publisher} {each.service} {each.type}")):
        group = each.service if each.group == each.service else f"{each.service} ({each.group})"
        add_row(shown, each.publisher, group, each.type, *_figures(each.handled))
    return shown


def _figures(stats: traffic_pb2.TrafficStats) -> tuple[str | Text, ...]:
    return rate(stats.rate), share(stats), *(percentile(stats, name) for name in PERCENTILES)


def _trouble(edge: traffic_pb2.EdgeTraffic) -> Text:
    told = ["as received"] if edge.received else []
    if edge.breakers_open:
        told.append(f"breaker open in {edge.breakers_open} of {edge.processes}")
    if edge.ejected:
        told.append(f"ejected: {names(edge.ejected)}")
    style = "red" if edge.breakers_open else "yellow" if edge.ejected else ""
    return Text("; ".join(told), style=style)


def _sorted(
    loads: Sequence[Load], sort: Order, key: Callable[[Load], tuple[traffic_pb2.TrafficStats, str]]
) -> list[Load]:
    def order(load: Load) -> tuple[float, str]:
        stats, name = key(load)
        first = {
            "name": 0.0,
            "rate": -stats.rate,
            "failures": stats.success_rate if stats.HasField("success_rate") else 1.0,
            "p99": -seconds(stats.p99),
        }
        return first[sort], name

    return sorted(loads, key=order)
