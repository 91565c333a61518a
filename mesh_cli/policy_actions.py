"""What commands do with policies, of whatever kind: check, store, show and delete them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import grpc
import typer
from mesh.v1 import admin_pb2

from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.documents import Checked, check, read_documents
from mesh_cli.output import (
    Failure,
    Json,
    add_row,
    console,
    count,
    names,
    printable,
    table,
    write_error,
    write_json,
    write_warning,
)
from mesh_cli.policy_form import coloured, difference, effective, settings, stated, stated_yaml, to_yaml
from mesh_cli.policy_kind import Message, PolicyKind
from mesh_client.core.errors import FieldError
from mesh_client.core.policy_base import Policy

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
        help="Only if this is the version stored now, as `get` shows it; an empty one: only if none is.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Change nothing; show how the effective policies would change.")
]
Effective = Annotated[bool, typer.Option("--effective", help="With every default filled in, as it is obeyed.")]


def validate(kind: PolicyKind, files: Sequence[Path], *, as_json: bool) -> None:
    """Checks policy files without a control plane.

    Raises:
        Failure: a policy is bad.
    """
    checked = check(read_documents(files, kind.model), kind.model)
    valid = not any(item.errors for item in checked)
    if as_json:
        write_json({"valid": valid, "documents": [_checked_json(kind, item) for item in checked]})
    else:
        _write_errors(checked)
        for item in checked:
            if not item.errors:
                text = f"{printable(item.document.place)}: policy of {kind.called(item.name)} is valid"
                console().print(text, soft_wrap=True)
    if not valid:
        raise Failure


def apply(
    kind: PolicyKind,
    client: AdminClient,
    checked: Sequence[Checked[Policy]],
    if_version: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Stores policies, none unless all are valid.

    Raises:
        Failure: a policy is bad, or was not stored.
    """
    if not any(item.errors for item in checked):
        _check_on_server(kind, client, checked)
    if any(item.errors for item in checked):
        if as_json:
            write_json({"policies": [_checked_json(kind, item) for item in checked]})
        else:
            _write_errors(checked)
            write_error("nothing was stored")
        raise Failure
    results = [_apply_one(kind, client, item, if_version, dry_run=dry_run, quiet=as_json) for item in checked]
    if as_json:
        write_json({"policies": [result for result, _ in results]})
    if not all(stored for _, stored in results):
        raise Failure


def to_apply(kind: PolicyKind, files: Sequence[Path], if_version: str | None) -> list[Checked[Policy]]:
    """The policies of the files, checked.

    Raises:
        ConfigError: a file cannot be read.
        typer.BadParameter: there are several for one version.
    """
    checked = check(read_documents(files, kind.model), kind.model)
    if if_version is not None and len(checked) > 1:
        raise typer.BadParameter(f"needs exactly one policy, and there are {len(checked)}", param_hint="'--if-version'")
    return checked


def get(kind: PolicyKind, client: AdminClient, name: str, *, show_effective: bool, as_json: bool) -> None:
    """Shows a stored policy.

    Raises:
        Failure: there is none, or it is invalid.
    """
    policy: Message | None
    try:
        request = admin_pb2.GetPolicyRequest(service=name, kind=kind.number)
        stored = client.call(client.stub.GetPolicy, request).policy
    except RefusedError as error:
        if error.code is not grpc.StatusCode.NOT_FOUND:
            raise
        if not show_effective:
            write_error(
                f"{kind.called(name)} has no policy of its own, so {kind.nothing}; see the defaults with --effective"
            )
            raise Failure from None
        stored, policy = admin_pb2.StoredPolicy(service=name), kind.default(name)
    else:
        policy = kind.of(stored)
    if as_json:
        document = _stored_json(kind, stored)
        if policy is not None:
            document["policy"] = effective(policy) if show_effective else stated(policy)
        write_json(document)
    elif policy is not None:
        comment = f"# stored version {printable(stored.stored_version)}" if stored.stored_version else "# the defaults"
        text = to_yaml(effective(policy)) if show_effective else stated_yaml(policy)
        console().print(f"{comment}\n{text}", end="", soft_wrap=True)
    if stored.errors:
        if not as_json:
            _write_field_errors(f"{kind.called(name)}, stored version {stored.stored_version}", stored.errors)
        raise Failure


def list_all(kind: PolicyKind, client: AdminClient, *, as_json: bool) -> None:
    """Lists the stored policies, with the settings in which each differs from the defaults."""
    answer = client.call(client.stub.ListPolicies, admin_pb2.ListPoliciesRequest(kind=kind.number))
    if as_json:
        write_json({"policies": [_stored_json(kind, stored) for stored in answer.policies]})
        return
    if not answer.policies:
        console().print(kind.none_stored)
        return
    shown = table(kind.named_by.upper(), "VERSION", "STATE", "SETTINGS")
    for stored in answer.policies:
        policy = kind.of(stored)
        add_row(
            shown,
            stored.service,
            stored.stored_version,
            f"invalid: {count(len(stored.errors), 'bad field')}" if policy is None else "valid",
            "-" if policy is None else names(settings(policy)),
        )
    console().print(shown)


