"""How an edge exposes an API: which services, where they run, and who may call them. Nothing is exposed unless said."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from gateway.errors import SettingsError

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._~-]*$"
_REFERENCE = r"^\{vault://[^{}\s]+\}$"

Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=128)]
Reference = Annotated[str, StringConstraints(pattern=_REFERENCE)]
"""A secret by reference, as in ``{vault://env/shop-certificate}``: configuration holds none itself."""
Seconds = Annotated[float, Field(gt=0, le=86_400)]

_TARGET = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):(\d{1,5})")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Target(_Model):
    """One endpoint."""

    address: str
    """``host:port``."""
    weight: int = Field(default=100, ge=0, le=65_535)

    @field_validator("address")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        match = _TARGET.fullmatch(value)
        if match is None or not 0 < int(match[1]) < 65_536:
            raise ValueError("expected host:port")
        return value


class ClientCertificate(_Model):
    """What the edge shows to services, each part by reference."""

    certificate: Reference
    key: Reference


class Upstream(_Model):
    """A service of the mesh: where it runs, and how it is reached."""

    targets: tuple[Target, ...] = ()
    host_header: Name | None = None
    """Name in requests and in TLS: the DNS name in the servers' certificates. Needed for TLS."""
    client_certificate: ClientCertificate | None = None
    """With one, calls are over mTLS; without one, in plaintext."""

    @model_validator(mode="after")
    def _tls_has_a_name(self) -> Upstream:
        if self.client_certificate is not None and self.host_header is None:
            raise ValueError("client_certificate needs host_header, the name that the servers' certificates have")
        addresses = [target.address for target in self.targets]
        if len(set(addresses)) < len(addresses):
            raise ValueError("a target is there twice")
        return self


class Authentication(enum.StrEnum):
    """How callers prove who they are. With both, they must do both."""

    JWT = "jwt"
    API_KEY = "api_key"


class RateLimit(_Model):
    """Requests that one caller may make to one route, in a window; counted by each edge process for itself."""

    requests: int = Field(ge=1, le=1_000_000_000)
    per: Literal["second", "minute", "hour", "day"] = "minute"
    by: Literal["consumer", "ip"] = "ip"


class Service(_Model):
    """One exposed gRPC service."""

    upstream: Name
    authentication: tuple[Authentication, ...] = ()
    rate_limit: RateLimit | None = None
    rate_limits: Mapping[str, RateLimit] = Field(default_factory=dict)
    """For single methods, by name, in place of `rate_limit`."""
    max_body_bytes: int | None = Field(default=None, ge=1, le=1 << 30)
    connect_timeout: Seconds = 1.0
    timeout: Seconds = 15.0
    """Of a call, between two reads or writes."""
    stream_timeout: Seconds = 3_600.0
    """The same for methods that stream."""
    retries: int = Field(default=1, ge=0, le=10)
    """Further targets that are tried when one cannot be connected to."""
    native_grpc: bool = True
    """Also expose the service by gRPC, with the same authentication and rate limit."""


class Cors(_Model):
    """Who may call from web pages of other origins."""

    origins: tuple[str, ...] = Field(min_length=1)
    """As in ``https://shop.example``; ``*`` for all."""
    headers: tuple[str, ...] = ("Authorization", "Content-Type")
    exposed_headers: tuple[str, ...] = ()
    credentials: bool = False
    max_age: int = Field(default=600, ge=0, le=86_400)

    @model_validator(mode="after")
    def _credentials_need_origins(self) -> Cors:
        if self.credentials and "*" in self.origins:
            raise ValueError("with credentials, name the origins")
        return self


class JwtIssuer(_Model):
    """Whose tokens are believed."""

    issuer: Annotated[str, StringConstraints(min_length=1)]
    """The ``iss`` claim."""
    algorithm: Literal["RS256", "ES256"]
    public_key: Annotated[
        str, StringConstraints(pattern=r"^-----BEGIN PUBLIC KEY-----\s[\sA-Za-z0-9+/=]+-----END PUBLIC KEY-----\s*$")
    ]
    """PEM."""


class Consumer(_Model):
    """A caller that the edge knows."""

    jwt_issuers: tuple[JwtIssuer, ...] = ()
    api_keys: tuple[Reference, ...] = ()


class EdgeSettings(_Model):
    """All settings of an edge."""

    services: Mapping[str, Service] = Field(min_length=1)
    """Exposed services, by full names such as ``shop.v1.OrderService``."""
    upstreams: Mapping[Name, Upstream]
    consumers: Mapping[Name, Consumer] = Field(default_factory=dict)
    cors: Cors | None = None
    correlation_id: bool = True
    """Give each request an ``X-Request-ID``, unless it has one, and send it back."""
    opentelemetry_endpoint: Annotated[str, StringConstraints(pattern=r"^https?://\S+$")] | None = None
    """Where spans go by OTLP over HTTP, such as ``http://collector:4318/v1/traces``."""
    prometheus: bool = False
    accept: tuple[str, ...] = ()
    """Findings that are taken for warnings: see `gateway.lint.for_kong`."""
    proto_directory: Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/~-]*$")] = "/usr/local/kong/protos"
    """Where Kong finds the rendered protos."""

    @model_validator(mode="after")
    def _names_fit(self) -> EdgeSettings:
        for name, service in self.services.items():
            if service.upstream not in self.upstreams:
                raise ValueError(f"services.{name}.upstream: there is no upstream {service.upstream!r}")
            if Authentication.JWT in service.authentication and not any(
                consumer.jwt_issuers for consumer in self.consumers.values()
            ):
                raise ValueError(f"services.{name}.authentication: jwt needs a consumer with jwt_issuers")
            if Authentication.API_KEY in service.authentication and not any(
                consumer.api_keys for consumer in self.consumers.values()
            ):
                raise ValueError(f"services.{name}.authentication: api_key needs a consumer with api_keys")
            limits = [service.rate_limit, *service.rate_limits.values()]
            if any(limit is not None and limit.by == "consumer" for limit in limits) and not service.authentication:
                raise ValueError(f"services.{name}: a rate limit by consumer needs authentication")
        issuers = [item.issuer for consumer in self.consumers.values() for item in consumer.jwt_issuers]
        if len(set(issuers)) < len(issuers):
            raise ValueError("consumers: an issuer is there twice; Kong knows one key for each")
        return self


def parse_settings(document: object) -> EdgeSettings:
    """Checks a document, as YAML or JSON gives it.

    Raises:
        SettingsError: with the path and the trouble of everything that is wrong.
    """
    try:
        return EdgeSettings.model_validate_json(json.dumps(document, default=repr))
    except ValidationError as error:
        wrong = [
            ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, "))))
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise SettingsError("; ".join(wrong)) from None
