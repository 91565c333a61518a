"""`mesh logs`: what running processes log, and how much."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, Literal, cast

import typer
from mesh.v1 import operations_pb2 as pb
from rich.text import Text
from typer.core import TyperGroup

from mesh_cli.client import AdminClient, RefusedError, UnreachableError
from mesh_cli.log_reading import Following, entry_from_proto, read
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Service,
    Timeout,
    complete_process,
    connect_each,
    span,
)
from mesh_cli.output import (
    Failure,
    Json,
    add_row,
    age,
    console,
    printable,
    reports_errors,
    table,
    to_json,
    write_error,
    write_json,
    write_warning,
)
from mesh_client.core.errors import InvalidValueError, MeshError
from mesh_client.core.log_entry import level_name, pairs, timestamp, to_object, visible
from mesh_client.core.log_levels import DEFAULT_DURATION, check_logger

SHOW = "show"
_COLOURS = {"debug": "dim", "info": "green", "warning": "yellow", "error": "red", "critical": "bold red"}

LevelName = Literal["debug", "info", "warning", "error", "critical"]
NewLevel = Literal["debug", "info", "warning", "error", "critical", "default"]


class _Logs(TyperGroup):
    """``mesh logs SERVICE`` is ``mesh logs show SERVICE``, unless the first word is one of its commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts the word in."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [SHOW, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """The commands, and what may stand behind ``show``."""
        found = list(super().shell_complete(ctx, incomplete))
        shown = self.commands[SHOW]
        with shown.make_context(SHOW, [], parent=ctx, resilient_parsing=True) as context:
            if not incomplete.startswith("-"):
                found += shown.params[0].shell_complete(context, incomplete)
            else:
                found += shown.shell_complete(context, incomplete)
        return found


app = typer.Typer(
    cls=_Logs,
    no_args_is_help=True,
    help="Read the logs of running processes, and change for a while how much they log.",
    epilog="Example: mesh logs orders --follow --level warning",
)


def _checked_logger(text: str) -> str:
    try:
        return check_logger(text)
    except InvalidValueError as error:
        raise typer.BadParameter(f"{text!r}: expected {error.expected}") from None


Instance = Annotated[
    str,
    typer.Option(
        "--instance",
        metavar="NAME",
        autocompletion=complete_process,
        help="Only the process with this name, from `mesh logs list`. Default: all of the service.",
        show_default=False,
    ),
]
Logger = Annotated[
    str,
    typer.Option(
        "--logger",
        metavar="NAME",
        callback=_checked_logger,
        help="Only this logger and those below it. Default: all.",
        show_default=False,
    ),
]


@app.command(SHOW, epilog="Example: mesh logs show orders --lines 200 --json")
@reports_errors
def show(
    service: Service,
    instance: Instance = "",
    level: Annotated[
        LevelName | None,
        typer.Option("--level", case_sensitive=False, help="Only this level and higher ones.", show_default=False),
    ] = None,
    logger: Logger = "",
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, max=1_000, help="So many of the last records, of all processes.")
    ] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is logged from now on, until Ctrl-C.")
    ] = False,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the last records of the logs of a service's processes; `control-plane` is the control plane itself.

    Each process keeps its last 1000 records. With --json they are JSON lines, as the processes write them.
    """
    request = pb.TailLogsRequest(
        service=service, instance=instance, level=_level(level), logger=logger, last=lines, follow=follow
    )
    emit = _write_json if as_json else _write_text
    with ExitStack() as stack:
        clients = _enter(stack, control_plane, timeout, operator, insecure=insecure)
        if follow:
            with contextlib.suppress(KeyboardInterrupt):
                _note_absence(clients, service, instance)
                Following(clients, request).run(emit, write_warning)
            return
        past = read(clients, request)
        for note in past.notes:
            write_warning(note)
        if not past.processes:
            write_error(_nobody(clients, service, instance))
            raise Failure
    for record in past.records:
        emit(record)


