"""`mesh trace`: the last traces, and one of them as a waterfall."""

from __future__ import annotations

from typing import Annotated

import grpc
import typer
from mesh.v1 import trace_pb2 as pb
from rich.console import Group, RenderableType
from rich.text import Text

from mesh_cli.client import AdminClient, RefusedError
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
from mesh_cli.output import (
    Failure,
    add_row,
    age,
    console,
    count,
    printable,
    reports_errors,
    seconds,
    table,
    to_json,
    write_error,
    write_json,
)
from mesh_cli.waterfall import render_waterfall, took

_SHORT = 12
"""Characters of a trace id that tables show: enough to ask for the trace by. JSON has all."""
_REASONS = {pb.TRACE_REASON_SLOW: "slow"}
_MIB = 1024 * 1024

_SAID_BY_CONTROL_PLANE = (
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)


@reports_errors
def trace(
    trace_id: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="One trace, by its id or the beginning of it.", show_default=False),
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(
            "--service",
            metavar="SERVICE",
            callback=lambda text: text if text is None else checked_service(text),
            autocompletion=complete_service,
            help="Traces in which this service took part.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Traces with this method: package.Service/Method, package.Service/*, or the method's name alone.",
            show_default=False,
        ),
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Traces in which a span failed: of --service and --method, if given.")
    ] = False,
    slow: Annotated[
        float | None,
        typer.Option(
            "--slow",
            parser=span,
            metavar="TIME",
            help="Traces that took at least so long, such as 200ms; with --service or --method, their spans.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1_000, help="How many traces are listed at most.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show new traces as they come, until Ctrl-C.")] = False,
    attributes: Annotated[
        bool, typer.Option("--attributes", "-a", help="With ID: show the attributes of spans too.")
    ] = False,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """List the last traces that the control plane keeps, or show one of them as a waterfall.

    Exit code 1 when there is no such trace.
    """
    wanted = pb.TraceFilter(service=service or "", method=method or "", errors=errors)
    if slow is not None:
        wanted.min_duration.FromNanoseconds(round(slow * 1e9))
    if trace_id is not None and (watch or wanted != pb.TraceFilter()):
        raise typer.BadParameter("is one trace: it goes with none of --service, --method, --errors, --slow, --watch")
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            if trace_id is not None:
                _show(client, trace_id, attributes=attributes, as_json=as_json)
            elif watch:
                _follow(client, wanted, as_json=as_json)
            else:
                _list(client, wanted, limit, as_json=as_json)
        except RefusedError as error:
            if error.code not in _SAID_BY_CONTROL_PLANE:
                raise
            write_error(error.details)
            raise Failure from None


def _show(client: AdminClient, trace_id: str, *, attributes: bool, as_json: bool) -> None:
    answer = client.call(client.traces.GetTrace, pb.GetTraceRequest(trace_id=trace_id))
    if as_json:
        write_json(to_json(answer))
        return
    out = console()
    out.print(
        render_trace(answer, out.width, attributes=attributes, ascii_only=not out.encoding.lower().startswith("utf"))
    )


def _list(client: AdminClient, wanted: pb.TraceFilter, limit: int, *, as_json: bool) -> None:
    answer = client.call(client.traces.ListTraces, pb.ListTracesRequest(filter=wanted, limit=limit))
    if as_json:
        write_json(to_json(answer))
    else:
        console().print(render_traces(answer, filtered=wanted != pb.TraceFilter()))


def _follow(client: AdminClient, wanted: pb.TraceFilter, *, as_json: bool) -> None:
    out = console()
    try:
        for answer in client.stream(client.traces.WatchTraces, pb.WatchTracesRequest(filter=wanted)):
            if as_json:
                write_json(to_json(answer.trace), compact=True)
            else:
                out.print(_line(answer.trace), soft_wrap=True)
    except KeyboardInterrupt:
        return


def render_traces(answer: pb.ListTracesResponse, *, filtered: bool) -> RenderableType:
    """The traces as a table, and how much is kept."""
    store = answer.store
    memory = f"{store.bytes / _MIB:.1f} of {store.max_bytes / _MIB:.0f} MiB"
    held = f"{count(store.traces, 'trace')} with {count(store.spans, 'span')}"
    kept = f"{held} kept, {memory}, each for {age(store.max_age)} at most."
    parts: list[RenderableType] = []
    if answer.traces:
        linked = any(trace.link for trace in answer.traces)
        shown = table(
            *("TRACE", "START", "TOOK", "SERVICE", "ENTRY", "SPANS", "ERRORS"),
            "JAEGER" if linked else "SERVICES",
            right=["TOOK", "SPANS", "ERRORS"],
        )
        shown.columns[0].no_wrap = True  # an id, or an address, in two lines is of no use
        if linked:
            shown.columns[-1].no_wrap = True
            shown.columns[-1].min_width = max(len(printable(trace.link)) for trace in answer.traces)
        for trace in answer.traces:
            add_row(
                shown,
                trace.trace_id[:_SHORT],
                start_of(trace),
                Text(took(seconds(trace.duration)), style="yellow" if trace.reason in _REASONS else ""),
                trace.service,
                trace.name if trace.complete else f"{trace.name} (root missing)",
                str(trace.spans),
                Text(str(trace.errors), style="red" if trace.errors else ""),
                trace.link if linked else ", ".join(trace.services),
            )
        parts += [shown, Text(), Text(kept)]
    elif store.traces:
        parts += [Text("No trace that is kept is one of those." if filtered else "No trace is kept."), Text(kept)]
    else:
        parts.append(
            Text("No traces have come yet. Services send them when they run with MESH_TRACING=1 and the tracing extra.")
        )
    if store.refused or store.refused_requests:
        parts.append(
            Text(
                f"Refused since the start: {count(store.refused, 'span')}, {count(store.refused_requests, 'request')}; "
                "the control plane's log says whose and why.",
                style="yellow",
            )
        )
    if answer.jaeger_ui:
        parts.append(Text(printable(f"Jaeger: {answer.jaeger_ui}")))
    return Group(*parts)


def render_trace(answer: pb.GetTraceResponse, width: int, *, attributes: bool, ascii_only: bool) -> RenderableType:
    """One trace: what it is, and its waterfall."""
    summary = answer.summary
    head = (
        f"Trace {summary.trace_id} at {start_of(summary)}: {took(seconds(summary.duration))}, "
        f"{count(summary.spans, 'span')} of {', '.join(summary.services)}, {count(summary.errors, 'error')}"
    )
    parts: list[RenderableType] = [Text(printable(head), style="bold")]
    if summary.link:
        parts.append(Text(printable(summary.link)))
    return Group(*parts, Text(), render_waterfall(answer, width, attributes=attributes, ascii_only=ascii_only))


def start_of(trace: pb.TraceSummary) -> str:
    """When a trace began, to the millisecond, UTC."""
    return f"{trace.start.ToDatetime():%Y-%m-%dT%H:%M:%S}.{trace.start.nanos // 1_000_000:03d}Z"


def _line(trace: pb.TraceSummary) -> Text:
    cells = (
        start_of(trace),
        trace.trace_id[:_SHORT],
        f"{took(seconds(trace.duration)):>7}",
        trace.service,
        trace.name,
        f"{count(trace.spans, 'span')} of {', '.join(trace.services)}",
    )
    line = Text(printable("  ".join(cells)))
    if trace.errors:
        line.append(f"  {count(trace.errors, 'error')}", style="red")
    if trace.link:
        line.append(printable(f"  {trace.link}"))
    return line