def delete(kind: PolicyKind, client: AdminClient, name: str, if_version: str | None, *, as_json: bool) -> None:
    """Deletes a stored policy.

    Raises:
        Failure: it was not deleted.
    """
    what = kind.called(name)
    request = admin_pb2.DeletePolicyRequest(service=name, if_version=if_version, kind=kind.number)
    try:
        client.call(client.stub.DeletePolicy, request)
    except RefusedError as error:
        write_error(f"{what}: not deleted: {_why(kind, error, name)}")
        raise Failure from None
    if as_json:
        write_json({kind.named_by: name, "deleted": True})
    else:
        console().print(f"{what}: deleted; {kind.nothing}")


def schema(kind: PolicyKind) -> dict[str, Json]:
    """JSON Schema, draft 2020-12, of one policy document."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model.model_json_schema()}


def _check_on_server(kind: PolicyKind, client: AdminClient, checked: Sequence[Checked[Policy]]) -> None:
    """Asks the control plane as well, which may be of another version, so that either all are stored or none."""
    for item in checked:
        request = admin_pb2.ValidatePolicyRequest(document=item.document.text, kind=kind.number)
        answer = client.call(client.stub.ValidatePolicy, request)
        item.errors += [FieldError(error.path, error.message) for error in answer.errors]


def _apply_one(
    kind: PolicyKind, client: AdminClient, item: Checked[Policy], if_version: str | None, *, dry_run: bool, quiet: bool
) -> tuple[Json, bool]:
    """Stores one policy, or finds out what that would change; its JSON form, and whether that went well."""
    request = admin_pb2.ApplyPolicyRequest(
        document=item.document.text, if_version=if_version, dry_run=dry_run, kind=kind.number
    )
    what = kind.called(item.name)
    try:
        answer = client.call(client.stub.ApplyPolicy, request)
    except RefusedError as error:
        why = _why(kind, error, item.name)
        write_error(f"{item.document.place}: {what}: not stored: {why}")
        return _checked_json(kind, item) | {"error": {"code": error.code.name, "message": error.details}}, False
    for warning in answer.warnings:
        write_warning(f"{item.document.place}: {warning.path}: {warning.message}")
    before, after = answer.before, answer.after
    lines: list[str] = []
    if dry_run:
        lines = _difference(kind, before, after, item)
    if not quiet:
        _write_applied(what, answer, lines, dry_run=dry_run)
    made = _checked_json(kind, item) | {
        "changed": answer.changed,
        "dry_run": dry_run,
        "previous_version": before.stored_version or None,
        "stored_version": after.stored_version or None,
        "warnings": _errors_json(answer.warnings),
    }
    return made | {"difference": "".join(f"{line}\n" for line in lines)} if dry_run else made, True


def _difference(
    kind: PolicyKind, before: admin_pb2.StoredPolicy, after: admin_pb2.StoredPolicy, item: Checked[Policy]
) -> list[str]:
    what, stored = kind.called(item.name), kind.of(before)
    if stored is not None:
        name = f"{what} (stored version {before.stored_version})"
    else:
        bad = f"stored version {before.stored_version}, which is invalid and not obeyed; " if before.errors else ""
        name = f"{what} ({bad}defaults)"
        stored = kind.default(item.name)
    new = kind.of(after) or kind.default(item.name)
    return list(difference(effective(stored), effective(new), name, f"{what} ({item.document.file})"))


def _write_applied(what: str, answer: admin_pb2.ApplyPolicyResponse, lines: Sequence[str], *, dry_run: bool) -> None:
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
    out.print(f"{what}: {printable(text)}", soft_wrap=True)


def _why(kind: PolicyKind, error: RefusedError, name: str) -> str:
    if error.code is grpc.StatusCode.ABORTED:
        return f"{error.details}; read what is stored now with `mesh {kind.command} get {name}`, and decide again"
    return error.details or error.code.name


def _checked_json(kind: PolicyKind, item: Checked[Policy]) -> dict[str, Json]:
    return {
        "file": item.document.file,
        "document": item.document.number,
        "line": item.document.line,
        kind.named_by: item.name or None,
        "valid": not item.errors,
        "errors": _errors_json(item.errors),
    }


def _stored_json(kind: PolicyKind, stored: admin_pb2.StoredPolicy) -> dict[str, Json]:
    policy = kind.of(stored)
    return {
        kind.named_by: stored.service,
        "stored_version": stored.stored_version,
        "policy": None if policy is None else stated(policy),
        "errors": _errors_json(stored.errors),
    }


def _errors_json(errors: Iterable[FieldError | admin_pb2.FieldError]) -> Json:
    return [{"path": error.path, "message": error.message} for error in errors]


def _write_errors(checked: Sequence[Checked[Policy]]) -> None:
    for item in checked:
        _write_field_errors(item.document.place, item.errors)


def _write_field_errors(place: str, errors: Sequence[FieldError | admin_pb2.FieldError]) -> None:
    for error in errors:
        write_error(f"{place}: {error.path}: {error.message}" if error.path else f"{place}: {error.message}")
