"""`mesh drain`: takes instances out of what clients call, while they run, and gives them back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Generic, TypeVar

import grpc
import typer
from mesh.v1 import operations_pb2 as pb
from rich.text import Text

from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Service,
    complete_endpoint,
    connect_each,
)
from mesh_cli.output import (
    Failure,
    console,
    count,
    names,
    printable,
    reports_errors,
    to_json,
    write_error,
    write_json,
)
from mesh_client.core.errors import MeshError

ANSWER = 5.0
"""Seconds that a control plane has to answer, beyond those that it waits for clients."""

Answer = TypeVar("Answer")


@reports_errors
def drain(
    service: Service,
    instances: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INSTANCE]...",
            autocompletion=complete_endpoint,
            help="Ids of endpoints, from `mesh endpoints`. Default: all of the service, which takes --force.",
            show_default=False,
        ),
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Have them called again. Default: all that were drained.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Although no healthy endpoint is left, so that calls to the service fail.")
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", min=0.0, max=300.0, metavar="SECONDS", help="How long to wait until clients have acknowledged."
        ),
    ] = 10.0,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Take instances out of what clients call while they run, and wait until every client has acknowledged that.

    Calls in flight finish. The instances stay registered, and are called again after --undo, or once another process
    takes their place. Every control plane that is named does it for its own clients. Exit code 1 if somebody has not
    acknowledged it in time, or a control plane could not be asked: repeat it then.
    """
    with ExitStack() as stack:
        clients = [
            stack.enter_context(client)
            for client in connect_each(control_plane, timeout + ANSWER, operator, insecure=insecure)
        ]
        if undo:
            _undrain(clients, service, instances or (), as_json=as_json)
        else:
            _drain(clients, service, instances or (), timeout, force=force, as_json=as_json)


def _drain(
    clients: Sequence[AdminClient],
    service: str,
    instances: Sequence[str],
    timeout: float,
    *,
    force: bool,
    as_json: bool,
) -> None:
    request = pb.DrainEndpointsRequest(service=service, endpoint_ids=instances, force=force)
    request.timeout.FromNanoseconds(round(timeout * 1e9))
    answers = _everywhere(clients, lambda client: client.call(client.operations.DrainEndpoints, request))
    endpoints = _merged([endpoint for answer in answers.given for endpoint in answer.endpoints])
    if as_json:
        write_json(to_json(pb.DrainEndpointsResponse(endpoints=endpoints)))
    else:
        for endpoint in endpoints:
            console().print(_describe(endpoint), soft_wrap=True)
        if not endpoints:
            console().print(f"{service} has no endpoints.")
    answers.report()
    if not all(endpoint.complete for endpoint in endpoints):
        raise Failure


def _undrain(clients: Sequence[AdminClient], service: str, instances: Sequence[str], *, as_json: bool) -> None:
    request = pb.UndrainEndpointsRequest(service=service, endpoint_ids=instances)
    answers = _everywhere(clients, lambda client: client.call(client.operations.UndrainEndpoints, request))
    back = sorted({name for answer in answers.given for name in answer.endpoint_ids})
    if as_json:
        write_json(to_json(pb.UndrainEndpointsResponse(endpoint_ids=back)))
    else:
        for name in back:
            console().print(f"{printable(name)}: called again")
        if not back:
            console().print("No operator had drained any of them.")
    answers.report()


@dataclass
class _Answers(Generic[Answer]):
    """What control planes answered, and which did not."""

    given: list[Answer] = field(default_factory=list)
    failures: list[MeshError] = field(default_factory=list)

    def report(self) -> None:
        """Says which could not be asked.

        Raises:
            Failure: there were some.
        """
        for error in self.failures:
            write_error(f"not done for the clients of one control plane: {error}")
        if self.failures:
            raise Failure


def _everywhere(clients: Sequence[AdminClient], ask: Callable[[AdminClient], Answer]) -> _Answers[Answer]:
    """Asks all control planes at once.

    Raises:
        MeshError: none of them did it.
    """
    answers = _Answers[Answer]()
    with ThreadPoolExecutor(len(clients)) as threads:
        for asked in [threads.submit(ask, client) for client in clients]:
            try:
                answers.given.append(asked.result())
            except MeshError as error:
                answers.failures.append(error)
    if not answers.given:
        first = answers.failures[0]
        if isinstance(first, RefusedError) and first.code in (
            grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.NOT_FOUND,
        ):
            by_force = first.code is grpc.StatusCode.FAILED_PRECONDITION and "left" in first.details
            write_error(first.details + ("; if that is meant, give --force" if by_force else ""))
            raise Failure
        raise first
    return answers


def _merged(endpoints: Sequence[pb.DrainedEndpoint]) -> list[pb.DrainedEndpoint]:
    """One for each endpoint, of what each control plane says of its own clients."""
    merged: dict[str, pb.DrainedEndpoint] = {}
    for endpoint in endpoints:
        made = merged.setdefault(
            endpoint.endpoint_id, pb.DrainedEndpoint(endpoint_id=endpoint.endpoint_id, complete=True)
        )
        made.complete &= endpoint.complete
        made.acknowledged += endpoint.acknowledged
        made.pending.extend(endpoint.pending)
        made.by_itself |= endpoint.by_itself
    return [merged[name] for name in sorted(merged)]


def _describe(endpoint: pb.DrainedEndpoint) -> Text:
    state = "leaves by itself" if endpoint.by_itself else "drained"
    head = f"{printable(endpoint.endpoint_id)}: {state}; {count(endpoint.acknowledged, 'client')} "
    head += "has acknowledged it" if endpoint.acknowledged == 1 else "have acknowledged it"
    if endpoint.complete:
        return Text(head)
    return Text.assemble(head, (f", and these have not yet: {names(endpoint.pending)}", "yellow"))
