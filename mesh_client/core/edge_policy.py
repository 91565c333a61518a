"""The policy of an edge: what it exposes of the mesh to the outside, and to whom. Nothing is exposed unless said.

Field names equal those of ``mesh.v1.EdgePolicy``, so the protobuf form is this model's JSON form. A policy holds no
secrets: API keys are in it by the names of the secrets alone.
"""

from __future__ import annotations

import base64
import binascii
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic.config import JsonDict

from mesh_client.core.policy_base import DnsLabel, Duration, Model, Percent, Policy, PositiveDuration, at_fields

_GRPC_SERVICE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
_GRPC_METHOD = r"^[A-Za-z_][A-Za-z0-9_]*$"
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\s([\sA-Za-z0-9+/=]+)-----END PUBLIC KEY-----\s*")
_P256 = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
"""Begins the SubjectPublicKeyInfo of every key for ES256: DER, 91 bytes, an uncompressed point (RFC 5480)."""
_RSA = bytes.fromhex("300d06092a864886f70d0101010500")
"""The algorithm within the SubjectPublicKeyInfo of every RSA key (RFC 3279)."""

_NO_OTHERS: JsonDict = {"additionalProperties": False}
"""For editors: a mapping whose names have a pattern takes no others."""

GrpcService = Annotated[str, Field(pattern=_GRPC_SERVICE, max_length=256)]
"""Full name of a gRPC service, as in ``shop.v1.OrderService``."""
GrpcMethod = Annotated[str, Field(pattern=_GRPC_METHOD, max_length=256)]
"""Name of a method within its service."""
ConsumerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._~-]*$", max_length=128)]
SecretName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=128)]
"""Name of a secret, which is the name of its file: no path, no value."""

Accepted = Annotated[str, Field(pattern=r"^[a-z0-9-]+(:[A-Za-z_][A-Za-z0-9_.]*)?$", max_length=512)]
"""``RULE`` or ``RULE:FIELD``."""


class Authentication(enum.StrEnum):
    """How callers prove who they are. With both ways, they must do both."""

    JWT = "jwt"
    """A token in ``Authorization: Bearer``."""
    API_KEY = "api_key"
    """A key in ``x-api-key``."""
    NONE = "none"
    """Nothing is asked for. Stands alone; it opens one method of a service that asks for something."""


def _together(value: tuple[Authentication, ...]) -> tuple[Authentication, ...]:
    if len(set(value)) < len(value):
        raise ValueError("each way is named once")
    if Authentication.NONE in value and len(value) > 1:
        raise ValueError("none stands alone")
    return value


Authentications = Annotated[tuple[Authentication, ...], AfterValidator(_together)]


class EdgeRateLimit(Model):
    """Requests that one caller may make to one method, in a window; counted by each edge process for itself."""

    requests: Annotated[int, Field(ge=1, le=1_000_000_000)]
    per: Literal["second", "minute", "hour", "day"] = "minute"
    by: Literal["consumer", "ip"] = "ip"
    """Who is one caller."""


class ExposedMethod(Model):
    """Settings of one method, in place of the service's. What is not set is the service's."""

    authentication: Annotated[Authentications, Field(min_length=1)] | None = None
    """``[none]`` opens the method."""
    rate_limit: EdgeRateLimit | None = None
    timeout: PositiveDuration | None = None
    """Also in place of ``stream_timeout``, if the method streams."""
    retries: Annotated[int, Field(ge=0, le=10)] | None = None


@dataclass(frozen=True, slots=True)
class MethodSettings:
    """What holds for one method, from the service's settings and its own."""

    authentication: tuple[Authentication, ...]
    """Without `Authentication.NONE`; empty: nothing is asked for."""
    rate_limit: EdgeRateLimit | None
    timeout: float
    """Seconds; for a method that streams, of silence."""
    retries: int


