"""From routes, an edge policy and endpoints to the files of an Envoy, all of which but one it follows while it runs.

The bootstrap file names the others; it is the same for as long as the settings are. Everything else is filesystem xDS:
replace a file by renaming another one over it, and Envoy applies it without a restart and without losing a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway import exposed
from gateway.descriptors import Method
from gateway.envoy_clusters import SERVER_CERTIFICATE, clusters, has_names, load_assignment, secrets
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


class EnvoyRenderer:
    """Renders what one policy exposes, again for each change of endpoints. The same input gives the same text."""

    def __init__(
        self,
        table: RouteTable,
        policy: EdgePolicy,
        settings: EnvoySettings,
        *,
        api_keys: Mapping[str, str],
        openapi: str,
    ) -> None:
        """Renders everything but endpoints, once.

        Args:
            table: the routes of exactly the services that the policy exposes.
            policy: of the edge.
            settings: of this Envoy.
            api_keys: values of the keys that the policy names.
            openapi: the OpenAPI document as JSON, served at ``/openapi.json``.

        Raises:
            SettingsError: the policy does not fit the protos, a key is missing, or Envoy cannot serve an annotation.
        """
        exposed.check(table, policy)
        _check(table)
        self._policy = policy
        self._settings = settings
        self._secrets = {str(secret["name"]): xds_file(SECRET, [secret]) for secret in secrets(settings)}
        self._routes = xds_file(ROUTES, [route_configuration(table, policy, openapi)])
        routes = f"{settings.directory}/rds.json"
        self._listeners = xds_file(LISTENER, [listener(table, policy, settings, api_keys, routes)])

    def render(self, endpoints: Mapping[str, Sequence[Endpoint]]) -> EnvoyConfiguration:
        """The files.

        Args:
            endpoints: of the services that the policy calls, by their names; a service without any answers with 503.

        Raises:
            SettingsError: the collector of spans has no address that Envoy understands.
        """
        files: dict[str, XdsFile] = {}
        shown_by: dict[str, str] = {}

        def add(name: str, file: XdsFile, statistic: str) -> None:
            files[name] = file
            shown_by[f"{statistic}.version_text"] = file.version

        for name, file in self._secrets.items():
            add(f"sds/{name}.json", file, f"sds.{name}")
            if name != SERVER_CERTIFICATE and not self._policy.upstreams:
                del shown_by[f"sds.{name}.version_text"]  # Envoy reads no secrets that nothing needs
        for upstream in self._policy.upstreams:
            found = endpoints.get(upstream, ())
            if not has_names(found):
                assignment = xds_file(ENDPOINTS, [load_assignment(upstream, found)])
                add(f"eds/{upstream}.json", assignment, f"cluster.{upstream}")
        made = xds_file(CLUSTER, clusters(self._policy, endpoints, self._settings))
        add("cds.json", made, "cluster_manager.cds")
        add("rds.json", self._routes, f"http.{NAME}.rds.{NAME}")
        add("lds.json", self._listeners, "listener_manager.lds")
        texts = {name: file.text for name, file in files.items()}
        return EnvoyConfiguration(texts | {BOOTSTRAP: _bootstrap(self._policy.edge, self._settings)}, shown_by)


def render(
    table: RouteTable,
    policy: EdgePolicy,
    endpoints: Mapping[str, Sequence[Endpoint]],
    settings: EnvoySettings,
    *,
    api_keys: Mapping[str, str],
    openapi: str,
) -> EnvoyConfiguration:
    """Renders once what `EnvoyRenderer` renders again and again; its arguments and errors."""
    return EnvoyRenderer(table, policy, settings, api_keys=api_keys, openapi=openapi).render(endpoints)


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
