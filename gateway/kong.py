"""From routes and an edge policy to a Kong that needs no database: ``kong.yml`` and the protos that it names.

What this renders takes Kong's word for nothing: Kong accepts configuration that then fails each request. Each REST
route is a route of Kong's own, by a regular expression that matches exactly what its template matches: a path that no
method has is a 404 before anything is transcoded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from gateway import exposed, kong_lua, kong_proto
from gateway.descriptors import Method
from gateway.errors import SettingsError
from gateway.exposed import OPENAPI_PATH
from gateway.lint import Finding, for_kong, refuse_errors
from gateway.path_template import escape
from gateway.routes import Route, RouteTable
from gateway.settings import ClientCertificate, KongSettings, Upstream
from mesh_client.core.edge_policy import Authentication, EdgePolicy, ExposedService, MethodSettings

Entity = dict[str, object]

KONG_CONF = """\
database = off
router_flavor = traditional_compatible
untrusted_lua_sandbox_requires = cjson.safe
nginx_proxy_grpc_ssl_verify = on
nginx_proxy_grpc_ssl_trusted_certificate = /usr/local/kong/mesh-roots.pem
"""
"""What kong.conf must say for the rendered configuration; the last two when services are called over TLS."""

_HTTP = ["http", "https"]
_GRPC = ["grpc", "grpcs"]


@dataclass(frozen=True, slots=True)
class KongConfiguration:
    """What Kong is given."""

    declarative: str
    """``kong.yml``."""
    protos: tuple[kong_proto.KongProto, ...]
    """One for each service that has routes; write them before Kong gets `declarative`."""
    warnings: tuple[Finding, ...]


def render(
    table: RouteTable,
    policy: EdgePolicy,
    upstreams: Mapping[str, Upstream],
    settings: KongSettings,
    openapi: str | None = None,
) -> KongConfiguration:
    """Renders what the policy exposes.

    Args:
        table: the routes of exactly the services that the policy exposes.
        policy: of the edge.
        upstreams: at least those that the policy names.
        settings: of this Kong; its own upstreams are not looked at.
        openapi: the OpenAPI document as JSON, served at ``/openapi.json``; None for not serving it.

    Raises:
        SettingsError: the policy does not fit the protos, the upstreams or Kong.
        RefusedError: Kong would distort what the routes carry.
    """
    _check(table, policy, upstreams)
    findings = for_kong(table, policy.accept)
    refuse_errors(findings)
    protos = {}
    for name in policy.services:
        if routes := table.of(name):
            protos[name] = kong_proto.render(table.api.packages[name], name, routes)
    used = {name: upstreams[name] for name in policy.upstreams}
    renderer = _Renderer(table, policy, used, settings, {name: proto.file_name for name, proto in protos.items()})
    document = renderer.document()
    if openapi is not None:
        document["routes"] = [_openapi_route(openapi, priority=len(table.routes) + 1)]
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1_000, allow_unicode=True)
    return KongConfiguration(text, tuple(protos[name] for name in sorted(protos)), findings)


def _check(table: RouteTable, policy: EdgePolicy, upstreams: Mapping[str, Upstream]) -> None:
    exposed.check(table, policy)
    for name, service in policy.services.items():
        if service.upstream not in upstreams:
            raise SettingsError(f"services.{name}.upstream: {service.upstream!r} is not among the upstreams")


@dataclass(frozen=True, slots=True)
class _Renderer:
    table: RouteTable
    policy: EdgePolicy
    upstreams: Mapping[str, Upstream]
    settings: KongSettings
    proto_names: dict[str, str]

    def document(self) -> Entity:
        document: Entity = {"_format_version": "3.0"}
        certificates = {
            upstream.client_certificate: None
            for upstream in self.upstreams.values()
            if upstream.client_certificate is not None
        }
        if certificates:
            document["certificates"] = [
                {"id": _certificate_id(item), "cert": item.certificate, "key": item.key} for item in certificates
            ]
        document["upstreams"] = [_upstream(name, item) for name, item in sorted(self.upstreams.items())]
        document["services"] = [
            entity for name, service in sorted(self.policy.services.items()) for entity in self._services(name, service)
        ]
        if self.policy.consumers:
            document["consumers"] = list(self._consumers())
        document["plugins"] = list(self._global_plugins())
        return document

    def _services(self, name: str, service: ExposedService) -> Iterator[Entity]:
        """One of Kong's services for each set of timeouts and retries, for these are all that routes cannot have.

        One is for methods that answer once, one for those that stream, and one for each that is treated otherwise.
        """
        usual = {streams: _channel(service.settings("", streams=streams)) for streams in (False, True)}
        groups: dict[str, list[Method]] = {name: []}
        for method in self.table.api.services[name]:
            key = f"{name}~streams" if method.streams else name
            if _channel(_settings(service, method)) != usual[method.streams]:
                key = method.full_name
            groups.setdefault(key, []).append(method)
        for key, methods in groups.items():
            found = [route for route in self.table.of(name) if route.method in methods]
            routes = [self._route(route, service) for route in found]
            if service.native_grpc:
                routes += self._native_routes(name, service, methods, by_prefix=key == name)
            if routes:
                channel = _channel(_settings(service, methods[0])) if methods else usual[False]
                yield self._service(key, service, channel, routes)

    def _service(
        self, name: str, service: ExposedService, channel: tuple[float, int], routes: Sequence[Entity]
    ) -> Entity:
        upstream = self.upstreams[service.upstream]
        timeout = _milliseconds(channel[0])
        return {
            "name": name,
            "protocol": "grpc" if upstream.client_certificate is None else "grpcs",
            "host": service.upstream,
            "retries": channel[1],
            "connect_timeout": _milliseconds(service.connect_timeout),
            "write_timeout": timeout,
            "read_timeout": timeout,
            "plugins": [_plugin("pre-function", {"access": [kong_lua.REQUEST_HEADERS]})],
            "routes": list(routes),
        }

    def _route(self, route: Route, service: ExposedService) -> Entity:
        directory = self.settings.proto_directory.rstrip("/")
        # A plugin of a route replaces the same plugin of its service: the service's pre-function is here again.
        plugins = [
            _plugin(
                "pre-function",
                {
                    "access": [
                        *kong_lua.access(route, service.max_body_bytes),
                        *self._audiences(_settings(service, route.method)),
                    ]
                },
            ),
            *_access_plugins(_settings(service, route.method)),
            _plugin("grpc-gateway", {"proto": f"{directory}/{self.proto_names[route.method.service]}"}),
        ]
        return {
            "name": route.name,
            "protocols": _HTTP,
            "methods": [route.verb, *(["OPTIONS"] if self.policy.cors else [])],
            "paths": [f"~{route.template.regex()}$"],
            "regex_priority": len(self.table.routes) - self.table.routes.index(route),
            "strip_path": False,
            "plugins": plugins,
        }

    def _native_routes(
        self, name: str, service: ExposedService, methods: Sequence[Method], *, by_prefix: bool
    ) -> Iterator[Entity]:
        """One by the service's prefix, and one by its whole path for each method that is treated otherwise."""
        usual = self._native_plugins(service.settings("", streams=False))
        paths = {f"{name}~grpc": (f"/{name}/", usual)} if by_prefix else {}
        for method in methods:
            plugins = self._native_plugins(_settings(service, method))
            if not by_prefix or plugins != usual:
                paths[f"{method.full_name}~grpc"] = (f"~/{escape(name)}/{method.name}$", plugins)
        for route_name, (path, plugins) in paths.items():
            entity: Entity = {"name": route_name, "protocols": _GRPC, "paths": [path], "strip_path": False}
            yield entity | {"plugins": plugins} if plugins else entity

    def _native_plugins(self, settings: MethodSettings) -> list[Entity]:
        plugins = list(_access_plugins(settings))
        if guard := self._audiences(settings):
            plugins.insert(0, _plugin("pre-function", {"access": [kong_lua.REQUEST_HEADERS, *guard]}))
        return plugins

    def _audiences(self, settings: MethodSettings) -> list[str]:
        """What looks at the audiences of tokens, where they are asked for."""
        issuers = [item for consumer in self.policy.consumers.values() for item in consumer.jwt_issuers]
        known = {item.issuer: item.audiences for item in issuers if item.audiences}
        return [kong_lua.audiences(known)] if known and Authentication.JWT in settings.authentication else []

    def _consumers(self) -> Iterator[Entity]:
        for name, consumer in sorted(self.policy.consumers.items()):
            entity: Entity = {"username": name}
            if consumer.jwt_issuers:
                entity["jwt_secrets"] = [
                    {"key": item.issuer, "algorithm": item.algorithm, "rsa_public_key": item.public_key}
                    for item in consumer.jwt_issuers
                ]
            if consumer.api_keys:
                entity["keyauth_credentials"] = [
                    {"key": f"{{vault://{self.settings.vault}/{key}}}"} for key in consumer.api_keys
                ]
            yield entity

    def _global_plugins(self) -> Iterator[Entity]:
        policy, cors = self.policy, self.policy.cors
        if cors is not None:
            yield _plugin(
                "cors",
                {
                    "origins": list(cors.origins),
                    "methods": sorted({route.verb for route in self.table.routes}),
                    "headers": list(cors.headers),
                    "exposed_headers": list(cors.exposed_headers),
                    "credentials": cors.credentials,
                    "max_age": math.ceil(cors.max_age),
                    "preflight_continue": False,
                },
            )
        if policy.correlation_id:
            config: Entity = {"header_name": "X-Request-ID", "generator": "uuid", "echo_downstream": True}
            yield _plugin("correlation-id", config)
        if policy.tracing is not None:
            config = {"traces_endpoint": policy.tracing.endpoint}
            if policy.tracing.sampled_percent < 100:
                config["sampling_rate"] = policy.tracing.sampled_percent / 100
            yield _plugin("opentelemetry", config)
        if policy.access_log:
            # Kong leaves out the authorization header itself, and the key once it was accepted.
            hidden = {"request.headers.x-api-key": "return nil"}
            yield _plugin("file-log", {"path": "/dev/stdout", "custom_fields_by_lua": hidden})
        if self.settings.prometheus:
            yield _plugin("prometheus", {"status_code_metrics": True, "latency_metrics": True})
        yield _plugin("post-function", kong_lua.errors(cors.origins if cors is not None else ()))


