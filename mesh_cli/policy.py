"""`mesh policy`: check, store, show and delete what the mesh obeys for each service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import grpc
import typer
from mesh.v1 import admin_pb2, policy_pb2

from mesh_cli import policy_check
from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.documents import Checked, check, read_documents
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
from mesh_cli.output import (
    Failure,
    Json,
    add_row,
    console,
    count,
    names,
    printable,
    reports_errors,
    table,
    to_json,
    write_error,
    write_json,
)
from mesh_cli.policy_form import coloured, difference, effective, settings, stated_yaml, to_yaml
from mesh_client.core.errors import FieldError
from mesh_client.core.policy import ServicePolicy

app = typer.Typer(
    no_args_is_help=True,
    help="Check, store, show and delete policies: how a service is called, and what its servers admit.",
    epilog="Example: mesh policy apply --dry-run policies/*.yaml",
)

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="YAML or JSON files, each with one or several documents; - is standard input.",
        show_default=False,
    ),
]
IfVersion = Annotated[
    str | None,
    typer.Option(
        "--if-version",
        metavar="VERSION",
        help="Only if this is the version stored now, as `mesh policy get` shows it; an empty one: only if none is.",
        show_default=False,
    ),
]


@app.command(epilog="Example: mesh policy validate policies/*.yaml")
@reports_errors
def validate(files: Files, as_json: AsJson = False) -> None:
    """Check policy files without a control plane, by the model that it uses too. Exit code 1 if any is bad."""
    checked = check(read_documents(files))
    valid = not any(item.errors for item in checked)
    if as_json:
        write_json({"valid": valid, "documents": [_checked_json(item) for item in checked]})
    else:
        _write_errors(checked)
        for item in checked:
            if not item.errors:
                console().print(f"{printable(item.document.place)}: policy of {item.service} is valid", soft_wrap=True)
    if not valid:
        raise Failure


@app.command(epilog="Example: mesh policy apply --dry-run orders.yaml")
@reports_errors
def apply(
    files: Files,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; show how the effective policies would change.")
    ] = False,
    if_version: IfVersion = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Store policies. None is stored unless all of them are valid; clients obey them without a restart."""
    checked = check(read_documents(files))
    if if_version is not None and len(checked) > 1:
        raise typer.BadParameter(f"needs exactly one policy, and there are {len(checked)}", param_hint="'--if-version'")
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        if not any(item.errors for item in checked):
            _check_on_server(client, checked)
        if any(item.errors for item in checked):
            if as_json:
                write_json({"policies": [_checked_json(item) for item in checked]})
            else:
                _write_errors(checked)
                write_error("nothing was stored")
            raise Failure
        results = [_apply_one(client, item, if_version, dry_run=dry_run, quiet=as_json) for item in checked]
    if as_json:
        write_json({"policies": [result for result, _ in results]})
    if not all(stored for _, stored in results):
        raise Failure


