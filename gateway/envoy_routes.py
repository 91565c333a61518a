"""The routes of an Envoy: one for each binding and each method, with its own limits, and answers for all else.

The table decides which method a path means: REST routes come in its order, by regular expressions that match exactly
what its templates match. What none of them matches is answered here, before anything is transcoded or forwarded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from google.protobuf.descriptor import FieldDescriptor

from gateway import envoy_authentication, envoy_body, envoy_limits, envoy_transcoder
from gateway.allowed_methods import allowed_methods
from gateway.descriptors import Method
from gateway.envoy_xds import Json, cel_text, typed
from gateway.escapes import text_regex
from gateway.exposed import OPENAPI_PATH
from gateway.path_template import PathTemplate, Wildcard
from gateway.routes import Route, RouteTable
from mesh_client.core.edge_policy import Cors, EdgePolicy, ExposedService, MethodSettings
from mesh_client.core.policy_base import format_duration

NAME = "edge"

REST_HEADERS_FILTER = "rest_headers"
REST_STATUS_FILTER = "rest_status"
CORS_FILTER = "envoy.filters.http.cors"

_MUTATION = "extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute"

_RETRY_ON = "connect-failure,refused-stream,reset-before-request,unavailable"
"""What happens before there is any answer. UNAVAILABLE is what mesh clients try again, too."""
_STREAM_RETRY_ON = "connect-failure,refused-stream,reset-before-request"
_SLOW_CALLER = 5.0
"""Seconds of silence, beyond a call's timeout, after which a caller that has not sent its whole request is given up."""

_NOTHING = "no method has this path"
_GRPC: list[Json] = [
    {"name": "content-type", "string_match": {"prefix": "application/grpc"}},  # of most requests not even this is true
    {"name": "content-type", "string_match": {"safe_regex": {"regex": "application/grpc(?:[+;].*)?"}}},
]


def route_configuration(table: RouteTable, policy: EdgePolicy, openapi: str) -> Json:
    """The route configuration.

    Args:
        table: the routes of exactly the services that the policy exposes.
        policy: of the edge.
        openapi: what is answered at `OPENAPI_PATH`.
    """
    routes = [
        _not_text(),
        _openapi(openapi),
        # What is gRPC's ends here, so that no route after it has to look.
        *_native(table, policy),
        _answer({"prefix": "/", "headers": _GRPC}, 404, _NOTHING),
        _other_method({"path": OPENAPI_PATH}, ("GET",)),
        *_rest(table, policy),
    ]
    allowed = allowed_methods(table)
    if policy.cors is not None and table.routes:
        cluster = policy.services[table.routes[0].method.service].upstream
        routes += [_preflight(item.template, cluster) for item in allowed]
    routes += [_other_method(_path(item.template), item.verbs) for item in allowed]
    routes.append(_answer({"prefix": "/"}, 404, _NOTHING))
    host: Json = {"name": NAME, "domains": ["*"], "routes": routes}
    if policy.cors is not None:
        host["typed_per_filter_config"] = {CORS_FILTER: _cors(table, policy.cors)}
        host["response_headers_to_add"] = list(_cors_headers(policy.cors))
    return {
        "name": NAME,
        "virtual_hosts": [host],
        "max_direct_response_body_size_bytes": max(4_096, len(openapi.encode())),
    }


def _rest(table: RouteTable, policy: EdgePolicy) -> Iterator[Json]:
    for route in table.routes:
        method = route.method
        service = policy.services[method.service]
        settings = service.settings(method.name, streams=method.streams)
        match: Json = {**_path(route.template), "headers": [_verb(route.verb)]}
        if route.template.variables:
            yield _override(route, match)
        yield {
            "name": route.name,
            "match": match,
            "route": _rest_action(service, settings, method),
            **envoy_body.of_route(route, envoy_transcoder.max_body(route, service.max_body_bytes)),
            "decorator": _operation(method),
            "request_headers_to_add": _deadline(settings, "OVERWRITE_IF_EXISTS_OR_ADD") if not method.streams else [],
            "typed_per_filter_config": {
                **envoy_authentication.of_route(settings),
                **envoy_body.per_filter(route),
                envoy_transcoder.FILTER: envoy_transcoder.transcoder(route, service.max_body_bytes),
                **_rest_headers(),
            },
        }


