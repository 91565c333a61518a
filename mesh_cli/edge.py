"""`mesh edge`: check, store, show and delete what edges expose, and to whom."""

from __future__ import annotations

import typer

from mesh_cli import policy_actions
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    EdgeName,
    Insecure,
    Operator,
    Timeout,
    connect,
)
from mesh_cli.output import reports_errors, write_json
from mesh_cli.policy_actions import DryRun, Effective, Files, IfVersion
from mesh_cli.policy_kind import EDGE

app = typer.Typer(
    no_args_is_help=True,
    help="Check, store, show and delete policies of edges: which services are exposed, and to whom.",
    epilog="Example: mesh edge apply --dry-run edges/*.yaml",
)


@app.command(epilog="Example: mesh edge validate edges/*.yaml")
@reports_errors
def validate(files: Files, as_json: AsJson = False) -> None:
    """Check policies of edges without a control plane, by the model that it uses too. Exit code 1 if any is bad."""
    policy_actions.validate(EDGE, files, as_json=as_json)


@app.command(epilog="Example: mesh edge apply --dry-run public.yaml")
@reports_errors
def apply(
    files: Files,
    dry_run: DryRun = False,
    if_version: IfVersion = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Store policies of edges. None is stored unless all of them are valid; gateways obey them without a restart."""
    checked = policy_actions.to_apply(EDGE, files, if_version)
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.apply(EDGE, client, checked, if_version, dry_run=dry_run, as_json=as_json)


@app.command(epilog="Example: mesh edge get public > public.yaml")
@reports_errors
def get(
    edge: EdgeName,
    show_effective: Effective = False,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the stored policy of an edge as YAML that `mesh edge apply` takes."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.get(EDGE, client, edge, show_effective=show_effective, as_json=as_json)


@app.command("list", epilog="Example: mesh edge list --json")
@reports_errors
def list_policies(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """List the stored policies of edges, with the settings in which each differs from the defaults."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.list_all(EDGE, client, as_json=as_json)


@app.command(epilog="Example: mesh edge delete public --if-version 42")
@reports_errors
def delete(
    edge: EdgeName,
    if_version: IfVersion = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Delete the stored policy of an edge; it exposes nothing from then on."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.delete(EDGE, client, edge, if_version, as_json=as_json)


@app.command(epilog="Example: mesh edge schema > mesh-edge.schema.json")
@reports_errors
def schema() -> None:
    """Write the JSON Schema of policies of edges, for editors that complete and check YAML.

    A YAML language server uses it when a file's first line is: # yaml-language-server: $schema=mesh-edge.schema.json
    """
    write_json(policy_actions.schema(EDGE))
