"""`mesh gateway`: what an edge would make of annotated protos, offline."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from mesh_cli import gateway_run
from mesh_cli.gateway_files import ProtoPaths, content, read_settings
from mesh_cli.options import AsJson
from mesh_cli.output import (
    Failure,
    Json,
    add_row,
    console,
    count,
    printable,
    reports_errors,
    table,
    write_error,
    write_json,
)
from mesh_client.core.errors import ConfigError

if TYPE_CHECKING:
    from gateway.lint import Finding
    from gateway.routes import RouteTable
    from mesh_client.core.edge_policy import EdgePolicy

app = typer.Typer(
    no_args_is_help=True,
    help="Check annotated protos, and render what a REST edge needs. Works on files; no running edge is touched.",
    epilog="Example: mesh gateway lint -I protos protos/shop/v1/*.proto",
)
render = typer.Typer(
    no_args_is_help=True,
    help="Render the configuration of an edge.",
    epilog="Example: mesh gateway render kong --policy edge.yaml --settings kong.yaml --output build shop.binpb",
)
app.add_typer(render, name="render")
app.add_typer(gateway_run.app, name="run")

Files = Annotated[
    list[Path],
    typer.Argument(
        metavar="FILE...",
        help="Descriptor sets, written with --include_imports, or .proto files.",
        show_default=False,
    ),
]
Services = Annotated[
    list[str] | None,
    typer.Option("--service", metavar="NAME", help="Only this gRPC service; may be repeated. Default: all."),
]
_POLICY = typer.Option(
    "--policy", metavar="FILE", help="Policy of the edge: which services are exposed, and to whom; see mesh edge."
)


@app.command(epilog="Example: mesh gateway lint -I protos protos/shop/v1/*.proto")
@reports_errors
def lint(
    files: Files,
    proto_paths: ProtoPaths = None,
    services: Services = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            metavar="RULE[:FIELD]",
            help="Take this error for a warning; may be repeated, as in int64:a.B.c.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what Kong would silently distort, or what is a risk, field by field. Exit code 1 if there is an error."""
    found = _table(files, proto_paths, services)
    from gateway.lint import Severity, for_kong

    findings = for_kong(found, accept or ())
    errors = sum(finding.severity is Severity.ERROR for finding in findings)
    if as_json:
        write_json({"findings": [_finding(finding) for finding in findings], "errors": errors})
    else:
        for finding in findings:
            console().print(printable(str(finding)), soft_wrap=True)
        warnings = len(findings) - errors
        console().print(f"{count(errors, 'error')}, {count(warnings, 'warning')}")
    if errors:
        raise Failure


@app.command(epilog="Example: mesh gateway routes -I protos protos/shop/v1/*.proto")
@reports_errors
def routes(files: Files, proto_paths: ProtoPaths = None, services: Services = None, as_json: AsJson = False) -> None:
    """List the REST routes in the order of precedence: of those that match a request, the first is meant."""
    found = _table(files, proto_paths, services)
    if as_json:
        write_json(
            {
                "routes": [
                    {
                        "verb": route.verb,
                        "path": str(route.template),
                        "method": route.method.full_name,
                        "binding": route.binding,
                        "body": route.body,
                        "response_body": route.response_body,
                        "path_fields": [variable.name for variable in route.template.variables],
                        "query_fields": [name for name, _ in route.query_fields()],
                        "client_streaming": route.method.client_streaming,
                        "server_streaming": route.method.server_streaming,
                        "request": route.method.input.full_name,
                        "response": route.method.output.full_name,
                    }
                    for route in found.routes
                ]
            }
        )
        return
    shown = table("VERB", "PATH", "METHOD", "BODY", "STREAMS")
    for route in found.routes:
        kinds = (("requests", route.method.client_streaming), ("responses", route.method.server_streaming))
        streams = ", ".join(kind for kind, streamed in kinds if streamed)
        add_row(shown, route.verb, str(route.template), route.method.full_name, route.body or "-", streams or "-")
    console().print(shown)


