"""`mesh endpoints`: where a service runs."""

from __future__ import annotations

import grpc
from mesh.v1 import admin_pb2, endpoint_pb2
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
    Service,
    Timeout,
    Watch,
    connect,
)
from mesh_cli.output import Failure, add_row, age, printable, reports_errors, table, to_json, write_error
from mesh_cli.watch import show

_HEALTH = {
    endpoint_pb2.HEALTH_STATUS_UNSPECIFIED: Text("healthy", style="green"),
    endpoint_pb2.HEALTH_STATUS_HEALTHY: Text("healthy", style="green"),
    endpoint_pb2.HEALTH_STATUS_UNHEALTHY: Text("unhealthy", style="red"),
    endpoint_pb2.HEALTH_STATUS_DRAINING: Text("draining", style="yellow"),
}


@reports_errors
def endpoints(
    service: Service,
    as_json: AsJson = False,
    watch: Watch = False,
    interval: Interval = 2.0,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Show the endpoints of a service: those that clients get, and those that are leaving."""
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        show(
            lambda: _fetch(client, service),
            lambda answer: render_endpoints(answer, service),
            to_json if as_json else None,
            interval if watch else None,
        )


def _fetch(client: AdminClient, service: str) -> admin_pb2.ListEndpointsResponse:
    try:
        return client.call(client.stub.ListEndpoints, admin_pb2.ListEndpointsRequest(service=service))
    except RefusedError as error:
        if error.code is not grpc.StatusCode.NOT_FOUND:
            raise
        write_error(f"the mesh does not know a service {service!r}; `mesh status` lists those that it knows")
        raise Failure from None


def _remark(status: admin_pb2.EndpointStatus) -> Text:
    if status.held:
        return Text("gone from its source; held", style="yellow")
    if status.drained_by:
        return Text(f"drained by {printable(status.drained_by.rpartition('/operator/')[2])}", style="yellow")
    return Text("")


def render_endpoints(answer: admin_pb2.ListEndpointsResponse, service: str) -> RenderableType:
    """The endpoints as a table."""
    title = Text(f"{service}, version {printable(answer.version) or '-'}", style="bold")
    if not answer.endpoints:
        return Group(title, Text(), Text("The service is known, but has no endpoints: calls to it fail."))
    shown = table("ENDPOINT", "ADDRESS", "HEALTH", "WEIGHT", "ZONE", "SOURCE", "FOR", "METADATA", "", right=["WEIGHT"])
    for status in answer.endpoints:
        endpoint = status.endpoint
        address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
        add_row(
            shown,
            endpoint.id,
            f"{address}:{endpoint.port}",
            _HEALTH.get(endpoint.health, Text("-")),
            str(endpoint.weight or 1),
            "/".join(part for part in (endpoint.locality.region, endpoint.locality.zone) if part) or "-",
            status.source,
            age(status.age),
            " ".join(f"{key}={value}" for key, value in sorted(endpoint.metadata.items())) or "-",
            _remark(status),
        )
    held = sum(status.held for status in answer.endpoints)
    if not held:
        return Group(title, Text(), shown)
    hint = "The mass removal guard holds endpoints. If they are really gone, run `mesh removals confirm`."
    return Group(title, Text(), shown, Text(), Text(hint, style="yellow"))
