"""`mesh explain`: why calls to a service fail, or why the call of one trace did."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

import grpc
import typer
from mesh.v1 import trace_pb2, traffic_pb2
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
)
from mesh_cli.output import (
    Failure,
    Indented,
    Json,
    console,
    printable,
    reports_errors,
    seconds,
    to_json,
    write_error,
    write_json,
)
from mesh_cli.traffic_form import failure, one_line
from mesh_cli.waterfall import took

_TRACE = re.compile(r"[0-9a-f]{32}")
_BEGINNING = re.compile(r"[0-9a-f]{8,31}")
"""Of the id of a trace, as `mesh trace` lists them. A service may be called so too, and then is meant."""
_MARKS = {
    traffic_pb2.SEVERITY_OK: ("ok", "green"),
    traffic_pb2.SEVERITY_WARNING: ("warning", "yellow"),
    traffic_pb2.SEVERITY_ERROR: ("error", "bold red"),
}
_UNKNOWN = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


def _checked(text: str) -> str:
    lowered = text.lower()
    return lowered if _TRACE.fullmatch(lowered) or _BEGINNING.fullmatch(lowered) else checked_service(text)


@reports_errors
def explain(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SERVICE|TRACE",
            callback=_checked,
            autocompletion=complete_service,
            help="A service that is called, or a trace by its id or the first 8 or more of its 32 hex digits.",
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Explain why calls to a service fail: endpoints, breakers, versions, identities, policy, and the last failures.

    Of a trace: why its call failed. Exit code 1 when nothing is known of it.
    """
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            if _TRACE.fullmatch(subject):
                failed, answer = _explain_trace(client, subject)
            elif _BEGINNING.fullmatch(subject):
                failed, answer = _explain_either(client, subject)
            else:
                failed, answer = None, _explain_service(client, subject)
        except RefusedError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            write_error(error.details)
            raise Failure from None
    if as_json:
        write_json(_json(failed, answer))
    else:
        console().print(render_explanation(answer, failed))


def _explain_service(client: AdminClient, service: str) -> traffic_pb2.ExplainResponse:
    return client.call(client.traffic.Explain, traffic_pb2.ExplainRequest(service=service))


def _explain_either(
    client: AdminClient, subject: str
) -> tuple[trace_pb2.TraceSpan | None, traffic_pb2.ExplainResponse]:
    """The explanation of a service, or of the one trace whose id begins so when no service is called so."""
    try:
        return None, _explain_service(client, subject)
    except RefusedError as error:
        if error.code is not grpc.StatusCode.NOT_FOUND:
            raise
        unknown = error.details
    try:
        found = client.call(client.traces.GetTrace, trace_pb2.GetTraceRequest(trace_id=subject))
    except RefusedError as error:
        if error.code not in _UNKNOWN:
            raise
        write_error(f"{unknown}; {error.details}")
        raise Failure from None
    return _explain_trace(client, found.summary.trace_id)


def _explain_trace(
    client: AdminClient, trace_id: str
) -> tuple[trace_pb2.TraceSpan | None, traffic_pb2.ExplainResponse]:
    """The explanation of a trace's call; and the span where it began to fail, if it is the trace alone that tells."""
    try:
        return None, client.call(client.traffic.Explain, traffic_pb2.ExplainRequest(trace_id=trace_id))
    except RefusedError as error:
        if error.code is not grpc.StatusCode.NOT_FOUND:
            raise
        unknown = error
    try:
        found = client.call(client.traces.GetTrace, trace_pb2.GetTraceRequest(trace_id=trace_id))
    except RefusedError as error:
        if error.code not in _UNKNOWN:
            raise
        raise unknown from None
    failed = [span for span in found.spans if span.status == trace_pb2.SPAN_STATUS_ERROR]
    if not failed:
        write_error(f"no span of trace {trace_id} failed; `mesh trace {trace_id[:16]}` shows it")
        raise Failure
    # Where it began: the failure that has no other below it.
    cause = max(failed, key=lambda span: span.depth)
    service = cause.attributes.get("mesh.service", cause.service)
    return cause, _explain_service(client, service)


def _json(failed: trace_pb2.TraceSpan | None, answer: traffic_pb2.ExplainResponse) -> dict[str, Json]:
    return {**to_json(answer), "failed_span": None if failed is None else to_json(failed)}


def render_explanation(
    answer: traffic_pb2.ExplainResponse, failed: trace_pb2.TraceSpan | None = None
) -> RenderableType:
    """What was found, the worst first, and the failed calls."""
    parts: list[RenderableType] = []
    if failed is not None:
        parts += [_failed_span(failed), Text()]
    parts.append(Text(f"Calls to {printable(answer.service)}", style="bold"))
    parts += _findings(answer)
    if answer.failures:
        parts += [Text(), Text("Failed calls of the last 10 minutes", style="bold")]
        for group in answer.failures:
            parts += [Text(), *failure(group)]
    else:
        parts += [Text(), Text("No failed calls were reported within the last 10 minutes.")]
    return Group(*parts)


def _failed_span(span: trace_pb2.TraceSpan) -> Text:
    message = f": {one_line(span.status_message)}" if span.status_message else ""
    where = f" at {printable(span.instance)}" if span.instance else ""
    return Text(
        f"It failed in {printable(span.service)}{where}: {printable(span.name)} after "
        f"{took(seconds(span.duration))}{message}"
    )


def _findings(answer: traffic_pb2.ExplainResponse) -> Iterator[RenderableType]:
    for finding in answer.findings:
        mark, style = _MARKS.get(finding.severity, ("-", ""))
        yield Text.assemble((f"{mark:<8}", style), f"{printable(finding.subject)}: {printable(finding.message)}")
        if finding.remedy:
            yield Indented(Text(f"-> {printable(finding.remedy)}"), 8)