@app.command(epilog="Example: mesh gateway openapi -I protos protos/shop/v1/*.proto > openapi.json")
@reports_errors
def openapi(
    files: Files,
    proto_paths: ProtoPaths = None,
    services: Services = None,
    policy: Annotated[Path | None, _POLICY] = None,
    title: Annotated[str, typer.Option("--title", help="Title of the API.")] = "API",
    version: Annotated[str, typer.Option("--api-version", help="Version of the API.")] = "1",
    server: Annotated[str | None, typer.Option("--server", metavar="URL", help="Where the edge serves it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in one line; without it, it is indented.")] = False,
) -> None:
    """Write OpenAPI 3.1 of exactly these routes. With a policy: of what it exposes, with its security schemes."""
    edge = _policy(policy) if policy is not None else None
    found = _table(files, proto_paths, services or (list(edge.services) if edge is not None else None))
    from gateway.openapi import render as render_openapi

    document = render_openapi(found, title=title, version=version, policy=edge, server=server)
    write_json(cast("Json", document), compact=as_json)


@render.command(
    epilog="Example: mesh gateway render kong --policy edge.yaml --settings kong.yaml --output build shop.binpb"
)
@reports_errors
def kong(
    files: Files,
    policy: Annotated[Path, _POLICY],
    settings: Annotated[
        Path,
        typer.Option("--settings", metavar="FILE", help="Where the services run, and what else is this Kong's own."),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIRECTORY", help="Where kong.yml and protos/ are written.")
    ],
    proto_paths: ProtoPaths = None,
    as_json: AsJson = False,
) -> None:
    """Write kong.yml for Kong without a database, and the protos that it names, or refuse with what would be distorted.

    Nothing is sent to a running Kong. Protos of earlier renderings are left alone: a Kong may use them still.
    """
    edge, local = _policy(policy), read_settings(settings)
    found = _table(files, proto_paths, list(edge.services))
    from gateway.kong import render as render_kong
    from gateway.lint import RefusedError
    from gateway.openapi import render as render_openapi

    document = json.dumps(render_openapi(found, title=edge.edge, version="1", policy=edge))
    try:
        made = render_kong(found, edge, local.upstreams, local, document)
    except RefusedError as error:
        if as_json:
            write_json({"written": [], "findings": [_finding(finding) for finding in error.findings]})
        for finding in error.findings:
            write_error(str(finding))
        raise Failure from None
    contents = {output / "protos" / proto.file_name: proto.text for proto in made.protos}
    contents[output / "kong.yml"] = made.declarative
    for path, text in contents.items():
        _write(path, text)
    if as_json:
        written: list[Json] = [str(path) for path in contents]
        write_json({"written": written, "findings": [_finding(finding) for finding in made.warnings]})
        return
    for path in contents:
        console().print(f"wrote {printable(str(path))}", soft_wrap=True)
    if made.warnings:
        console().print(f"{count(len(made.warnings), 'warning')}: see them with mesh gateway lint")


def _table(files: list[Path], proto_paths: list[Path] | None, services: list[str] | None) -> RouteTable:
    try:
        from gateway.protos import load
        from gateway.routes import build
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is missing: pip install 'grpc-mesh[gateway]'") from None
    return build(load(files, proto_paths or ()), services)


def _policy(file: Path) -> EdgePolicy:
    from control_plane.documents import parse_document
    from mesh_client.core.edge_policy import EdgePolicy

    return parse_document(content(file), EdgePolicy)


def _finding(finding: Finding) -> Json:
    return {
        "severity": finding.severity.value,
        "rule": finding.rule,
        "method": finding.method,
        "field": finding.field,
        "message": finding.message,
        "remedy": finding.remedy,
    }


def _write(path: Path, text: str) -> None:
    """Replaces the file whole, so that nobody ever reads half of one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