def _native(table: RouteTable, policy: EdgePolicy) -> Iterator[Json]:
    for name, service in sorted(policy.services.items()):
        if not service.native_grpc:
            continue
        for method in table.api.services[name]:
            settings = service.settings(method.name, streams=method.streams)
            yield {
                "name": f"{method.full_name}~grpc",
                "match": {"path": f"/{name}/{method.name}", "headers": [_verb("POST"), *_GRPC]},
                "route": _native_action(service, settings, method),
                "decorator": _operation(method),
                "request_headers_to_add": _deadline(settings, "ADD_IF_ABSENT") if not method.streams else [],
                "typed_per_filter_config": envoy_authentication.of_route(settings),
            }


def _override(route: Route, match: Json) -> Json:
    """Refuses requests whose query says again what the path says, for to the transcoder the query's word is the last.

    A service that decides by the message would decide about another thing than whoever decided by the path.
    """
    names = "|".join(query_names(route.fields_along(variable)) for variable in route.template.variables)
    headers: list[Json] = [
        _verb(route.verb),
        {"name": ":path", "string_match": {"contains": "?"}},  # most requests have none, and this is quick
        # Names are decoded by the transcoder, and none of a field has to be encoded.
        {"name": ":path", "string_match": {"safe_regex": {"regex": f"[^?]*[?](?:.*&)?(?:[^=&]*%[^=&]*|{names})=.*"}}},
    ]
    shown = ", ".join(variable.name for variable in route.template.variables)
    return _answer(
        {**match, "headers": headers}, 400, f"leave out of the query what the path says ({shown}), and % in its names"
    )


def query_names(fields: Sequence[FieldDescriptor]) -> str:
    """A regular expression of all names that the transcoder takes for a field: in the proto and in JSON.

    Args:
        fields: the fields along its path.
    """
    either = ("|".join(map(_literal, sorted({field.name, field.json_name}))) for field in fields)
    return "[.]".join(f"(?:{names})" for names in either)


def _literal(name: str) -> str:
    return "".join(
        letter if letter.isalnum() or letter == "_" or not letter.isascii() else f"\\x{ord(letter):02x}"
        for letter in name
    )


def _path(template: PathTemplate) -> Json:
    if any(isinstance(segment, Wildcard) for segment in template.segments):
        return {"safe_regex": {"regex": template.regex()}}
    return {"path": str(PathTemplate(template.segments, (), template.verb))}


def _verb(verb: str) -> Json:
    return {"name": ":method", "string_match": {"exact": verb}}


def _operation(method: Method) -> Json:
    """The name of the spans."""
    return {"operation": f"{method.service}/{method.name}", "propagate": False}


def _rest_action(service: ExposedService, settings: MethodSettings, method: Method) -> Json:
    if method.streams:
        timeouts: Json = {"timeout": "0s", "idle_timeout": format_duration(settings.timeout)}
    else:
        idle = format_duration(settings.timeout + _SLOW_CALLER)
        timeouts = {"timeout": format_duration(settings.timeout), "idle_timeout": idle}
    return {"cluster": service.upstream, **timeouts, **_forwarding(settings, method)}


def _native_action(service: ExposedService, settings: MethodSettings, method: Method) -> Json:
    """Of gRPC's own timeouts, since Envoy's other ones end calls with UNAVAILABLE."""
    timeout = format_duration(settings.timeout)
    if method.streams:
        callers: Json = {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"}
        timeouts: Json = {"idle_timeout": timeout, "max_stream_duration": callers}
    else:
        timeouts = {"max_stream_duration": {"max_stream_duration": timeout, "grpc_timeout_header_max": timeout}}
    return {"cluster": service.upstream, "timeout": "0s", **timeouts, **_forwarding(settings, method)}


def _forwarding(settings: MethodSettings, method: Method) -> Json:
    return {**_retries(settings, method), "rate_limits": envoy_limits.of_route(method.full_name, settings)}


def _retries(settings: MethodSettings, method: Method) -> Json:
    if not settings.retries:
        return {}
    previous = "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    return {
        "retry_policy": {
            "retry_on": _STREAM_RETRY_ON if method.client_streaming else _RETRY_ON,
            "num_retries": settings.retries,
            "retry_host_predicate": [{"name": "previous_hosts", "typed_config": typed(previous)}],
            # Hosts are drawn, and drawn again if they were tried before: of two, with 5 draws each 64th try goes wrong.
            "host_selection_retry_max_attempts": 30,
        }
    }


