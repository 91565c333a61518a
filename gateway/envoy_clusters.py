"""The clusters of an Envoy, one for each service of the mesh that is called, with their endpoints and certificates."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence

from gateway.envoy_settings import EnvoySettings, UpstreamTls
from gateway.envoy_xds import Json, extension, file_source, socket_address, typed
from gateway.errors import SettingsError
from mesh_client.core.edge_policy import EdgePolicy, Tracing
from mesh_client.core.identity import Principal
from mesh_client.core.model import Endpoint, Health
from mesh_client.core.policy_base import format_duration

TRACING_CLUSTER = "tracing.collector"
"""With a dot, which names of services do not have."""
CLIENT_CERTIFICATE = "client_certificate"
SERVER_CERTIFICATE = "server_certificate"
ROOTS = "roots"

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_TLS = "extensions.transport_sockets.tls.v3."
_URL = re.compile(r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[^/:?#@\s]+)(?::(?P<port>\d{1,5}))?(?:[/?#].*)?")
_HEALTH = {Health.UNHEALTHY: "UNHEALTHY", Health.DRAINING: "DRAINING"}


def endpoints_path(directory: str, upstream: str) -> str:
    """The file with a cluster's endpoints."""
    return f"{directory}/eds/{upstream}.json"


def secret_path(directory: str, name: str) -> str:
    """The file with a secret, which is one that names the files with certificates."""
    return f"{directory}/sds/{name}.json"


def secret_source(settings: EnvoySettings, name: str) -> Json:
    """Where a secret comes from."""
    return {"name": name, "sds_config": file_source(secret_path(settings.directory, name))}


def clusters(
    policy: EdgePolicy, endpoints: Mapping[str, Sequence[Endpoint]], settings: EnvoySettings
) -> Iterator[Json]:
    """A cluster for each service that the policy calls, and one for the collector of spans."""
    for upstream in policy.upstreams:
        services = [service for service in policy.services.values() if service.upstream == upstream]
        connect_timeout = max(service.connect_timeout for service in services)
        yield _cluster(upstream, connect_timeout, endpoints.get(upstream, ()), settings)
    if policy.tracing is not None:
        yield _collector(policy.tracing)


def has_names(endpoints: Sequence[Endpoint]) -> bool:
    """Whether any endpoint is at a host's name, which Envoy does not look up for endpoints that it discovers."""
    return not all(_is_ip(endpoint.address) for endpoint in endpoints)


def load_assignment(upstream: str, endpoints: Sequence[Endpoint]) -> Json:
    """The endpoints of one cluster, in the order of their ids."""
    hosts = [_host(endpoint) for endpoint in sorted(endpoints, key=lambda endpoint: endpoint.id)]
    return {"cluster_name": upstream, "endpoints": [{"lb_endpoints": hosts}] if hosts else []}


def secrets(settings: EnvoySettings) -> Iterator[Json]:
    """Certificates by the files that they are in; Envoy reads them again when one is renamed into their directory."""
    upstream, downstream = settings.upstream_tls, settings.downstream_tls
    for name, pair in ((CLIENT_CERTIFICATE, upstream), (SERVER_CERTIFICATE, downstream)):
        if pair is not None:
            yield {
                "name": name,
                "tls_certificate": {
                    "certificate_chain": {"filename": pair.certificate},
                    "private_key": {"filename": pair.key},
                    "watched_directory": {"path": pair.directory},
                },
            }
    if upstream is not None:
        yield {
            "name": ROOTS,
            "validation_context": {
                "trusted_ca": {"filename": upstream.roots},
                "watched_directory": {"path": upstream.roots_directory},
            },
        }


