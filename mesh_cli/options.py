"""Options that several commands share, checked where they are read."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from mesh.v1 import admin_pb2, operations_pb2

from mesh_cli.client import AdminClient
from mesh_cli.credentials import (
    INSECURE_VARIABLE,
    OPERATOR_VARIABLE,
    OperatorCredentials,
    default_operator_directory,
)
from mesh_cli.output import age, write_warning
from mesh_client.addresses import CONTROL_PLANE_VARIABLE, parse_control_planes
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.model import check_service_name

DEFAULT_CONTROL_PLANE = "127.0.0.1:7070"

Answer = TypeVar("Answer")

_EXPIRES_SOON = 0.9
"""Share of the life of an operator's certificate after which every command says that it ends."""

_COMPLETION_TIMEOUT = 1.0
"""Seconds for which somebody who presses the tabulator key waits at most."""


_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|[smhd])")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}


def span(text: str | float) -> float:
    """Seconds from ``200ms``, ``90s``, ``1.5h`` or ``30d``; a default is a number already.

    Raises:
        typer.BadParameter: it is something else.
    """
    if isinstance(text, float):
        return text
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r}: expected a time such as 90s, 10m, 24h or 30d")
    return float(match[1]) * _SECONDS[match[2]]


def _checked_addresses(text: str) -> str:
    try:
        addresses = parse_control_planes(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from None
    if not addresses:
        raise typer.BadParameter("names no control plane; expected host:port, several separated by commas")
    return ",".join(addresses)


def checked_service(text: str) -> str:
    """The name, if it can be a service's; for callbacks of options."""
    try:
        return check_service_name(text)
    except InvalidValueError as error:
        raise typer.BadParameter(f"{text!r}: expected {error.expected}") from None


def complete_service(context: typer.Context, incomplete: str) -> list[str]:
    """Names of known services for the shell's completion; none when the control plane does not answer at once."""
    return [item.service for item in _status(context).services if item.service.startswith(incomplete)]


def complete_edge(context: typer.Context, incomplete: str) -> list[str]:
    """The same for edges."""
    return [item.edge for item in _status(context).edges if item.edge.startswith(incomplete)]


def complete_process(context: typer.Context, incomplete: str) -> list[str]:
    """The same for the processes of the service that was named."""
    request = operations_pb2.ListProcessesRequest(service=context.params.get("service") or "")
    answer = _ask(
        context,
        lambda client: client.call(client.operations.ListProcesses, request),
        operations_pb2.ListProcessesResponse(),
    )
    names = [name for process in answer.processes for name in process.instances[:1]]
    return [name for name in names if name.startswith(incomplete)]


def complete_endpoint(context: typer.Context, incomplete: str) -> list[str]:
    """The same for the endpoints of the service that was named."""
    request = admin_pb2.ListEndpointsRequest(service=context.params.get("service") or "")
    answer = _ask(
        context, lambda client: client.call(client.stub.ListEndpoints, request), admin_pb2.ListEndpointsResponse()
    )
    return [item.endpoint.id for item in answer.endpoints if item.endpoint.id.startswith(incomplete)]


def _status(context: typer.Context) -> admin_pb2.GetStatusResponse:
    return _ask(
        context,
        lambda client: client.call(client.stub.GetStatus, admin_pb2.GetStatusRequest()),
        admin_pb2.GetStatusResponse(),
    )


def _ask(context: typer.Context, question: Callable[[AdminClient], Answer], nothing: Answer) -> Answer:
    """What the control plane answers at once; ``nothing`` otherwise, for whatever reason.

    Whoever presses the tabulator key must not get a traceback, nor a message in the middle of the line.
    """
    addresses = context.params.get("control_plane") or os.environ.get(CONTROL_PLANE_VARIABLE) or DEFAULT_CONTROL_PLANE
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            insecure = bool(context.params.get("insecure"))
            shown = credentials(context.params.get("operator"), insecure=insecure)
            # The first answers, or nobody in time: each that does not would take all of it.
            with AdminClient(addresses.split(",")[:1], _COMPLETION_TIMEOUT, shown) as client:
                return question(client)
    except Exception:
        return nothing


def insecure_by_variable(context: typer.Context) -> bool:
    """Whether plaintext is asked for by the environment alone, and not on the command line."""
    source = context.get_parameter_source("insecure")
    return bool(context.params.get("insecure")) and source is not None and source.name == "ENVIRONMENT"


def contradicts_variable(what: str) -> typer.BadParameter:
    """The error where the environment asks for plaintext, and something else says that there are identities."""
    return typer.BadParameter(
        f"{INSECURE_VARIABLE} asks for plaintext, but {what}; unset {INSECURE_VARIABLE}, or give --insecure if "
        "plaintext is meant"
    )


def _check_insecure(context: typer.Context, value: bool) -> bool:
    """An operator who names credentials does not speak plaintext because of a variable."""
    # What is on the command line was read before what is in the environment.
    source = context.get_parameter_source("insecure")
    if value and not context.resilient_parsing and source is not None and source.name == "ENVIRONMENT":
        named = context.params.get("operator") or os.environ.get(OPERATOR_VARIABLE)
        if named and any(each.name == "operator" for each in context.command.params):
            raise contradicts_variable(f"--operator or {OPERATOR_VARIABLE} names credentials")
    return value


Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        envvar=INSECURE_VARIABLE,
        callback=_check_insecure,
        help="Plaintext, and nobody proves who they are. Never by itself: only when asked for.",
    ),
]
ControlPlane = Annotated[
    str,
    typer.Option(
        "--control-plane",
        envvar=CONTROL_PLANE_VARIABLE,
        metavar="HOST:PORT",
        callback=_checked_addresses,
        help="Control plane to ask; of several, separated by commas, the first that can be reached.",
    ),
]
Timeout = Annotated[
    float,
    typer.Option("--timeout", min=0.05, max=600.0, metavar="SECONDS", help="How long to wait for each answer."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON: protobuf field names, durations in seconds.")]
Service = Annotated[
    str,
    typer.Argument(
        metavar="SERVICE",
        callback=checked_service,
        autocompletion=complete_service,
        help="Name of the service.",
        show_default=False,
    ),
]
EdgeName = Annotated[
    str,
    typer.Argument(
        metavar="EDGE",
        callback=checked_service,
        autocompletion=complete_edge,
        help="Name of the edge.",
        show_default=False,
    ),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Show it again and again until Ctrl-C.")]
Interval = Annotated[
    float,
    typer.Option("--interval", min=0.05, max=3600.0, metavar="SECONDS", help="How often, with --watch."),
]


Operator = Annotated[
    Path | None,
    typer.Option(
        "--operator",
        envvar=OPERATOR_VARIABLE,
        metavar="DIRECTORY",
        file_okay=False,
        help="Your credentials, from `mesh operator create`. Default: grpc-mesh/operator in XDG_CONFIG_HOME.",
        show_default=False,
    ),
]


def connect(control_plane: str, timeout: float, operator: Path | None, *, insecure: bool) -> AdminClient:
    """The client that the options ask for, of the first control plane that can be reached; it connects when first used.

    Raises:
        ConfigError: there are no operator's credentials, or they are of no use.
    """
    return AdminClient(control_plane.split(","), timeout, credentials(operator, insecure=insecure))


def connect_each(control_plane: str, timeout: float, operator: Path | None, *, insecure: bool) -> list[AdminClient]:
    """A client of each control plane, for what each of them knows only a part of.

    Raises:
        ConfigError: there are no operator's credentials, or they are of no use.
    """
    shown = credentials(operator, insecure=insecure)
    return [AdminClient([address], timeout, shown) for address in control_plane.split(",")]


def credentials(operator: Path | None, *, insecure: bool) -> OperatorCredentials | None:
    """The operator's credentials; None for plaintext. Warns if they end soon.

    Raises:
        ConfigError: there are none, or they are of no use.
    """
    if insecure:
        return None
    loaded = OperatorCredentials.load(operator or default_operator_directory())
    validity = loaded.credential.validity
    if validity.age(now := time.time()) > _EXPIRES_SOON:
        write_warning(
            f"your operator's certificate ends in {age(validity.not_after - now)}; make a new one with "
            f"`mesh operator create {loaded.credential.principal.name}` where the control plane runs"
        )
    return loaded