def _openapi_route(document: str, priority: int) -> Entity:
    """A route without a service, which a plugin answers."""
    config: Entity = {"status_code": 200, "content_type": "application/json", "body": document}
    return {
        "name": "openapi",
        "protocols": _HTTP,
        "methods": ["GET"],
        "paths": [f"~{escape(OPENAPI_PATH)}$"],
        "regex_priority": priority,
        "strip_path": False,
        "plugins": [_plugin("request-termination", config)],
    }


def _settings(service: ExposedService, method: Method) -> MethodSettings:
    return service.settings(method.name, streams=method.streams)


def _channel(settings: MethodSettings) -> tuple[float, int]:
    """What Kong has for services alone: timeout and retries."""
    return settings.timeout, settings.retries


def _access_plugins(settings: MethodSettings) -> Iterator[Entity]:
    if Authentication.JWT in settings.authentication:
        yield _plugin("jwt", {"key_claim_name": "iss", "claims_to_verify": ["exp", "nbf"], "uri_param_names": []})
    if Authentication.API_KEY in settings.authentication:
        yield _plugin(
            "key-auth",
            {"key_names": ["x-api-key"], "key_in_query": False, "key_in_body": False, "hide_credentials": True},
        )
    if settings.rate_limit is not None:
        limit = settings.rate_limit
        yield _plugin(
            "rate-limiting",
            {limit.per: limit.requests, "limit_by": limit.by, "policy": "local", "fault_tolerant": True},
        )


def _upstream(name: str, upstream: Upstream) -> Entity:
    entity: Entity = {"name": name}
    if upstream.host_header is not None:
        entity["host_header"] = upstream.host_header
    if upstream.client_certificate is not None:
        entity["client_certificate"] = _certificate_id(upstream.client_certificate)
    targets = sorted(upstream.targets, key=lambda target: target.address)
    entity["targets"] = [{"target": target.address, "weight": target.weight} for target in targets]
    return entity


def _plugin(name: str, config: object) -> Entity:
    return {"name": name, "config": config}


def _milliseconds(seconds: float) -> int:
    return math.ceil(seconds * 1_000)


def _certificate_id(certificate: ClientCertificate) -> str:
    """A UUID made of the references (RFC 9562, version 8), so that the same ones have the same."""
    digest = bytearray(hashlib.sha256(f"{certificate.certificate} {certificate.key}".encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80
    digest[8] = digest[8] & 0x3F | 0x80
    text = digest.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


class _Dumper(yaml.SafeDumper):
    """Writes programs and keys as blocks, and never an alias."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