class ExposedService(Model):
    """One gRPC service that the edge exposes."""

    upstream: DnsLabel
    """The service of the mesh that serves it."""
    authentication: Authentications = ()
    """What callers must show; none unless said."""
    rate_limit: EdgeRateLimit | None = None
    """Holds for each method of its own."""
    max_body_bytes: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    """Largest body of a REST request."""
    connect_timeout: PositiveDuration = 1.0
    timeout: PositiveDuration = 15.0
    """Of a call, for methods that answer once."""
    stream_timeout: PositiveDuration = 3_600.0
    """Longest silence, for methods that stream."""
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    """Further endpoints that are tried when one cannot be connected to."""
    methods: Annotated[dict[GrpcMethod, ExposedMethod], Field(max_length=500, json_schema_extra=_NO_OTHERS)] = {}  # noqa: RUF012  # pydantic copies it
    """Settings of single methods, by name."""
    native_grpc: bool = True
    """Also expose the service by gRPC, to the same callers with the same limits."""

    def settings(self, method: str, *, streams: bool) -> MethodSettings:
        """What holds for a method.

        Args:
            method: its name within the service.
            streams: whether it has more than one request or response.
        """
        own = self.methods.get(method, _NOTHING)
        timeout = self.stream_timeout if streams else self.timeout
        authentication = self.authentication if own.authentication is None else own.authentication
        return MethodSettings(
            tuple(way for way in authentication if way is not Authentication.NONE),
            own.rate_limit or self.rate_limit,
            timeout if own.timeout is None else own.timeout,
            self.retries if own.retries is None else own.retries,
        )


_NOTHING = ExposedMethod()


class JwtIssuer(Model):
    """Whose tokens are believed. Tokens must say ``exp``, and are refused before their ``nbf``."""

    issuer: Annotated[str, Field(min_length=1, max_length=512)]
    """The ``iss`` claim."""
    audiences: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=512)], ...], Field(max_length=100)] = ()
    """The ``aud`` claim must name one of them. Empty: it is not looked at."""
    algorithm: Literal["RS256", "ES256"]
    public_key: Annotated[str, Field(max_length=8192)]
    """PEM of a SubjectPublicKeyInfo (``BEGIN PUBLIC KEY``)."""

    @model_validator(mode="after")
    def _key_is_for_the_algorithm(self) -> Self:
        if wrong := _wrong_key(self.public_key, self.algorithm):
            raise at_fields(type(self), [(("public_key",), wrong)])
        return self


def _wrong_key(pem: str, algorithm: str) -> str:
    """What is wrong with it, without repeating it: someone may have taken a private key."""
    match = _PEM.fullmatch(pem)
    if match is None:
        return "expected PEM that begins with -----BEGIN PUBLIC KEY-----"
    try:
        der = base64.b64decode("".join(match[1].split()), validate=True)
    except binascii.Error:
        return "expected base64 between the lines of the PEM"
    if algorithm == "ES256" and not (der.startswith(_P256) and len(der) == 91):
        return "expected a P-256 key, which is what ES256 needs"
    if algorithm == "RS256" and not (_RSA in der[:24] and len(der) >= 290):
        return "expected an RSA key of 2048 bits or more, which is what RS256 needs"
    return ""


class EdgeConsumer(Model):
    """A caller that the edge knows."""

    jwt_issuers: Annotated[tuple[JwtIssuer, ...], Field(max_length=100)] = ()
    """Who shows a token of one of these is this consumer."""
    api_keys: Annotated[tuple[SecretName, ...], Field(max_length=100)] = ()
    """Names of secrets: each edge finds their values where it keeps its secrets."""


class Cors(Model):
    """Who may call from web pages of other origins."""

    origins: Annotated[tuple[str, ...], Field(min_length=1, max_length=200)]
    """As in ``https://shop.example``; ``*`` for all."""
    headers: Annotated[tuple[str, ...], Field(min_length=1, max_length=200)] = ("Authorization", "Content-Type")
    """That requests may have."""
    exposed_headers: Annotated[tuple[str, ...], Field(max_length=200)] = ()
    """Of answers that pages may read."""
    credentials: bool = False
    max_age: Duration = 600.0
    """For which browsers remember the answer to a preflight."""

    @model_validator(mode="after")
    def _credentials_need_origins(self) -> Self:
        if self.credentials and "*" in self.origins:
            raise at_fields(type(self), [(("origins",), "with credentials, name the origins")])
        return self


