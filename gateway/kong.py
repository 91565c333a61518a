"""From routes and settings to a Kong that needs no database: ``kong.yml`` and the protos that it names.

What this renders takes Kong's word for nothing: Kong accepts configuration that then fails each request. Each REST
route is a route of Kong's own, by a regular expression that matches exactly what its template matches: a path that no
method has is a 404 before anything is transcoded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from gateway import kong_lua, kong_proto
from gateway.descriptors import Method
from gateway.errors import SettingsError
from gateway.lint import Finding, for_kong, refuse_errors
from gateway.path_template import escape
from gateway.routes import Route, RouteTable
from gateway.settings import Authentication, ClientCertificate, EdgeSettings, RateLimit, Service, Upstream

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


def render(table: RouteTable, settings: EdgeSettings) -> KongConfiguration:
    """Renders what the settings expose; the table must have the routes of exactly these services.

    Raises:
        SettingsError: the settings do not fit the protos.
        RefusedError: Kong would distort what the routes carry.
    """
    _check(table, settings)
    findings = for_kong(table, settings.accept)
    refuse_errors(findings)
    protos = {}
    for name in settings.services:
        if routes := table.of(name):
            protos[name] = kong_proto.render(table.api.packages[name], name, routes)
    renderer = _Renderer(table, settings, {name: proto.file_name for name, proto in protos.items()})
    text = yaml.dump(renderer.document(), Dumper=_Dumper, sort_keys=False, width=1_000, allow_unicode=True)
    return KongConfiguration(text, tuple(protos[name] for name in sorted(protos)), findings)


def _check(table: RouteTable, settings: EdgeSettings) -> None:
    api = table.api
    for name, service in settings.services.items():
        if name not in api.services:
            raise SettingsError(f"services.{name}: no such service; there are {', '.join(api.services) or 'none'}")
        methods = {method.name for method in api.services[name]}
        for method in service.rate_limits:
            if method not in methods:
                raise SettingsError(f"services.{name}.rate_limits.{method}: it has no such method")
        if not service.native_grpc and not table.of(name):
            raise SettingsError(f"services.{name}: no method is annotated, and native_grpc is off: nothing to expose")
    for route in table.routes:
        if route.method.service not in settings.services:
            raise SettingsError(f"{route.method.service} has routes and is not exposed; build the table without it")


@dataclass(frozen=True, slots=True)
class _Renderer:
    table: RouteTable
    settings: EdgeSettings
    proto_names: dict[str, str]

    def document(self) -> Entity:
        settings = self.settings
        document: Entity = {"_format_version": "3.0"}
        certificates = {
            upstream.client_certificate: None
            for _, upstream in sorted(settings.upstreams.items())
            if upstream.client_certificate is not None
        }
        if certificates:
            document["certificates"] = [
                {"id": _certificate_id(item), "cert": item.certificate, "key": item.key} for item in certificates
            ]
        document["upstreams"] = [_upstream(name, item) for name, item in sorted(settings.upstreams.items())]
        document["services"] = [
            entity for name, service in sorted(settings.services.items()) for entity in self._services(name, service)
        ]
        if settings.consumers:
            document["consumers"] = list(self._consumers())
        document["plugins"] = list(self._global_plugins())
        return document

    def _services(self, name: str, service: Service) -> Iterator[Entity]:
        """One of Kong's services for methods that answer once, and one, with its own timeout, for those that stream."""
        for streams in (False, True):
            routes = [route for route in self.table.of(name) if _streams(route.method) is streams]
            methods = [method for method in self.table.api.services[name] if _streams(method) is streams]
            entities = [self._route(route, service) for route in routes]
            if service.native_grpc:
                entities += self._native_routes(name, service, methods, prefix=not streams)
            if entities:
                yield self._service(f"{name}~streams" if streams else name, service, entities, streams=streams)

    def _service(self, name: str, service: Service, routes: Sequence[Entity], *, streams: bool) -> Entity:
        upstream = self.settings.upstreams[service.upstream]
        timeout = _milliseconds(service.stream_timeout if streams else service.timeout)
        return {
            "name": name,
            "protocol": "grpc" if upstream.client_certificate is None else "grpcs",
            "host": service.upstream,
            "retries": service.retries,
            "connect_timeout": _milliseconds(service.connect_timeout),
            "write_timeout": timeout,
            "read_timeout": timeout,
            "plugins": [_plugin("pre-function", {"access": [kong_lua.TRAILERS]})],
            "routes": list(routes),
        }

    def _route(self, route: Route, service: Service) -> Entity:
        directory = self.settings.proto_directory.rstrip("/")
        # A plugin of a route replaces the same plugin of its service: the service's pre-function is here again.
        plugins = [
            _plugin("pre-function", {"access": kong_lua.access(route, service.max_body_bytes)}),
            *self._access_plugins(service, service.rate_limits.get(route.method.name, service.rate_limit)),
            _plugin("grpc-gateway", {"proto": f"{directory}/{self.proto_names[route.method.service]}"}),
        ]
        return {
            "name": route.name,
            "protocols": _HTTP,
            "methods": [route.verb, *(["OPTIONS"] if self.settings.cors else [])],
            "paths": [f"~{route.template.regex()}$"],
            "regex_priority": len(self.table.routes) - self.table.routes.index(route),
            "strip_path": False,
            "plugins": plugins,
        }

    def _native_routes(
        self, name: str, service: Service, methods: Sequence[Method], *, prefix: bool
    ) -> Iterator[Entity]:
        """One by the service's prefix, and one by its whole path for each method that is treated otherwise."""
        paths = {f"{name}~grpc": (f"/{name}/", service.rate_limit)} if prefix else {}
        for method in methods:
            limit = service.rate_limits.get(method.name, service.rate_limit)
            if _streams(method) or limit != service.rate_limit:
                paths[f"{method.full_name}~grpc"] = (f"~/{escape(name)}/{method.name}$", limit)
        for route_name, (path, limit) in paths.items():
            plugins = list(self._access_plugins(service, limit))
            entity: Entity = {"name": route_name, "protocols": _GRPC, "paths": [path], "strip_path": False}
            yield entity | {"plugins": plugins} if plugins else entity

    def _access_plugins(self, service: Service, limit: RateLimit | None) -> Iterator[Entity]:
        if Authentication.JWT in service.authentication:
            yield _plugin("jwt", {"key_claim_name": "iss", "claims_to_verify": ["exp", "nbf"], "uri_param_names": []})
        if Authentication.API_KEY in service.authentication:
            yield _plugin(
                "key-auth",
                {"key_names": ["x-api-key"], "key_in_query": False, "key_in_body": False, "hide_credentials": True},
            )
        if limit is not None:
            yield _plugin(
                "rate-limiting",
                {limit.per: limit.requests, "limit_by": limit.by, "policy": "local", "fault_tolerant": True},
            )

    def _consumers(self) -> Iterator[Entity]:
        for name, consumer in sorted(self.settings.consumers.items()):
            entity: Entity = {"username": name}
            if consumer.jwt_issuers:
                entity["jwt_secrets"] = [
                    {"key": item.issuer, "algorithm": item.algorithm, "rsa_public_key": item.public_key}
                    for item in consumer.jwt_issuers
                ]
            if consumer.api_keys:
                entity["keyauth_credentials"] = [{"key": key} for key in consumer.api_keys]
            yield entity

    def _global_plugins(self) -> Iterator[Entity]:
        settings, cors = self.settings, self.settings.cors
        if cors is not None:
            yield _plugin(
                "cors",
                {
                    "origins": list(cors.origins),
                    "methods": sorted({route.verb for route in self.table.routes}),
                    "headers": list(cors.headers),
                    "exposed_headers": list(cors.exposed_headers),
                    "credentials": cors.credentials,
                    "max_age": cors.max_age,
                    "preflight_continue": False,
                },
            )
        if settings.correlation_id:
            config: Entity = {"header_name": "X-Request-ID", "generator": "uuid", "echo_downstream": True}
            yield _plugin("correlation-id", config)
        if settings.opentelemetry_endpoint is not None:
            yield _plugin("opentelemetry", {"traces_endpoint": settings.opentelemetry_endpoint})
        if settings.prometheus:
            yield _plugin("prometheus", {"status_code_metrics": True, "latency_metrics": True})
        yield _plugin("post-function", kong_lua.errors(cors.origins if cors is not None else ()))


def _streams(method: Method) -> bool:
    return method.server_streaming or method.client_streaming


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
