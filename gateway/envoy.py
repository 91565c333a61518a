"""From routes, an edge policy and endpoints to the files of an Envoy, all of which but one it follows while it runs.

The bootstrap file names the others; it is the same for as long as the settings are. Everything else is filesystem xDS:
replace a file by renaming another one over it, and Envoy applies it without a restart and without losing a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway import exposed
from gateway.descriptors import Method
from gateway.envoy_clusters import clusters, has_names, load_assignment, secrets
from gateway.envoy_listener import listener
from gateway.envoy_routes import NAME, route_configuration
from gateway.envoy_settings import EnvoySettings, socket_path, split_address
from gateway.envoy_xds import (
    CLUSTER,
    ENDPOINTS,
    LISTENER,
    ROUTES,
    SECRET,
    Json,
    XdsFile,
    extension,
    file_source,
    socket_address,
    write,
    xds_file,
)
from gateway.errors import SettingsError
from gateway.routes import RouteTable
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.model import Endpoint

BOOTSTRAP = "bootstrap.json"

_RUNTIME: Json = {
    # Envoy refuses regular expressions of more than 100 instructions, which a path of some segments has.
    "re2.max_program_size.error_level": 100_000,
    "re2.max_program_size.warn_level": 100_000,
}


@dataclass(frozen=True, slots=True)
class EnvoyConfiguration:
    """What an Envoy is given."""

    files: Mapping[str, str]
    """Contents by name below the settings' directory, in the order in which they are written: what a file names is
    there before it. Some hold API keys: all are written with mode 0600."""
    versions: Mapping[str, str]
    """What Envoy's statistics show once it has applied all of them: text readouts by name."""


def render(
    table: RouteTable,
    policy: EdgePolicy,
    endpoints: Mapping[str, Sequence[Endpoint]],
    settings: EnvoySettings,
    *,
    api_keys: Mapping[str, str],
    openapi: str,
) -> EnvoyConfiguration:
    """Renders what the policy exposes. The same input gives the same text.

    Args:
        table: the routes of exactly the services that the policy exposes.
        policy: of the edge.
        endpoints: of the services that the policy calls, by their names; a service without any answers with 503.
        settings: of this Envoy.
        api_keys: values of the keys that the policy names.
        openapi: the OpenAPI document as JSON, served at ``/openapi.json``.

    Raises:
        SettingsError: the policy does not fit the protos, a key is missing, or Envoy cannot serve an annotation.
    """
    exposed.check(table, policy)
    _check(table)
    directory = settings.directory
    files: dict[str, XdsFile] = {
        f"sds/{secret['name']}.json": xds_file(SECRET, [secret]) for secret in secrets(settings)
    }
    versions = {f"sds.{secret['name']}.version_text": f"sds/{secret['name']}.json" for secret in secrets(settings)}
    for upstream in policy.upstreams:
        found = endpoints.get(upstream, ())
        if not has_names(found):
            files[f"eds/{upstream}.json"] = xds_file(ENDPOINTS, [load_assignment(upstream, found)])
            versions[f"cluster.{upstream}.version_text"] = f"eds/{upstream}.json"
    files["cds.json"] = xds_file(CLUSTER, clusters(policy, endpoints, settings))
    files["rds.json"] = xds_file(ROUTES, [route_configuration(table, policy, openapi)])
    files["lds.json"] = xds_file(LISTENER, [listener(table, policy, settings, api_keys, f"{directory}/rds.json")])
    versions |= {
        "cluster_manager.cds.version_text": "cds.json",
        f"http.{NAME}.rds.{NAME}.version_text": "rds.json",
        "listener_manager.lds.version_text": "lds.json",
    }
    return EnvoyConfiguration(
        {name: file.text for name, file in files.items()} | {BOOTSTRAP: _bootstrap(policy.edge, settings)},
        {stat: files[name].version for stat, name in versions.items()},
    )


def _check(table: RouteTable) -> None:
    for route in table.routes:
        where, response = route.method.full_name, route.response_body
        if response and _response_type(route.method, response) != "google.api.HttpBody":
            raise SettingsError(
                f"{where}: Envoy cannot answer with the field {response} alone; remove response_body, or give the "
                "field the type google.api.HttpBody"
            )
        if any("%" in segment for segment in route.template.segments if isinstance(segment, str)):
            raise SettingsError(f"{where}: Envoy decodes paths, so {route} would match nothing; write it without %")


def _response_type(method: Method, field: str) -> str:
    message = method.output.fields_by_name[field].message_type
    return message.full_name if message is not None else ""


def _bootstrap(edge: str, settings: EnvoySettings) -> str:
    """What Envoy is started with. It must not change while Envoy runs."""
    path = socket_path(settings.admin)
    admin: Json = (
        socket_address(*split_address(settings.admin)) if path is None else {"pipe": {"path": path, "mode": 0o600}}
    )
    monitor = "extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
    connections = extension(
        "envoy.resource_monitors.global_downstream_max_connections",
        monitor,
        max_active_downstream_connections=settings.max_connections,
    )
    return write(
        {
            "node": {"id": edge, "cluster": edge},
            "admin": {"address": admin},
            "dynamic_resources": {
                "lds_config": file_source(f"{settings.directory}/lds.json"),
                "cds_config": file_source(f"{settings.directory}/cds.json"),
            },
            "overload_manager": {"resource_monitors": [connections]},
            "layered_runtime": {"layers": [{"name": "edge", "static_layer": _RUNTIME}]},
        }
    )
