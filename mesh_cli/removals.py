"""`mesh removals`: what the mass removal guard holds back."""

from __future__ import annotations

import typer
from mesh.v1 import admin_pb2

from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Timeout,
    connect,
)
from mesh_cli.output import console, count, reports_errors, to_json, write_json

app = typer.Typer(
    no_args_is_help=True,
    help="Decide about removals that the mass removal guard holds back; `mesh status` shows them.",
    epilog="Example: mesh removals confirm",
)


@app.callback()
def removals() -> None:
    """Keeps `confirm` a command of its own: typer would otherwise fold a single one into the group."""


@app.command(epilog="Example: mesh removals confirm --json")
@reports_errors
def confirm(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Publish the removals that are held now: those endpoints are really gone."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        answer = client.call(client.stub.ConfirmRemovals, admin_pb2.ConfirmRemovalsRequest())
    if as_json:
        write_json(to_json(answer))
    elif answer.endpoints:
        console().print(f"{count(answer.endpoints, 'endpoint')} removed.")
    else:
        console().print("Nothing was held.")