@app.command("level", epilog="Example: mesh logs level orders debug --logger shop --for 10m")
@reports_errors
def change_level(
    service: Service,
    level: Annotated[
        NewLevel,
        typer.Argument(
            metavar="LEVEL",
            case_sensitive=False,
            help="debug, info, warning, error or critical; default: as configured, at once.",
            show_default=False,
        ),
    ],
    instance: Instance = "",
    logger: Annotated[
        str,
        typer.Option(
            "--logger",
            metavar="NAME",
            callback=_checked_logger,
            help="Of this logger. Default: the root of all.",
            show_default=False,
        ),
    ] = "",
    duration: Annotated[
        float,
        typer.Option(
            "--for",
            parser=span,
            metavar="TIME",
            show_default="10m",
            help="When the level falls back by itself, at most 24h.",
        ),
    ] = DEFAULT_DURATION,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Change how much running processes log, for a while. Exit code 1 if one of them did not."""
    request = pb.SetLogLevelRequest(
        service=service, instance=instance, logger=logger, level=_level(None if level == "default" else level)
    )
    request.duration.FromNanoseconds(round(duration * 1e9))
    with ExitStack() as stack:
        clients = _enter(stack, control_plane, timeout, operator, insecure=insecure)
        answers = _ask_each(clients, lambda client: client.call(client.operations.SetLogLevel, request))
        outcomes = [outcome for answer in answers for outcome in answer.outcomes]
        if not outcomes:
            write_error(_nobody(clients, service, instance))
            raise Failure
    if as_json:
        write_json(to_json(pb.SetLogLevelResponse(outcomes=outcomes)))
    else:
        done = "as configured" if level == "default" else f"{level} for {age(duration)}"
        shown = table("PROCESS", "LOGGER", "LEVEL")
        for outcome in outcomes:
            state = Text(printable(outcome.error), style="red") if outcome.error else Text(done, style="green")
            add_row(shown, _name(outcome.process), logger or "(root)", state)
        console().print(shown)
    if any(outcome.error for outcome in outcomes):
        raise Failure


@app.command("list", epilog="Example: mesh logs list --json")
@reports_errors
def list_processes(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """List the processes whose logs can be read."""
    with ExitStack() as stack:
        clients = _enter(stack, control_plane, timeout, operator, insecure=insecure)
        processes = _processes(clients)
    if as_json:
        write_json(to_json(pb.ListProcessesResponse(processes=processes)))
        return
    shown = table("SERVICE", "PROCESS", "VERSION", "RUNTIME", "GRPC", "HOST", "PID", right=["PID"])
    for process in processes:
        where = (process.version, process.runtime, process.grpc_version, process.host, str(process.pid))
        add_row(shown, process.service or "-", _name(process), *(text or "-" for text in where))
    console().print(shown)


def _enter(stack: ExitStack, control_plane: str, timeout: float, operator: Any, *, insecure: bool) -> list[AdminClient]:
    clients = connect_each(control_plane, timeout, operator, insecure=insecure)
    return [stack.enter_context(client) for client in clients]


def _ask_each(clients: Sequence[AdminClient], question: Callable[[AdminClient], Any]) -> list[Any]:
    """What each control plane answers. One that cannot be reached is warned of, if another one can."""
    answers, failures = [], list[MeshError]()
    for client in clients:
        try:
            answers.append(question(client))
        except UnreachableError as error:
            failures.append(error)
    if not answers:
        raise failures[0]
    for failure in failures:
        write_warning(f"processes that are connected there are left out: {failure}")
    return answers


def _processes(clients: Sequence[AdminClient]) -> list[pb.Process]:
    answers = _ask_each(clients, lambda client: client.call(client.operations.ListProcesses, pb.ListProcessesRequest()))
    found = [process for answer in answers for process in answer.processes]
    return sorted(found, key=lambda process: (process.service, list(process.instances), process.id))


def _nobody(clients: Sequence[AdminClient], service: str, instance: str) -> str:
    """Why there is nobody to ask."""
    processes = _processes(clients)
    of_service = [_name(process) for process in processes if process.service == service]
    if of_service:
        return f"{service} has no process called {instance}; there are {', '.join(map(printable, of_service))}"
    others = sorted({process.service for process in processes if process.service})
    return (
        f"no process of {service} can be asked for its log: it has to call mesh_client.configure_logs, be connected "
        "to a control plane that was asked here, and run without MESH_OPERATIONS=0. There are processes of "
        f"{', '.join(map(printable, others)) or 'no service'}"
    )


def _note_absence(clients: Sequence[AdminClient], service: str, instance: str) -> None:
    with contextlib.suppress(UnreachableError, RefusedError):
        if not any(
            process.service == service and (not instance or instance in (process.id, *process.instances))
            for process in _processes(clients)
        ):
            write_warning(f"waiting: {_nobody(clients, service, instance)}")


def _name(process: pb.Process) -> str:
    return process.instances[0] if process.instances else process.id


def _level(name: str | None) -> pb.LogLevel.ValueType:
    return pb.LogLevel.Value(f"LOG_LEVEL_{(name or 'unspecified').upper()}")


def _write_json(record: pb.LogRecord) -> None:
    write_json(cast("Json", to_object(entry_from_proto(record), record.service, record.instance)), compact=True)


def _write_text(record: pb.LogRecord) -> None:
    entry = entry_from_proto(record)
    level = level_name(entry.level)
    ids = {name: text for name, text in (("trace_id", entry.trace_id), ("span_id", entry.span_id)) if text}
    rest = visible(
        f" {record.instance} {entry.logger}: {entry.message}{pairs({**entry.fields, **ids})}", entry.exception
    )
    console().print(Text.assemble(f"{timestamp(entry.time)} ", (f"{level:<8}", _COLOURS[level]), rest), soft_wrap=True)
