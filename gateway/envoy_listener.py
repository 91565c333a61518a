"""The listener of an Envoy: how it takes requests, which filters they pass, what it answers itself, and its log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gateway import envoy_authentication, envoy_body, envoy_limits, envoy_transcoder
from gateway.envoy_clusters import SERVER_CERTIFICATE, TRACING_CLUSTER, secret_source
from gateway.envoy_routes import CORS_FILTER, NAME, REST_HEADERS_FILTER, REST_STATUS_FILTER
from gateway.envoy_settings import EnvoySettings, split_address
from gateway.envoy_xds import Json, extension, file_source, socket_address
from gateway.http_status import GRPC_STATUS
from gateway.routes import RouteTable
from mesh_client.core.edge_policy import EdgePolicy, Tracing

_BUFFER = 32 << 10
"""Bytes that a connection may have in buffers, but for bodies that are transcoded."""
_MAX_HEADERS = 24
"""KiB of headers that a request may have, with its path. Services are sent the path twice, and what the edge says, for
which `mesh_client.transport.MAX_METADATA` has room."""
_MUTATION = "extensions.filters.http.header_mutation.v3.HeaderMutation"

_MESSAGES = {
    408: "the request did not come in time",
    413: "the body is too large, or the method takes none",
    429: "too many requests; try again later",
    431: "the headers are too large",
    502: "the service gave no valid answer",
    503: "the service cannot be reached",
    504: "the service did not answer in time",
}
"""What is said in place of Envoy's own words, which tell of hosts and connections."""
_MALFORMED = "the request is malformed, has a header with an underscore, or has %%2F, %%5C or %%00 in its path"
_NO_UPGRADE = "the request asks for an upgrade to another protocol, and there is none"
_STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 426, 429, 431, 500, 501, 502, 503, 504)


def listener(
    table: RouteTable, policy: EdgePolicy, settings: EnvoySettings, api_keys: Mapping[str, str], routes: str
) -> Json:
    """The only listener.

    Args:
        table: the routes of exactly the services that the policy exposes.
        policy: of the edge.
        settings: of this Envoy.
        api_keys: values of the keys that the policy names.
        routes: path of the file with the route configuration.

    Raises:
        SettingsError: a key that the policy names cannot be used.
    """
    chain: Json = {"filters": [_connection_manager(table, policy, settings, api_keys, routes)]}
    if settings.downstream_tls is not None:
        common: Json = {
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificate_sds_secret_configs": [secret_source(settings, SERVER_CERTIFICATE)],
        }
        context = "extensions.transport_sockets.tls.v3.DownstreamTlsContext"
        chain["transport_socket"] = extension("tls", context, common_tls_context=common)
    return {
        "name": NAME,
        "address": socket_address(*split_address(settings.listen)),
        "per_connection_buffer_limit_bytes": _BUFFER,
        "filter_chains": [chain],
    }


def _connection_manager(
    table: RouteTable, policy: EdgePolicy, settings: EnvoySettings, api_keys: Mapping[str, str], routes: str
) -> Json:
    config: Json = {
        "stat_prefix": NAME,
        "codec_type": "AUTO",
        "rds": {"route_config_name": NAME, "config_source": file_source(routes)},
        "http_filters": list(_filters(table, policy, api_keys)),
        "early_header_mutation_extensions": [envoy_authentication.sanitizer()],
        # Whom the edge trusts, and what it makes of paths, before any route is looked for.
        "use_remote_address": True,
        "xff_num_trusted_hops": settings.trusted_hops,
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "strip_any_host_port": True,
        "max_request_headers_kb": _MAX_HEADERS,
        "common_http_protocol_options": {
            "headers_with_underscores_action": "REJECT_REQUEST",
            "idle_timeout": "3600s",
            "max_headers_count": 100,
        },
        # Trailers carry the status of streams that have begun.
        "http_protocol_options": {"enable_trailers": True},
        "http2_protocol_options": {
            "max_concurrent_streams": 1_000,
            "initial_stream_window_size": 64 << 10,
            "initial_connection_window_size": 1 << 20,
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        },
        "request_headers_timeout": "10s",
        "server_header_transformation": "PASS_THROUGH",
        "generate_request_id": policy.correlation_id,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": policy.correlation_id,
        "local_reply_config": {"mappers": list(_local_replies())},
    }
    if policy.tracing is not None:
        config["tracing"] = _tracing(policy.edge, policy.tracing)
    if policy.access_log:
        config["access_log"] = [_access_log()]
    manager = "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
    return extension("envoy.filters.network.http_connection_manager", manager, **config)


