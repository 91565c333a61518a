"""`mesh policy`: check, store, show and delete what the mesh obeys for each service."""

from __future__ import annotations

import typer

from mesh_cli import policy_actions, policy_check
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Service,
    Timeout,
    connect,
)
from mesh_cli.output import reports_errors, write_json
from mesh_cli.policy_actions import DryRun, Effective, Files, IfVersion
from mesh_cli.policy_kind import SERVICE

app = typer.Typer(
    no_args_is_help=True,
    help="Check, store, show and delete policies: how a service is called, and what its servers admit.",
    epilog="Example: mesh policy apply --dry-run policies/*.yaml",
)


@app.command(epilog="Example: mesh policy validate policies/*.yaml")
@reports_errors
def validate(files: Files, as_json: AsJson = False) -> None:
    """Check policy files without a control plane, by the model that it uses too. Exit code 1 if any is bad."""
    policy_actions.validate(SERVICE, files, as_json=as_json)


@app.command(epilog="Example: mesh policy apply --dry-run orders.yaml")
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
    """Store policies. None is stored unless all of them are valid; clients obey them without a restart."""
    checked = policy_actions.to_apply(SERVICE, files, if_version)
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.apply(SERVICE, client, checked, if_version, dry_run=dry_run, as_json=as_json)


@app.command(epilog="Example: mesh policy get orders > orders.yaml")
@reports_errors
def get(
    service: Service,
    show_effective: Effective = False,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the stored policy of a service as YAML that `mesh policy apply` takes."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.get(SERVICE, client, service, show_effective=show_effective, as_json=as_json)


@app.command("list", epilog="Example: mesh policy list --json")
@reports_errors
def list_policies(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """List the stored policies, with the settings in which each differs from the defaults."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.list_all(SERVICE, client, as_json=as_json)


@app.command(epilog="Example: mesh policy delete orders --if-version 42")
@reports_errors
def delete(
    service: Service,
    if_version: IfVersion = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Delete the stored policy of a service; the defaults apply to it from then on."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        policy_actions.delete(SERVICE, client, service, if_version, as_json=as_json)


app.command("check", epilog="Example: mesh policy check orders shop.v1.PaymentService/Charge")(policy_check.check)


@app.command(epilog="Example: mesh policy schema > mesh-policy.schema.json")
@reports_errors
def schema() -> None:
    """Write the JSON Schema of policies, for editors that complete and check YAML.

    A YAML language server uses it when a file's first line is: # yaml-language-server: $schema=mesh-policy.schema.json
    """
    write_json(policy_actions.schema(SERVICE))
