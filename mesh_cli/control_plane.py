"""`mesh control-plane`: runs a control plane in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from mesh_cli.log_options import LogFormat, LogLevel, logged
from mesh_cli.options import DEFAULT_CONTROL_PLANE, Insecure, contradicts_variable, insecure_by_variable, span
from mesh_cli.output import reports_errors
from mesh_client.addresses import REGISTRY_VARIABLE
from mesh_client.core.errors import ConfigError, InvalidValueError, MeshError
from mesh_client.core.identity import DEFAULT_TRUST_DOMAIN
from mesh_client.log_service import LogService

_LONGEST = 7 * 86_400.0
"""Seconds; nothing is worth remembering or holding back for longer than a week."""

CONTROL_PLANE = "control-plane"
"""In place of a service's name in the log."""


@reports_errors
def control_plane(
    context: typer.Context,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where clients connect; port 0 for any free one.")
    ] = DEFAULT_CONTROL_PLANE,
    registry: Annotated[
        str,
        typer.Option(
            "--registry",
            envvar=REGISTRY_VARIABLE,
            metavar="REGISTRY",
            help="Where endpoints and policies are: embedded, or consul://host:port with more hosts after commas.",
        ),
    ] = "embedded",
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            envvar="MESH_DATA_DIR",
            file_okay=False,
            help="For the embedded registry, the last good policies and the certificate authority. "
            "Default: grpc-mesh in XDG_STATE_HOME.",
            show_default=False,
        ),
    ] = None,
    enrol_listen: Annotated[
        str | None,
        typer.Option(
            "--enrol-listen",
            metavar="HOST:PORT",
            help="Where workloads get their first certificates. Default: the port after --listen's.",
            show_default=False,
        ),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            "--metrics-listen",
            metavar="HOST:PORT",
            help="Where Prometheus metrics are served, to whoever can reach it. Default: nowhere.",
            show_default=False,
        ),
    ] = None,
    dashboard_listen: Annotated[
        str | None,
        typer.Option(
            "--dashboard-listen",
            metavar="HOST:PORT",
            help="Where the dashboard is, such as 127.0.0.1:7080; `mesh dashboard` opens it. Default: nowhere.",
            show_default=False,
        ),
    ] = None,
    dashboard_certificate: Annotated[
        Path | None,
        typer.Option(
            "--dashboard-certificate",
            exists=True,
            dir_okay=False,
            help="PEM file of the certificate that browsers see. Beyond 127.0.0.1 there is no dashboard without one.",
            show_default=False,
        ),
    ] = None,
    dashboard_key: Annotated[
        Path | None,
        typer.Option(
            "--dashboard-key",
            exists=True,
            dir_okay=False,
            help="PEM file of its key, with mode 0600.",
            show_default=False,
        ),
    ] = None,
    trust_domain: Annotated[
        str,
        typer.Option(
            "--trust-domain", envvar="MESH_TRUST_DOMAIN", metavar="NAME", help="Of every identity; never changes."
        ),
    ] = DEFAULT_TRUST_DOMAIN,
    leaf_lifetime: Annotated[
        float,
        typer.Option(
            "--leaf-lifetime",
            parser=span,
            metavar="TIME",
            show_default="24h",
            help="How long certificates are good, such as 24h; they are renewed at two thirds of it.",
        ),
    ] = 86_400.0,
    ca_certificate: Annotated[
        Path | None,
        typer.Option(
            "--ca-certificate",
            exists=True,
            dir_okay=False,
            help="PEM file of an intermediate of an offline root that signs certificates, with --ca-key and "
            "--ca-roots; read again when it changes. Without them: an own root, in --data-dir.",
            show_default=False,
        ),
    ] = None,
    ca_key: Annotated[
        Path | None,
        typer.Option(
            "--ca-key",
            exists=True,
            dir_okay=False,
            help="PEM file of its key, with mode 0600.",
            show_default=False,
        ),
    ] = None,
    ca_roots: Annotated[
        Path | None,
        typer.Option("--ca-roots", exists=True, dir_okay=False, help="PEM file of the roots.", show_default=False),
    ] = None,
    connection_age: Annotated[
        float,
        typer.Option(
            "--connection-age",
            parser=span,
            metavar="TIME",
            show_default="10m",
            help="Connections end after this long; clients come back at once.",
        ),
    ] = 600.0,
    insecure: Insecure = False,
    consul_token_file: Annotated[
        Path | None,
        typer.Option(
            "--consul-token-file",
            exists=True,
            dir_okay=False,
            help="File with the ACL token for Consul, read again when Consul refuses what it held. Without it: "
            "the token in CONSUL_HTTP_TOKEN, or in the file that CONSUL_HTTP_TOKEN_FILE names.",
            show_default=False,
        ),
    ] = None,
    max_streams: Annotated[
        int, typer.Option("--max-streams", min=1, max=1_000_000, help="Clients at once; further ones are refused.")
    ] = 10_000,
    debounce_quiet: Annotated[
        float,
        typer.Option(
            "--debounce-quiet", min=0.0, max=60.0, metavar="SECONDS", help="Changes wait this long for further ones."
        ),
    ] = 0.02,
    debounce_maximum: Annotated[
        float,
        typer.Option(
            "--debounce-maximum", min=0.0, max=60.0, metavar="SECONDS", help="Changes wait this long at most."
        ),
    ] = 0.2,
    policy_wait: Annotated[
        float,
        typer.Option(
            "--policy-wait",
            min=0.001,
            max=_LONGEST,
            metavar="SECONDS",
            help="Services get the defaults when policies cannot be read this long after the registry was.",
        ),
    ] = 30.0,
    guard_hold: Annotated[
        float,
        typer.Option(
            "--guard-hold",
            min=0.0,
            max=_LONGEST,
            metavar="SECONDS",
            help="How long suspiciously many removals are held back without `mesh removals confirm`; 0: never.",
        ),
    ] = 300.0,
    forget_after: Annotated[
        float,
        typer.Option(
            "--forget-after",
            min=0.0,
            max=_LONGEST,
            metavar="SECONDS",
            help="How long a service without endpoints stays known.",
        ),
    ] = 600.0,
    trace_memory: Annotated[
        int,
        typer.Option(
            "--trace-memory",
            min=0,
            max=65_536,
            metavar="MIB",
            help="Memory for the last traces that services send; 0: none are taken.",
        ),
    ] = 64,
    trace_age: Annotated[
        float,
        typer.Option(
            "--trace-age",
            parser=span,
            metavar="TIME",
            show_default="1h",
            help="How long traces are kept after their last span, if there is room.",
        ),
    ] = 3_600.0,
    otlp_listen: Annotated[
        str | None,
        typer.Option(
            "--otlp-listen",
            metavar="HOST:PORT",
            help="Take traces as OTLP over gRPC in plaintext too, from processes of this host: 127.0.0.1:4317. "
            "Default: from workloads of the mesh alone.",
            show_default=False,
        ),
    ] = None,
    jaeger_ui: Annotated[
        str,
        typer.Option(
            "--jaeger-ui",
            envvar="MESH_JAEGER_UI",
            metavar="URL",
            help="Where people open Jaeger, for links to traces.",
            show_default=False,
        ),
    ] = "",
    broker: Annotated[
        str,
        typer.Option(
            "--broker",
            envvar="MESH_BROKER",
            metavar="URL",
            help="RabbitMQ to which events of the mesh are published, as amqps://host:port/vhost. Default: none.",
            show_default=False,
        ),
    ] = "",
    broker_credentials: Annotated[
        Path | None,
        typer.Option(
            "--broker-credentials",
            envvar="MESH_BROKER_CREDENTIALS",
            dir_okay=False,
            help="File with the control plane's user and password there, one a line, mode 0600.",
            show_default=False,
        ),
    ] = None,
    broker_roots: Annotated[
        Path | None,
        typer.Option(
            "--broker-roots",
            envvar="MESH_BROKER_ROOTS",
            dir_okay=False,
            help="PEM file of the roots that its certificate is verified by. Default: the system's.",
            show_default=False,
        ),
    ] = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
) -> None:
    """Run a control plane until Ctrl-C or SIGTERM. It writes where it enrols and where it listens when it is ready.

    Everybody who connects proves who they are: workloads by join tokens (`mesh token create`), operators by files
    (`mesh operator create`).

    Exit code 0 after a clean stop, 1 when it cannot run, 2 when an option is wrong.
    """
    try:
        from control_plane.catalog import CatalogSettings
        from control_plane.dashboard.options import DashboardOptions
        from control_plane.identity.options import IdentityOptions
        from control_plane.options import ControlPlaneOptions
        from control_plane.process import serve
        from control_plane.traces.settings import TraceSettings
        from control_plane.traces.store import TraceLimits
        from mesh_client.grpc_log import adopt_grpc_log
    except ModuleNotFoundError as error:
        raise missing_extra(error) from None
    if dashboard_listen is None and (dashboard_certificate is not None or dashboard_key is not None):
        raise typer.BadParameter("--dashboard-certificate and --dashboard-key go with --dashboard-listen")
    data_dir = data_dir or default_data_dir()
    if insecure_by_variable(context):
        _refuse_to_forget(data_dir, ca_certificate)
    try:
        options = ControlPlaneOptions(
            address=listen,
            registry=registry,
            data_dir=data_dir,
            insecure=insecure,
            enrolment_address=enrol_listen,
            metrics_address=metrics_listen,
            dashboard=None
            if dashboard_listen is None
            else DashboardOptions(dashboard_listen, dashboard_certificate, dashboard_key),
            identity=IdentityOptions(
                trust_domain=trust_domain,
                leaf_lifetime=leaf_lifetime,
                ca_certificate=ca_certificate,
                ca_key=ca_key,
                ca_roots=ca_roots,
            ),
            connection_age=connection_age,
            consul_token_file=consul_token_file,
            max_streams=max_streams,
            debounce_quiet=debounce_quiet,
            debounce_maximum=debounce_maximum,
            policy_wait=policy_wait,
            catalog=CatalogSettings(forget_after=forget_after, guard_hold=guard_hold),
            traces=TraceSettings(
                limits=TraceLimits(max_bytes=trace_memory * 1024 * 1024, max_age=trace_age) if trace_memory else None,
                otlp_address=otlp_listen,
                jaeger_ui=jaeger_ui,
            ),
            broker=broker,
            broker_credentials=broker_credentials,
            broker_roots=broker_roots,
        )
    except (ConfigError, InvalidValueError) as error:
        raise typer.BadParameter(str(error)) from None
    give_back = adopt_grpc_log()  # who was refused in a TLS handshake belongs into the log
    try:
        with logged(CONTROL_PLANE, options.control_plane_id, log_level, log_format) as logs:
            asyncio.run(serve(options, LogService(logs)))
    finally:
        give_back()


def _refuse_to_forget(data_dir: Path, ca_certificate: Path | None) -> None:
    """A mesh whose members have identities does not lose them, and every rule with them, to a variable.

    Raises:
        BadParameter: there is a certificate authority.
    """
    if ca_certificate is not None:
        raise contradicts_variable("--ca-certificate names a certificate authority")
    with contextlib.suppress(OSError):  # the start says what is wrong with the directory
        if (data_dir / "ca").exists():
            raise contradicts_variable(f"{data_dir / 'ca'} holds a certificate authority, and everybody could do all")


def missing_extra(error: ModuleNotFoundError) -> MeshError:
    """What to say when a package of the ``control-plane`` extra is not installed.

    Raises:
        ModuleNotFoundError: the missing module is one of grpc-mesh itself: the installation is broken.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "control_plane", "mesh_client", "mesh"):
        raise error
    return ConfigError(
        f"the control plane needs the package {package!r}, which is not installed; "
        "install it with pip install 'grpc-mesh[control-plane]'"
    )


def default_data_dir() -> Path:
    """``grpc-mesh`` in the user's state directory (XDG base directory specification)."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "grpc-mesh"