class Tracing(Model):
    """Where the edge's spans go."""

    endpoint: Annotated[str, Field(pattern=r"^https?://\S+$", max_length=512)]
    """OTLP over HTTP, such as ``http://collector:4318/v1/traces``."""
    sampled_percent: Percent = 100.0
    """Of requests that come without a trace of their own."""


class EdgePolicy(Policy):
    """What one edge exposes, and to whom."""

    NAMED_BY: ClassVar[str] = "edge"
    STORED_AS: ClassVar[str] = "edge-policies"

    edge: DnsLabel = "edge"
    gateways: Annotated[tuple[DnsLabel, ...], Field(max_length=100)] = ()
    """Services of the mesh whose processes may follow this policy. Empty: the service that is named like the edge."""
    services: Annotated[dict[GrpcService, ExposedService], Field(max_length=200, json_schema_extra=_NO_OTHERS)] = {}  # noqa: RUF012  # pydantic copies it
    """Exposed gRPC services, by their full names."""
    consumers: Annotated[dict[ConsumerName, EdgeConsumer], Field(max_length=2000, json_schema_extra=_NO_OTHERS)] = {}  # noqa: RUF012  # pydantic copies it
    cors: Cors | None = None
    """Without it, no page of another origin may call."""
    correlation_id: bool = True
    """Give each request an ``X-Request-ID``, unless it has one, and send it back."""
    tracing: Tracing | None = None
    access_log: bool = False
    """A line of JSON for each request, on the edge's standard output."""
    accept: Annotated[tuple[Accepted, ...], Field(max_length=1000)] = ()
    """Findings of ``mesh gateway lint`` that are taken for warnings. Kong."""

    @classmethod
    def called(cls, name: str) -> str:
        """How messages call what a policy of this name is for."""
        return f"edge {name}"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if errors := [*self._callers(), *self._twice()]:
            raise at_fields(type(self), errors)
        return self

    def _callers(self) -> Iterator[tuple[tuple[int | str, ...], str]]:
        """What callers must show that none of them can."""
        possible = {Authentication.NONE}
        if any(consumer.jwt_issuers for consumer in self.consumers.values()):
            possible.add(Authentication.JWT)
        if any(consumer.api_keys for consumer in self.consumers.values()):
            possible.add(Authentication.API_KEY)
        for name, service in self.services.items():
            stated: dict[tuple[str, ...], ExposedService | ExposedMethod] = {("services", name): service}
            for method, own in service.methods.items():
                stated["services", name, "methods", method] = own
            for at, item in stated.items():
                for way in item.authentication or ():
                    if way not in possible:
                        holds = "jwt_issuers" if way is Authentication.JWT else "api_keys"
                        yield (*at, "authentication"), f"{way} needs a consumer with {holds}"
                if item.authentication is None and item.rate_limit is None:
                    continue
                asked = service.authentication if item.authentication is None else item.authentication
                limit = item.rate_limit or service.rate_limit
                if limit is not None and limit.by == "consumer" and set(asked) <= {Authentication.NONE}:
                    where = "rate_limit" if item.rate_limit is not None else "authentication"
                    yield (*at, where), "a rate limit by consumer needs authentication"

    def _twice(self) -> Iterator[tuple[tuple[int | str, ...], str]]:
        """Issuers and keys that would stand for two consumers."""
        known: dict[tuple[str, str], str] = {}
        for name, consumer in self.consumers.items():
            for kind, values in (
                ("jwt_issuers", [item.issuer for item in consumer.jwt_issuers]),
                ("api_keys", list(consumer.api_keys)),
            ):
                for index, value in enumerate(values):
                    first = known.setdefault((kind, value), name)
                    if first != name or value in values[:index]:
                        yield ("consumers", name, kind, index), f"{value!r} is there already, for {first}"

    @property
    def followers(self) -> tuple[str, ...]:
        """Services whose processes may follow this policy."""
        return self.gateways or (self.edge,)

    @property
    def upstreams(self) -> tuple[str, ...]:
        """Services of the mesh that the edge calls, each once, in order."""
        return tuple(sorted({service.upstream for service in self.services.values()}))
