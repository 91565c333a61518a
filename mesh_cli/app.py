"""The `mesh` command's tree of commands."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated

import typer

from mesh_cli import ca, control_plane, edge, events, gateway, logs, operator, policy, removals, token
from mesh_cli.check.command import check
from mesh_cli.dashboard import dashboard
from mesh_cli.drain import drain
from mesh_cli.endpoints import endpoints
from mesh_cli.explain import explain
from mesh_cli.output import reports_errors
from mesh_cli.policy_diff import diff
from mesh_cli.status import status
from mesh_cli.tap import tap
from mesh_cli.top import top
from mesh_cli.trace import trace

app = typer.Typer(
    name="mesh",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: mesh demo",
)


Consul = Annotated[bool, typer.Option("--consul", help="On a real Consul in place of the embedded registry.")]


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"grpc-mesh {importlib.metadata.version('grpc-mesh')}\n")
        raise typer.Exit


@app.callback()
def mesh(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Write the version and exit.")
    ] = False,
) -> None:
    """grpc-mesh: a proxyless service mesh for Python gRPC services. Runs its control plane and shows what it does."""


app.command(
    "control-plane", epilog="Example: mesh control-plane --listen 0.0.0.0:7070 --registry consul://127.0.0.1:8500"
)(control_plane.control_plane)
app.command(epilog="Example: mesh status --watch")(status)
app.command(epilog="Example: mesh endpoints orders --json")(endpoints)
app.command(epilog="Example: mesh top orders --window 30s")(top)
app.command(epilog="Example: mesh tap orders --status UNAVAILABLE --slow 100ms --limit 20")(tap)
app.command(epilog="Example: mesh explain orders")(explain)
app.command(epilog="Example: mesh diff orders.yaml")(diff)
app.command(epilog="Example: mesh trace --errors --slow 200ms")(trace)
app.command(epilog="Example: mesh dashboard")(dashboard)
app.command(epilog="Example: mesh check --control-plane 10.0.0.2:7070,10.0.0.3:7070")(check)
app.command(epilog="Example: mesh drain orders orders-1")(drain)
app.add_typer(policy.app, name="policy")
app.add_typer(edge.app, name="edge")
app.add_typer(removals.app, name="removals")
app.add_typer(logs.app, name="logs")
app.add_typer(token.app, name="token")
app.add_typer(operator.app, name="operator")
app.add_typer(ca.app, name="ca")
app.add_typer(gateway.app, name="gateway")
app.add_typer(events.app, name="events")


@app.command(epilog="Example: mesh demo --json promises.json")
@reports_errors
def demo(
    consul: Consul = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write each promise with its figure as JSON."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The same promises with less of everything, for tests.")
    ] = False,
) -> None:
    """Run a whole mesh with an example application, break it on purpose, and show what its callers notice: nothing.

    Takes less than two minutes. Exit code 1 when a promise is broken.
    """
    from mesh_cli.demo import command

    raise typer.Exit(command(consul=consul, json_file=json_file, quick=quick))


@app.command(epilog="Example: mesh up --consul")
@reports_errors
def up(
    consul: Consul = False,
) -> None:
    """Keep the demo's system running until Ctrl-C, to look around in."""
    from mesh_cli.up import up as run

    raise typer.Exit(run(consul=consul))
