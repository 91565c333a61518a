"""`mesh tap`: single calls to a service as they end, as those who make them see them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated

import grpc
import typer
from mesh.v1 import traffic_pb2
from rich.text import Text

from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Service,
    Timeout,
    checked_service,
    complete_service,
    connect,
    span,
)
from mesh_cli.output import (
    Failure,
    console,
    count,
    printable,
    reports_errors,
    seconds,
    to_json,
    write_error,
    write_json,
    write_warning,
)
from mesh_cli.traffic_form import code_name, one_line
from mesh_cli.waterfall import took
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.policy import check_method_pattern

_NUMBERS = {code.name: code.value[0] for code in grpc.StatusCode}


def _checked_codes(texts: Sequence[str]) -> list[str]:
    """Names of statuses, several in one text separated by commas."""
    found = [name.strip().upper() for text in texts for name in text.split(",")]
    for name in found:
        if name not in _NUMBERS:
            raise typer.BadParameter(f"{name!r} is no gRPC status; expected one of {', '.join(_NUMBERS)}")
    return found


def _checked_method(text: str | None) -> str | None:
    try:
        return None if text is None else check_method_pattern(text)
    except InvalidValueError as error:
        raise typer.BadParameter(f"{text!r}: expected {error.expected}") from None


@reports_errors
def tap(
    service: Service,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            callback=_checked_method,
            help="Calls of package.Service/Method, or of package.Service/*.",
            show_default=False,
        ),
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            "--status",
            metavar="STATUS",
            callback=lambda texts: _checked_codes(texts or ()),
            help="Calls that ended with this gRPC status, such as UNAVAILABLE; may be repeated.",
            show_default=False,
        ),
    ] = None,
    slow: Annotated[
        float | None,
        typer.Option(
            "--slow",
            parser=span,
            metavar="TIME",
            help="Calls that took at least so long, such as 100ms.",
            show_default=False,
        ),
    ] = None,
    caller: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CALLER",
            callback=lambda text: text if text is None else checked_service(text),
            autocompletion=complete_service,
            help="Calls of this service.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="End after so many calls.", show_default=False)
    ] = None,
    rate: Annotated[
        float, typer.Option("--rate", min=0.1, max=1000.0, help="Calls a second of each process at most.")
    ] = 50.0,
    duration: Annotated[
        float,
        typer.Option("--duration", parser=span, metavar="TIME", show_default="1m", help="How long, at most 1h."),
    ] = 60.0,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show calls to a service as they end, successful ones too, until Ctrl-C. It ends by itself.

    Those of mesh clients, that is: calls of others, such as a proxy at the edge, are in `mesh top` alone. Processes do
    a little more for each call to the service while somebody taps it. With --json each call is one line. Exit code 1
    when nobody knows the service.
    """
    request = traffic_pb2.TapRequest(
        service=service,
        method=method or "",
        codes=[_NUMBERS[name] for name in status or ()],
        caller=caller,
        rate=rate,
    )
    request.duration.FromNanoseconds(round(duration * 1e9))
    if slow is not None:
        request.slower_than.FromNanoseconds(round(slow * 1e9))
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            _follow(client, request, limit, as_json=as_json)
        except KeyboardInterrupt:
            return
        except RefusedError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            write_error(error.details)
            raise Failure from None


def _follow(client: AdminClient, request: traffic_pb2.TapRequest, limit: int | None, *, as_json: bool) -> None:
    shown = 0
    responses = client.stream(client.traffic.Tap, request)
    for call in itertools.islice(_calls(responses, request, told=not as_json), limit):
        shown += 1
        if as_json:
            write_json(to_json(call), compact=True)
        else:
            console().print(line_of(call), soft_wrap=True)
    if not shown:
        write_warning(
            f"no such call of a mesh client to {request.service} ended meanwhile; calls of others, such as a proxy "
            f"at the edge, are not shown, but `mesh top {request.service}` counts them"
        )


def _calls(
    responses: Iterator[traffic_pb2.TapResponse], request: traffic_pb2.TapRequest, *, told: bool
) -> Iterator[traffic_pb2.CallRecord]:
    first = True
    for response in responses:
        if first and not response.processes:
            who = f"no process of {request.caller}" if request.HasField("caller") else "no process"
            write_warning(f"{who} reports to this control plane, so there are no calls to see")
        elif first and told:  # else it would seem to hang where nobody calls
            of = count(response.processes, "process")
            console(stderr=True).print(f"waiting for calls to {request.service} from {of}", soft_wrap=True)
        first = False
        yield from response.calls
        if response.dropped:
            dropped = count(response.dropped, "call")
            write_warning(f"{dropped} not shown, there were too many: ask for fewer, or raise --rate")


def line_of(record: traffic_pb2.CallRecord) -> Text:
    """One call in one line."""
    call = record.call
    at = f"{record.at.ToDatetime():%H:%M:%S}.{record.at.nanos // 1_000_000:03d}"
    who = f"{printable(record.caller) or '-'} -> {printable(call.service)}"
    line = Text.assemble(
        f"{at} {who} {printable(call.method.removeprefix('/'))} ",
        (code_name(call.code), "green" if not call.code else "red"),
        f" {took(seconds(call.took))}",
    )
    if call.endpoint_id:
        line.append(f" at {printable(call.endpoint_id)}")
    if call.attempts != 1:
        tried = count(call.attempts, "attempt") if call.attempts else "without an attempt"
        line.append(f" {tried}", style="yellow")
    if call.details:
        line.append(f": {one_line(call.details)}")
    if call.trace_id:
        line.append(f" trace {call.trace_id}")
    return line