@app.command(epilog="Example: mesh policy get orders > orders.yaml")
@reports_errors
def get(
    service: Service,
    show_effective: Annotated[
        bool, typer.Option("--effective", help="With every default filled in, as clients obey it.")
    ] = False,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the stored policy of a service as YAML that `mesh policy apply` takes."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            stored = client.call(client.stub.GetPolicy, admin_pb2.GetPolicyRequest(service=service)).policy
        except RefusedError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            if not show_effective:
                write_error(f"{service} has no policy of its own, so the defaults apply; see them with --effective")
                raise Failure from None
            stored = admin_pb2.StoredPolicy(service=service, policy=policy_pb2.ServicePolicy(service=service))
    if as_json:
        document = to_json(stored)
        if show_effective and stored.HasField("policy"):
            document["policy"] = effective(stored.policy)
        write_json(document)
    elif stored.HasField("policy"):
        comment = f"# stored version {printable(stored.stored_version)}" if stored.stored_version else "# the defaults"
        text = to_yaml(effective(stored.policy)) if show_effective else stated_yaml(stored.policy)
        console().print(f"{comment}\n{text}", end="", soft_wrap=True)
    if stored.errors:
        if not as_json:
            _write_field_errors(f"{service}, stored version {stored.stored_version}", stored.errors)
        raise Failure


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
        answer = client.call(client.stub.ListPolicies, admin_pb2.ListPoliciesRequest())
    if as_json:
        write_json(to_json(answer))
        return
    if not answer.policies:
        console().print("No policies are stored; every service gets the defaults.")
        return
    shown = table("SERVICE", "VERSION", "STATE", "SETTINGS")
    for stored in answer.policies:
        invalid = bool(stored.errors)
        add_row(
            shown,
            stored.service,
            stored.stored_version,
            f"invalid: {count(len(stored.errors), 'bad field')}" if invalid else "valid",
            "-" if invalid else names(settings(stored.policy)),
        )
    console().print(shown)


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
    request = admin_pb2.DeletePolicyRequest(service=service, if_version=if_version)
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            client.call(client.stub.DeletePolicy, request)
        except RefusedError as error:
            write_error(f"{service}: not deleted: {_why(error, service)}")
            raise Failure from None
    if as_json:
        write_json({"service": service, "deleted": True})
    else:
        console().print(f"{service}: deleted; the defaults apply")


app.command("check", epilog="Example: mesh policy check orders shop.v1.PaymentService/Charge")(policy_check.check)


@app.command(epilog="Example: mesh policy schema > mesh-policy.schema.json")
@reports_errors
def schema() -> None:
    """Write the JSON Schema of policies, for editors that complete and check YAML.

    A YAML language server uses it when a file's first line is: # yaml-language-server: $schema=mesh-policy.schema.json
    """
    write_json(policy_schema())


def policy_schema() -> dict[str, Json]:
    """JSON Schema, draft 2020-12, of one policy document."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **ServicePolicy.model_json_schema()}


def _check_on_server(client: AdminClient, checked: Sequence[Checked]) -> None:
    """Asks the control plane as well, which may be of another version, so that either all are stored or none."""
    for item in checked:
        request = admin_pb2.ValidatePolicyRequest(document=item.document.text)
        answer = client.call(client.stub.ValidatePolicy, request)
        item.errors += [FieldError(error.path, error.message) for error in answer.errors]


def _apply_one(
    client: AdminClient, item: Checked, if_version: str | None, *, dry_run: bool, quiet: bool
) -> tuple[Json, bool]:
    """Stores one policy, or finds out what that would change; its JSON form, and whether that went well."""
    request = admin_pb2.ApplyPolicyRequest(document=item.document.text, if_version=if_version, dry_run=dry_run)
    try:
        answer = client.call(client.stub.ApplyPolicy, request)
    except RefusedError as error:
        why = _why(error, item.service)
        write_error(f"{item.document.place}: {item.service}: not stored: {why}")
        return _checked_json(item) | {"error": {"code": error.code.name, "message": error.details}}, False
    before, after = answer.before, answer.after
    lines: list[str] = []
    if dry_run:
        lines = _difference(before, after, item)
    if not quiet:
        _write_applied(item.service, answer, lines, dry_run=dry_run)
    made = _checked_json(item) | {
        "changed": answer.changed,
        "dry_run": dry_run,
        "previous_version": before.stored_version or None,
        "stored_version": after.stored_version or None,
    }
    return made | {"difference": "".join(f"{line}\n" for line in lines)} if dry_run else made, True


def _difference(before: admin_pb2.StoredPolicy, after: admin_pb2.StoredPolicy, item: Checked) -> list[str]:
    if before.HasField("policy"):
        name, policy = f"{item.service} (stored version {before.stored_version})", effective(before.policy)
    else:
        bad = f"stored version {before.stored_version}, which is invalid and not obeyed; " if before.errors else ""
        name = f"{item.service} ({bad}defaults)"
        policy = effective(policy_pb2.ServicePolicy(service=item.service))
    document = item.document
    return list(difference(policy, effective(after.policy), name, f"{item.service} ({document.file})"))


def _write_applied(service: str, answer: admin_pb2.ApplyPolicyResponse, lines: Sequence[str], *, dry_run: bool) -> None:
    out = console()
    for line in lines:
        out.print(coloured(line), soft_wrap=True)
    before, after = answer.before.stored_version, answer.after.stored_version
    if before and before == after:
        text = f"unchanged, stored version {before}"
    elif dry_run:
        text = f"would be stored in place of version {before}" if before else "would be stored"
    else:
        text = f"stored version {after}, was {before}" if before else f"stored version {after}"
    if before != after and (not answer.changed or (dry_run and not lines)):
        text += "; its effect is the same"
    out.print(f"{service}: {printable(text)}", soft_wrap=True)


def _why(error: RefusedError, service: str) -> str:
    if error.code is grpc.StatusCode.ABORTED:
        return f"{error.details}; read what is stored now with `mesh policy get {service}`, and decide again"
    return error.details or error.code.name


def _checked_json(item: Checked) -> dict[str, Json]:
    return {
        "file": item.document.file,
        "document": item.document.number,
        "line": item.document.line,
        "service": item.service or None,
        "valid": not item.errors,
        "errors": [{"path": error.path, "message": error.message} for error in item.errors],
    }


def _write_errors(checked: Sequence[Checked]) -> None:
    for item in checked:
        _write_field_errors(item.document.place, item.errors)


def _write_field_errors(place: str, errors: Sequence[FieldError | admin_pb2.FieldError]) -> None:
    for error in errors:
        write_error(f"{place}: {error.path}: {error.message}" if error.path else f"{place}: {error.message}")