def _cluster(upstream: str, connect_timeout: float, endpoints: Sequence[Endpoint], settings: EnvoySettings) -> Json:
    cluster: Json = {
        "name": upstream,
        "connect_timeout": format_duration(connect_timeout),
        **_discovery(upstream, endpoints, settings),
        "lb_policy": "LEAST_REQUEST",
        # What the mesh says is gone is gone, and what it has not said yet is noticed by failures.
        "ignore_health_on_host_removal": True,
        "outlier_detection": _outlier_detection(),
        "circuit_breakers": {"thresholds": [_limits()]},
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: typed(
                _HTTP_OPTIONS.removeprefix("envoy."),
                explicit_http_config={
                    "http2_protocol_options": {
                        # As the mesh's own clients do; its servers allow a ping each 5 s.
                        "connection_keepalive": {"interval": "10s", "timeout": "5s"},
                        # Callers share connections, and so HPACK's table. A gRPC server keeps in it that a header was
                        # malformed, and refuses other callers' headers for that. So nothing is in the table.
                        "hpack_table_size": 0,
                    }
                },
            )
        },
    }
    if settings.upstream_tls is not None:
        cluster["transport_socket"] = _mutual_tls(upstream, settings, settings.upstream_tls)
    return cluster


def _discovery(upstream: str, endpoints: Sequence[Endpoint], settings: EnvoySettings) -> Json:
    if has_names(endpoints):
        assignment = load_assignment(upstream, endpoints)
        return {"type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED", "load_assignment": assignment}
    source = file_source(endpoints_path(settings.directory, upstream))
    return {"type": "EDS", "eds_cluster_config": {"eds_config": source}}


def _outlier_detection() -> Json:
    """As the mesh's own clients: refused connections and UNAVAILABLE in a row; errors of the application never."""
    return {
        "consecutive_gateway_failure": 5,
        "enforcing_consecutive_gateway_failure": 100,
        "consecutive_local_origin_failure": 5,
        "enforcing_consecutive_local_origin_failure": 100,
        "split_external_local_origin_errors": True,
        "enforcing_consecutive_5xx": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "base_ejection_time": "30s",
        "max_ejection_percent": 10,
        "always_eject_one_host": True,
    }


def _limits() -> Json:
    """Beyond what one process can have, for limits are the policy's and the services' own. Retries have the mesh's."""
    most = 1_000_000
    return {
        "max_connections": most,
        "max_pending_requests": most,
        "max_requests": most,
        "retry_budget": {"budget_percent": {"value": 20.0}, "min_retry_concurrency": 10},
    }


def _mutual_tls(upstream: str, settings: EnvoySettings, tls: UpstreamTls) -> Json:
    """By the names of the mesh: the server must have exactly the one of the service."""
    name = Principal.service(tls.trust_domain, upstream).dns_name
    common: Json = {
        "tls_certificate_sds_secret_configs": [secret_source(settings, CLIENT_CERTIFICATE)],
        "combined_validation_context": {
            "default_validation_context": {
                "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": name}}]
            },
            "validation_context_sds_secret_config": secret_source(settings, ROOTS),
        },
    }
    return extension("tls", _TLS + "UpstreamTlsContext", common_tls_context=common, sni=name)


def _collector(tracing: Tracing) -> Json:
    match = _URL.fullmatch(tracing.endpoint)
    if match is None:
        raise SettingsError("tracing.endpoint: expected http(s)://host:port/path")
    secure, host = match["scheme"] == "https", match["host"].strip("[]")
    port = int(match["port"] or (443 if secure else 80))
    address = {"endpoint": {"address": socket_address(host, port)}}
    cluster: Json = {
        "name": TRACING_CLUSTER,
        "connect_timeout": "1s",
        "type": "STATIC" if _is_ip(host) else "STRICT_DNS",
        "dns_lookup_family": "V4_PREFERRED",
        "load_assignment": {"cluster_name": TRACING_CLUSTER, "endpoints": [{"lb_endpoints": [address]}]},
    }
    if secure:
        common: Json = {"validation_context": {"system_root_certs": {}}}
        cluster["transport_socket"] = extension(
            "tls", _TLS + "UpstreamTlsContext", common_tls_context=common, sni=host, auto_sni_san_validation=True
        )
    return cluster


def _host(endpoint: Endpoint) -> Json:
    host: Json = {
        "endpoint": {"address": socket_address(endpoint.address, endpoint.port)},
        "load_balancing_weight": endpoint.weight,
    }
    if endpoint.health in _HEALTH:
        host["health_status"] = _HEALTH[endpoint.health]
    return host


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
