"""`mesh dashboard`: a link that opens the control plane's dashboard as the operator who runs the command."""

from __future__ import annotations

import grpc
from mesh.v1 import operations_pb2 as pb

from mesh_cli.client import RefusedError
from mesh_cli.options import DEFAULT_CONTROL_PLANE, AsJson, ControlPlane, Insecure, Operator, Timeout, connect
from mesh_cli.output import Failure, age, console, printable, reports_errors, to_json, write_error, write_json

_SAID = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED)


@reports_errors
def dashboard(
    as_json: AsJson = False,
    control_plane: ControlPlane = DEFAULT_CONTROL_PLANE,
    timeout: Timeout = 10.0,
    operator: Operator = None,
    insecure: Insecure = False,
) -> None:
    """Write a link that opens the dashboard in a browser and signs it in as you, once, within a minute.

    Exit code 1 when the control plane has no dashboard: start it with --dashboard-listen.
    """
    with connect(control_plane, timeout, operator, insecure=insecure) as client:
        try:
            answer = client.call(client.operations.CreateDashboardLink, pb.CreateDashboardLinkRequest())
        except RefusedError as error:
            if error.code not in _SAID:
                raise
            write_error(error.details)
            raise Failure from None
    if as_json:
        write_json(to_json(answer))
        return
    console().print(printable(answer.url), soft_wrap=True)
    if answer.HasField("valid"):
        note = f"Good once, for {age(answer.valid)}. Whoever opens it is you for {age(answer.session)}."
        console(stderr=True).print(note, soft_wrap=True)
