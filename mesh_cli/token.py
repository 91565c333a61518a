"""`mesh token`: what workloads join the mesh with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import grpc
import typer
from google.protobuf.duration_pb2 import Duration
from mesh.v1 import authority_pb2

from mesh_cli.client import RefusedError
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    AsJson,
    ControlPlane,
    Insecure,
    Operator,
    Timeout,
    checked_service,
    connect,
    span,
)
from mesh_cli.output import (
    Failure,
    add_row,
    console,
    count,
    moment,
    printable,
    reports_errors,
    table,
    to_json,
    write_error,
    write_json,
)
from mesh_client.core.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Join tokens: each lets workloads of one service get their first certificates.",
    epilog="Example: mesh token create --service orders --ttl 1h",
)


@app.command(epilog="Example: mesh token create --service orders --ttl 1h --uses 3 --file orders.token")
@reports_errors
def create(
    service: Annotated[
        str,
        typer.Option("--service", metavar="SERVICE", callback=checked_service, help="The service that may join."),
    ],
    ttl: Annotated[
        float,
        typer.Option("--ttl", parser=span, metavar="TIME", show_default="1h", help="How long it is good: 1m to 30d."),
    ] = 3_600.0,
    uses: Annotated[int, typer.Option("--uses", min=1, max=100_000, help="How many workloads may join with it.")] = 1,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            dir_okay=False,
            help="Write it to a file with mode 0600, for MESH_TOKEN_FILE, in place of standard output.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Make a join token. It is shown this once; whoever has it can join as the service until it ends."""
    asked = Duration()
    asked.FromNanoseconds(round(ttl * 1e9))
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        request = authority_pb2.CreateJoinTokenRequest(service=service, ttl=asked, uses=uses)
        answer = client.call(client.authority.CreateJoinToken, request)
    if file is not None:
        _write_secret(file, answer.token)
        answer.token = ""
    details = answer.details
    if as_json:
        write_json(to_json(answer))
        return
    if file is None:
        console().print(answer.token, soft_wrap=True)
    console(stderr=True).print(
        f"Token {printable(details.id)} lets {count(details.uses, 'workload')} join as {printable(details.service)} "
        f"until {moment(details.expires)}{'' if file is None else f'; it is in {file}'}.",
        soft_wrap=True,
    )


@app.command("list", epilog="Example: mesh token list --json")
@reports_errors
def list_tokens(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the join tokens that have neither ended nor been revoked, without what makes them tokens."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        answer = client.call(client.authority.ListJoinTokens, authority_pb2.ListJoinTokensRequest())
    if as_json:
        write_json(to_json(answer))
        return
    if not answer.tokens:
        console().print("There are no join tokens.")
        return
    shown = table("TOKEN", "SERVICE", "USES LEFT", "ENDS", "MADE BY", right=["USES LEFT"])
    for token in answer.tokens:
        uses = f"{token.uses_left} of {token.uses}"
        add_row(shown, token.id, token.service, uses, moment(token.expires), token.created_by or "-")
    console().print(shown)


@app.command(epilog="Example: mesh token revoke 5f0c9a1b2c3d4e5f")
@reports_errors
def revoke(
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="Its id, from `mesh token list`.")],
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Make a join token worthless from now on. Workloads that joined with it stay: see `mesh ca revoke`."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            answer = client.call(client.authority.RevokeJoinToken, authority_pb2.RevokeJoinTokenRequest(id=token))
        except RefusedError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            write_error(f"there is no join token {token!r}; `mesh token list` shows those that are good")
            raise Failure from None
    if as_json:
        write_json(to_json(answer))
    else:
        console().print(f"Token {printable(token)} is worthless now.")


def _write_secret(file: Path, text: str) -> None:
    from control_plane.files import write_atomically

    try:
        write_atomically(file, f"{text}\n".encode("ascii"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}; revoke the token and make another") from None
