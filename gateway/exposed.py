"""Whether an edge policy fits the protos that it exposes. The control plane cannot know; whoever has the protos can."""

from __future__ import annotations

from gateway.errors import SettingsError
from gateway.routes import RouteTable
from mesh_client.core.edge_policy import EdgePolicy

OPENAPI_PATH = "/openapi.json"
"""Where an edge serves the description of what it exposes."""


def check(table: RouteTable, policy: EdgePolicy) -> None:
    """Holds the policy against the table.

    Raises:
        SettingsError: it names a service or a method that the protos do not have, exposes a service in no way, or the
            table has routes of a service that is not exposed.
    """
    api = table.api
    for name, service in policy.services.items():
        if name not in api.services:
            raise SettingsError(f"services.{name}: no such service; there are {', '.join(api.services) or 'none'}")
        methods = {method.name for method in api.services[name]}
        for method in service.methods:
            if method not in methods:
                raise SettingsError(f"services.{name}.methods.{method}: it has no such method")
        if not service.native_grpc and not table.of(name):
            raise SettingsError(f"services.{name}: no method is annotated, and native_grpc is off: nothing to expose")
    for route in table.routes:
        if route.method.service not in policy.services:
            raise SettingsError(f"{route.method.service} has routes and is not exposed; build the table without it")