def _filters(table: RouteTable, policy: EdgePolicy, api_keys: Mapping[str, str]) -> Iterator[Json]:
    """In the order of requests; answers pass them in the opposite one."""
    if policy.cors is not None:
        yield extension(CORS_FILTER, "extensions.filters.http.cors.v3.Cors")
    yield extension(REST_HEADERS_FILTER, _MUTATION)
    yield from envoy_authentication.filters(policy, api_keys)
    yield from envoy_limits.filters(table, policy)
    yield envoy_body.body_filter()
    yield {"name": envoy_transcoder.FILTER, "typed_config": envoy_transcoder.nothing()}
    yield extension(REST_STATUS_FILTER, _MUTATION)
    router = "extensions.filters.http.router.v3.Router"
    yield extension("envoy.filters.http.router", router, suppress_envoy_headers=True)


def _local_replies() -> Iterator[Json]:
    """What Envoy answers itself, as google.rpc.Status in JSON; to callers by gRPC as their status."""
    # As Envoy has it, which makes these answers gRPC's.
    grpc = _header("content-type", {"string_match": {"safe_regex": {"regex": "application/grpc(?:[+].*)?"}}})
    transcoded = _header("x-envoy-original-path", {"present_match": True, "invert_match": True})
    plain: Json = {"text_format_source": {"inline_string": "%LOCAL_REPLY_BODY%"}}
    for status, message in sorted(_MESSAGES.items()):
        said: Json = {"text_format_source": {"inline_string": message}}
        yield {"filter": _all(grpc, transcoded, _status(status)), "body_format_override": said}
    # A token for somebody else is no token (RFC 6750, section 3.1).
    for_others = _all(_status(403), _details("jwt_authn_access_denied"))
    yield {"filter": _all(grpc, transcoded, for_others), "status_code": 401, "body_format_override": plain}
    yield {"filter": _all(grpc, transcoded), "body_format_override": plain}
    # What is refused before Envoy has written its own headers has no message, or one about HTTP's grammar.
    early = _header("x-forwarded-proto", {"present_match": True, "invert_match": True})
    yield {"filter": _all(early, _status(400)), "body_format_override": _json(3, _MALFORMED)}
    yield {"filter": for_others, "status_code": 401, "body_format_override": _json(16, "%LOCAL_REPLY_BODY%")}
    upgrade = _all(_status(403), _details("upgrade_failed"))
    yield {"filter": upgrade, "status_code": 400, "body_format_override": _json(3, _NO_UPGRADE)}
    for status in _STATUSES:
        code = GRPC_STATUS.get(status, 3 if status < 500 else 13)
        yield {
            "filter": _status(status),
            "body_format_override": _json(code, _MESSAGES.get(status, "%LOCAL_REPLY_BODY%")),
        }


def _json(code: int, message: str) -> Json:
    return {"json_format": {"code": code, "message": message}, "content_type": "application/json"}


def _all(*filters: Json) -> Json:
    return {"and_filter": {"filters": list(filters)}}


def _status(status: int) -> Json:
    value = {"default_value": status, "runtime_key": "edge.unused"}
    return {"status_code_filter": {"comparison": {"op": "EQ", "value": value}}}


def _details(prefix: str) -> Json:
    """By why Envoy answers itself."""
    expression = f"response.code_details.startsWith('{prefix}')"
    cel = "extensions.access_loggers.filters.cel.v3.ExpressionFilter"
    return {"extension_filter": extension("envoy.access_loggers.extension_filters.cel", cel, expression=expression)}


def _header(name: str, match: Json) -> Json:
    return {"header_filter": {"header": {"name": name, **match}}}


def _tracing(edge: str, tracing: Tracing) -> Json:
    provider = extension(
        "envoy.tracers.opentelemetry",
        "config.trace.v3.OpenTelemetryConfig",
        http_service={"http_uri": {"uri": tracing.endpoint, "cluster": TRACING_CLUSTER, "timeout": "5s"}},
        service_name=edge,
    )
    return {
        "provider": provider,
        "random_sampling": {"value": tracing.sampled_percent},
        "spawn_upstream_span": True,
    }


def _access_log() -> Json:
    """One line for each request, without its query, body and credentials."""
    fields = {
        "time": "%START_TIME%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "trace_id": "%TRACE_ID%",
        "consumer": f"%REQ({envoy_authentication.CONSUMER_HEADER})%",
        "client": "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "method": "%REQ(X-ENVOY-ORIGINAL-METHOD?:METHOD)%",
        "path": "%PATH(NQ:ORIG_OR_PATH)%",
        "protocol": "%PROTOCOL%",
        "route": "%ROUTE_NAME%",
        "status": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS_NUMBER%",
        "reason": "%RESPONSE_CODE_DETAILS%",
        "flags": "%RESPONSE_FLAGS%",
        "endpoint": "%UPSTREAM_HOST%",
        "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
        "bytes_in": "%BYTES_RECEIVED%",
        "bytes_out": "%BYTES_SENT%",
        "milliseconds": "%DURATION%",
    }
    return extension(
        "envoy.access_loggers.stdout",
        "extensions.access_loggers.stream.v3.StdoutAccessLog",
        log_format={"json_format": fields},
    )
