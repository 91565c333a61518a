"""`mesh operator`: credentials for those who run the mesh."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mesh_cli.control_plane import default_data_dir, missing_extra
from mesh_cli.credentials import OPERATOR_VARIABLE, default_operator_directory
from mesh_cli.log_options import LogFormat, logged
from mesh_cli.options import AsJson, span
from mesh_cli.output import console, reports_errors, write_json
from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN, Principal

app = typer.Typer(
    no_args_is_help=True,
    help="Operators: whoever has their credentials may do everything with the mesh.",
    epilog="Example: mesh operator create alice",
)


@app.callback()
def operator() -> None:
    """Keeps `create` a command of its own: typer would otherwise fold a single one into the group."""


@app.command(epilog="Example: mesh operator create alice --data-dir /var/lib/grpc-mesh --directory alice")
@reports_errors
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose they are, for logs and rules: a DNS label.")],
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            file_okay=False,
            help="Where they go; made with mode 0700. Default: where the other commands look for them, "
            "grpc-mesh/operator in XDG_CONFIG_HOME.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            envvar="MESH_DATA_DIR",
            file_okay=False,
            help="The control plane's, which may be running. Default: grpc-mesh in XDG_STATE_HOME.",
            show_default=False,
        ),
    ] = None,
    ca_certificate: Annotated[
        Path | None,
        typer.Option(
            "--ca-certificate",
            exists=True,
            dir_okay=False,
            help="For a control plane that runs on an intermediate given as files: those files.",
            show_default=False,
        ),
    ] = None,
    ca_key: Annotated[
        Path | None,
        typer.Option("--ca-key", exists=True, dir_okay=False, help="Its key.", show_default=False),
    ] = None,
    ca_roots: Annotated[
        Path | None,
        typer.Option("--ca-roots", exists=True, dir_okay=False, help="The roots.", show_default=False),
    ] = None,
    trust_domain: Annotated[
        str, typer.Option("--trust-domain", envvar="MESH_TRUST_DOMAIN", metavar="NAME", help="The control plane's.")
    ] = DEFAULT_TRUST_DOMAIN,
    lifetime: Annotated[
        float,
        typer.Option(
            "--lifetime", parser=span, metavar="TIME", show_default="30d", help="How long they are good, at most 366d."
        ),
    ] = 30 * 86_400.0,
    as_json: AsJson = False,
    log_format: LogFormat = None,
) -> None:
    """Make an operator's credentials, on the control plane's host, from the files of its certificate authority.

    Writes the certificate's audit record to standard error; a control plane that runs on these files logs it as well.
    """
    try:
        from control_plane.identity.operators import create_operator, create_operator_from_files
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    directory = directory or default_operator_directory()
    now = time.time()
    try:
        principal = Principal.operator(trust_domain, name)
    except InvalidValueError as error:
        raise typer.BadParameter(str(error)) from None
    # The audit record of the certificate, which a control plane that does not run, or runs elsewhere, cannot write.
    with logged("operator", "", "info", log_format):
        if ca_certificate is not None and ca_key is not None and ca_roots is not None:
            files = create_operator_from_files(
                ca_certificate,
                ca_key,
                ca_roots,
                name,
                directory,
                now=now,
                lifetime=lifetime,
                trust_domain=trust_domain,
            )
        elif ca_certificate is ca_key is ca_roots is None:
            data_dir = data_dir or default_data_dir()
            files = create_operator(data_dir, name, directory, now=now, lifetime=lifetime, trust_domain=trust_domain)
        else:
            raise ConfigError("--ca-certificate, --ca-key and --ca-roots: give all three or none")
    ends = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(files.expires))
    if as_json:
        write_json(
            {
                "spiffe_id": principal.spiffe_id,
                "workload_id": files.workload_id,
                "directory": str(directory),
                "expires": ends,
            }
        )
        return
    console().print(f"{principal.spiffe_id} until {ends}, in {directory}", soft_wrap=True)
    if directory != default_operator_directory():
        console().print(f"Use them with --operator {directory} or {OPERATOR_VARIABLE}={directory}", soft_wrap=True)
