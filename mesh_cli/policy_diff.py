"""`mesh diff`: policies against those in force, and what they would have refused of the last calls and events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.message import Message
from mesh.v1 import traffic_pb2
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.documents import Checked, check, read_documents
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Timeout,
    connect,
    span,
)
from mesh_cli.output import Json, add_row, console, count, printable, table, to_json, write_error, write_json
from mesh_cli.policy_check import exits
from mesh_cli.policy_form import coloured, difference, effective
from mesh_cli.traffic_form import within
from mesh_client.core.errors import ConfigError
from mesh_client.core.policy import ServicePolicy

EXIT_DIFFERENT = 1
"""As for diff(1); 2 is trouble."""

_INDENT = (0, 0, 0, 2)
_Reason = tuple[str, str, str]
"""Field of the answer, what it is in words, and how well it is known."""
_CALLS: Sequence[_Reason] = (
    ("unauthorized", "for who calls", "exactly"),
    ("rate_limited", "by rate limits", "at least"),
    ("shed", "for calls in flight", "about"),
)
_EVENTS: Sequence[_Reason] = (
    ("paused", "by a pause", "exactly"),
    ("unauthorized", "for who publishes", "exactly"),
    ("timed_out", "in the time allowed", "at least"),
)


@exits
def diff(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="YAML or JSON files, each with one or several policies of services; - is standard input.",
            show_default=False,
        ),
    ],
    window: Annotated[
        float,
        typer.Option(
            "--window", parser=span, metavar="TIME", show_default="10m", help="How far back calls count, at most 10m."
        ),
    ] = 600.0,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> int:
    """Show how policies differ from those in force, and which of the last minutes' calls they would have refused.

    Nothing is stored. Who may not call is known exactly; what rate limits refuse at least, and what a limit on calls in
    flight refuses about. Events that the service's groups would not have handled are shown likewise. Exit code 0: they
    are in force as they are, 1: one differs, 2: it cannot be told.
    """
    checked = check(read_documents(files, ServicePolicy), ServicePolicy)
    bad = [item for item in checked if item.errors or item.policy is None]
    for item in bad:
        for error in item.errors:
            write_error(f"{item.document.place}: {error}")
    if bad:
        raise ConfigError("nothing was compared")
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        answers = [(item, _try(client, item, window)) for item in checked]
    if as_json:
        write_json({"policies": [_json(item, answer) for item, answer in answers]})
    else:
        out = console()
        for number, (item, answer) in enumerate(answers):
            if number:
                out.print()
            for part in render_difference(item.name, item.document.file, _lines(item, answer), answer):
                out.print(part, soft_wrap=isinstance(part, Text))
    return EXIT_DIFFERENT if any(_lines(item, answer) for item, answer in answers) else 0


def _try(client: AdminClient, item: Checked[ServicePolicy], window: float) -> traffic_pb2.TryPolicyResponse:
    request = traffic_pb2.TryPolicyRequest(document=item.document.text)
    request.window.FromNanoseconds(round(window * 1e9))
    try:
        return client.call(client.traffic.TryPolicy, request)
    except RefusedError as error:
        raise ConfigError(f"{item.document.place}: {error.details}") from None


def _lines(item: Checked[ServicePolicy], answer: traffic_pb2.TryPolicyResponse) -> list[str]:
    proposed: dict[str, Json] = {} if item.policy is None else item.policy.dump()
    name = f"{item.name} ({item.document.file})"
    return list(difference(effective(answer.current_policy), proposed, f"{item.name} (in force)", name))


def _json(item: Checked[ServicePolicy], answer: traffic_pb2.TryPolicyResponse) -> dict[str, Json]:
    lines = _lines(item, answer)
    tried = to_json(answer)
    del tried["current_policy"]
    return {
        "file": item.document.file,
        "document": item.document.number,
        "service": item.name,
        "different": bool(lines),
        "difference": "".join(f"{line}\n" for line in lines),
        **tried,
    }


def render_difference(
    service: str, file: str, lines: Sequence[str], answer: traffic_pb2.TryPolicyResponse
) -> Iterator[RenderableType]:
    """The difference, and what it would have meant for the calls that are recorded."""
    if lines:
        yield from map(coloured, lines)
    else:
        yield Text(f"{printable(service)}: the policy in {printable(file)} is in force as it is")
    yield Text()
    if not answer.calls and not answer.handled:
        yield Text(f"{service}: no instance has reported a call within the last {within(answer.window)}.")
    if answer.calls:
        received = f"{count(answer.calls, 'call')} that {count(answer.instances, 'instance')} received"
        yield from _tried(service, received, answer, _CALLS, "REFUSED", answer.current, answer.proposed)
        if answer.proposed.details:
            yield Text()
            yield Padding(_refused_calls(answer.proposed.details), _INDENT)
    if answer.calls and answer.handled:
        yield Text()
    if answer.handled:
        handled = f"{count(answer.handled, 'event')} that its groups handled"
        yield from _tried(
            service, handled, answer, _EVENTS, "NOT HANDLED", answer.current_events, answer.proposed_events
        )
        if answer.proposed_events.details:
            yield Text()
            yield Padding(_kept_events(answer.proposed_events.details), _INDENT)


def _tried(
    service: str,
    what: str,
    answer: traffic_pb2.TryPolicyResponse,
    reasons: Sequence[_Reason],
    title: str,
    current: Message,
    proposed: Message,
) -> Iterator[RenderableType]:
    yield Text(f"{service}, of {what} within the last {within(answer.window)}:", style="bold")
    shown = table(title, "IN FORCE", "PROPOSED", "", right=["IN FORCE", "PROPOSED"])
    for name, words, how in reasons:
        now, then = getattr(current, name), getattr(proposed, name)
        style = "red" if then > now else "green" if then < now else ""
        add_row(shown, words, str(now or "-"), Text(str(then or "-"), style=style), how if now or then else "")
    yield Padding(shown, _INDENT)


def _refused_calls(rows: Sequence[traffic_pb2.RefusedCalls]) -> RenderableType:
    figures = ("CALLS", "WHO CALLS", "RATE", "IN FLIGHT")
    shown = table("CALLER", "METHOD", *figures, right=figures)
    for row in rows:
        counts = (str(each or "-") for each in (row.calls, row.unauthorized, row.rate_limited, row.shed))
        add_row(shown, row.caller or "nobody of the mesh", row.method.removeprefix("/"), *counts)
    return shown


def _kept_events(rows: Sequence[traffic_pb2.KeptEvents]) -> RenderableType:
    figures = ("HANDLED", "PAUSED", "WHO PUBLISHES", "TIME")
    shown = table("PUBLISHER", "TYPE", "GROUP", *figures, right=figures)
    for row in rows:
        counts = (str(each or "-") for each in (row.handled, row.paused, row.unauthorized, row.timed_out))
        add_row(shown, row.publisher, row.type, row.group, *counts)
    return shown
