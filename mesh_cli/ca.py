"""`mesh ca`: the certificate authority, rotation of its root, and revocation."""

from __future__ import annotations

import sys
from typing import Annotated

import grpc
import typer
from mesh.v1 import authority_pb2 as pb
from rich.console import Group, RenderableType
from rich.text import Text

from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Interval,
    Operator,
    Timeout,
    Watch,
    checked_service,
    connect,
)
from mesh_cli.output import (
    Failure,
    add_row,
    console,
    count,
    moment,
    names,
    printable,
    reports_errors,
    table,
    to_json,
    write_error,
    write_json,
)
from mesh_cli.rotation import next_step
from mesh_cli.watch import show
from mesh_client.identity.certificates import fingerprint, to_pem

_SHORT = 16
"""Characters of a fingerprint that tables show; JSON has all."""

app = typer.Typer(
    no_args_is_help=True,
    help="The certificate authority: whom it certified, rotation of its root, revocation.",
    epilog="Example: mesh ca status",
)
rotate = typer.Typer(
    no_args_is_help=True,
    help="Replace the trust root while everything runs, in three steps: add, overlap, retire.",
    epilog="Example: mesh ca rotate add",
)
app.add_typer(rotate, name="rotate")

Force = Annotated[
    bool, typer.Option("--force", help="Although workloads are cut off by it, which the refusal without it names.")
]


@app.command(epilog="Example: mesh ca status --watch")
@reports_errors
def status(
    as_json: AsJson = False,
    watch: Watch = False,
    interval: Interval = 2.0,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the trusted roots, where a rotation stands, and every workload with its certificate."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        show(
            lambda: client.call(client.authority.GetCertificateAuthority, pb.GetCertificateAuthorityRequest()),
            render_authority,
            to_json if as_json else None,
            interval if watch else None,
        )


@app.command(epilog="Example: mesh ca roots > roots.pem")
@reports_errors
def roots(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Write the trusted roots as PEM, for MESH_TRUST_ROOTS of workloads that join by a Consul token."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        bundle = client.trust_bundle()
    if as_json:
        write_json(
            {
                "trust_domain": bundle.trust_domain,
                "version": bundle.version,
                "signing_root": bundle.signing_root,
                "roots": [{"fingerprint": fingerprint(root), "pem": to_pem([root]).decode()} for root in bundle.roots],
            }
        )
    else:
        sys.stdout.write(to_pem(bundle.roots).decode())


@app.command(epilog="Example: mesh ca revoke --workload 5f0c9a1b2c3d4e5f")
@reports_errors
def revoke(
    workload: Annotated[
        str | None,
        typer.Option("--workload", metavar="ID", help="One workload, from `mesh ca status`.", show_default=False),
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(
            "--service",
            metavar="SERVICE",
            callback=lambda text: text if text is None else checked_service(text),
            help="All workloads of a service that exist now.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Revoke workloads: no renewal, no calls, no place in the mesh.

    Join tokens stay good: revoke those too (`mesh token revoke`), or the workloads join anew.
    """
    if (workload is None) == (service is None):
        raise typer.BadParameter("give either --workload or --service", param_hint="'--workload' / '--service'")
    request = (
        pb.RevokeWorkloadRequest(workload_id=workload) if workload else pb.RevokeWorkloadRequest(service=service or "")
    )
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            answer = client.call(client.authority.RevokeWorkload, request)
        except RefusedError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            write_error(f"there is no workload {workload or f'of {service}'}; `mesh ca status` shows those that exist")
            raise Failure from None
    if as_json:
        write_json(to_json(answer))
    else:
        console().print(f"Revoked {count(len(answer.workload_ids), 'workload')}: {names(answer.workload_ids)}")


@rotate.command(epilog="Example: mesh ca rotate add")
@reports_errors
def add(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Step 1: make a new root and have everybody trust it beside the old one. Nothing is signed by it yet."""
    _rotate(pb.ROTATION_STEP_ADD, False, as_json, connect(control_plane, timeout, operator, insecure=insecure))


@rotate.command(epilog="Example: mesh ca rotate overlap")
@reports_errors
def overlap(
    force: Force = False,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Step 2, once every workload trusts the new root: sign by it. Workloads renew their certificates soon."""
    _rotate(pb.ROTATION_STEP_OVERLAP, force, as_json, connect(control_plane, timeout, operator, insecure=insecure))


@rotate.command(epilog="Example: mesh ca rotate retire")
@reports_errors
def retire(
    force: Force = False,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Step 3, once no workload's certificate leads up to the old root: trust the new one alone."""
    _rotate(pb.ROTATION_STEP_RETIRE, force, as_json, connect(control_plane, timeout, operator, insecure=insecure))


def _rotate(step: pb.RotationStep.ValueType, force: bool, as_json: bool, connecting: AdminClient) -> None:
    with connecting as client:
        request = pb.RotateTrustRootRequest(step=step, force=force)
        try:
            answer = client.call(client.authority.RotateTrustRoot, request)
        except RefusedError as error:
            if error.code is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            write_error(error.details)
            raise Failure from None
    if as_json:
        write_json(to_json(answer))
    else:
        console().print(render_authority(answer.authority))


def render_authority(answer: pb.GetCertificateAuthorityResponse) -> RenderableType:
    """The certificate authority as tables, and what the next step of a rotation is."""
    head = Text(
        f"Trust domain {printable(answer.trust_domain)}, bundle {printable(answer.bundle_version)}; certificates from "
        f"{printable(answer.issuer)} until {moment(answer.issuer_expires)}",
        style="bold",
    )
    shown = table("ROOT", "ENDS", "WORKLOADS", "UNCONFIRMED", "", right=["WORKLOADS", "UNCONFIRMED"])
    for root in answer.roots:
        state = Text("signs", style="green") if root.signing else Text("trusted")
        numbers = (str(root.workloads), str(root.unconfirmed))
        add_row(shown, root.fingerprint[:_SHORT], moment(root.expires), *numbers, state)
    parts: list[RenderableType] = [head, Text(), shown, Text()]
    if step := next_step(answer):
        parts += [Text(step, style="yellow"), Text()]
    if not answer.workloads:
        return Group(*parts, Text("No workload has a certificate."))
    workloads = table("WORKLOAD", "IDENTITY", "ENDS", "ROOT", "BUNDLE", "ATTESTED BY", "")
    for workload in answer.workloads:
        add_row(
            workloads,
            workload.id,
            workload.spiffe_id,
            moment(workload.expires),
            workload.root[:_SHORT] or "-",
            Text("current", style="green")
            if workload.bundle_version == answer.bundle_version
            else Text(printable(workload.bundle_version) or "-"),
            workload.attested_by or "-",
            Text("revoked", style="red") if workload.revoked else "",
        )
    return Group(*parts, workloads)