def _deadline(settings: MethodSettings, action: str) -> list[Json]:
    """What services are told of the timeout, so that they stop and pass it on."""
    value = f"{max(1, round(settings.timeout * 1_000))}m"
    return [{"header": {"key": "grpc-timeout", "value": value}, "append_action": action}]


def _rest_headers() -> Json:
    """What is gRPC's own means nothing in requests by REST, and in answers is of no use.

    Details of errors are dropped: with one of a type that the transcoder does not know, it would answer with no body.
    They also tell the outside what was meant for colleagues.
    """
    requests = [{"remove_on_match": {"key_matcher": matcher}} for matcher in ({"prefix": "grpc-"}, {"suffix": "-bin"})]
    status = [{"remove": "grpc-status-details-bin"}]
    answers = [{"remove": name} for name in ("grpc-status", "grpc-message", "grpc-encoding", "grpc-accept-encoding")]
    return {
        REST_HEADERS_FILTER: typed(_MUTATION, mutations={"request_mutations": requests, "response_mutations": answers}),
        REST_STATUS_FILTER: typed(
            _MUTATION, mutations={"response_mutations": status, "response_trailers_mutations": status}
        ),
    }


def _not_text() -> Json:
    """What services could not read as text, and Python's protobuf fails to."""
    path = {"name": ":path", "string_match": {"safe_regex": {"regex": text_regex()}}, "invert_match": True}
    return _answer({"prefix": "/", "headers": [path]}, 400, "what is escaped by % in the path or query is not UTF-8")


def _openapi(document: str) -> Json:
    header = {"key": "content-type", "value": "application/json"}
    return {
        "name": "openapi",
        "match": {"path": OPENAPI_PATH, "headers": [_verb("GET")]},
        "direct_response": {"status": 200, "body": {"inline_string": document}},
        "response_headers_to_add": [{"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}],
    }


def _preflight(template: PathTemplate, cluster: str) -> Json:
    """Where the CORS filter answers preflights, and lets none pass: it does so for routes that forward alone."""
    present = [{"name": name, "present_match": True} for name in ("origin", "access-control-request-method")]
    return {"match": {**_path(template), "headers": [_verb("OPTIONS"), *present]}, "route": {"cluster": cluster}}


def _other_method(path: Json, verbs: tuple[str, ...]) -> Json:
    allowed = ", ".join(verbs)
    answer = _answer(path, 405, f"this path has the methods {allowed}")
    return {**answer, "response_headers_to_add": [{"header": {"key": "allow", "value": allowed}}]}


def _answer(match: Json, status: int, message: str) -> Json:
    return {"match": match, "direct_response": {"status": status, "body": {"inline_string": message}}}


def _cors_headers(cors: Cors) -> Iterator[Json]:
    """What the CORS filter says to pages, where Envoy answers itself by a route: the filter passes such answers by."""
    origins = ", ".join(map(cel_text, cors.origins))
    allowed = "true" if "*" in cors.origins else f"request.headers['origin'] in [{origins}]"
    values = {
        "access-control-allow-origin": "request.headers['origin']",
        "access-control-allow-credentials": "'true'" if cors.credentials else "",
        "access-control-expose-headers": cel_text(", ".join(cors.exposed_headers)) if cors.exposed_headers else "",
    }
    for name, value in values.items():
        if value:
            header = {"key": name, "value": f"%CEL('origin' in request.headers && {allowed} ? {value} : '')%"}
            yield {"header": header, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _cors(table: RouteTable, cors: Cors) -> Json:
    origins: list[Json] = [
        {"safe_regex": {"regex": ".*"}} if origin == "*" else {"exact": origin} for origin in cors.origins
    ]
    return typed(
        "extensions.filters.http.cors.v3.CorsPolicy",
        allow_origin_string_match=origins,
        allow_methods=", ".join(sorted({route.verb for route in table.routes})),
        allow_headers=", ".join(cors.headers),
        expose_headers=", ".join(cors.exposed_headers),
        max_age=f"{cors.max_age:.0f}",
        allow_credentials=cors.credentials,
        forward_not_matching_preflights=False,
    )
