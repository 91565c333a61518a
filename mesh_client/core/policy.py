"""The policy of a service: how clients call it and what its servers admit.

One model, validated the same way where it is written (control plane, `mesh policy`) and where it is obeyed (clients).
Field names equal those of ``mesh.v1.ServicePolicy``, so the protobuf form is this model's JSON form.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.events.topology import CONTROL_PLANE, check_group
from mesh_client.core.identity import OPERATOR_PREFIX, check_operator_name
from mesh_client.core.model import MAX_WEIGHT, StatusCode, check_service_name
from mesh_client.core.policy_base import DnsLabel, Duration, Model, Percent, Policy, PositiveDuration

ANYBODY = "*"
"""Caller of an authorization rule that stands for everybody with an identity of the mesh."""

_METHOD = re.compile(r"\*|[A-Za-z_][\w.]*/(?:\*|[A-Za-z_]\w*)")
_EVENT_TYPE = re.compile(r"\*|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*\.(?:\*|[A-Za-z_]\w*)")
_METADATA_KEY = re.compile(r"^[a-z0-9_.-]{1,64}$")


def _method_pattern(value: str) -> str:
    value = value.removeprefix("/")
    if not _METHOD.fullmatch(value):
        raise ValueError("expected 'package.Service/Method', 'package.Service/*' or '*'")
    return value


def check_method(name: str) -> str:
    """A full method name, without its leading slash.

    Raises:
        InvalidValueError: it is none.
    """
    name = name.removeprefix("/")
    if not _METHOD.fullmatch(name) or name.endswith("*"):
        raise InvalidValueError("method", name, "package.Service/Method")
    return name


def check_method_pattern(pattern: str) -> str:
    """A pattern of methods, without a leading slash.

    Raises:
        InvalidValueError: it is none.
    """
    try:
        return _method_pattern(pattern)
    except ValueError:
        raise InvalidValueError("method", pattern, "package.Service/Method, package.Service/* or *") from None


def _status_code(value: object) -> object:
    if isinstance(value, str):
        if value in StatusCode.__members__:
            return StatusCode[value]
        raise ValueError(f"expected a gRPC status code name: {', '.join(StatusCode.__members__)}")
    return value


MethodPattern = Annotated[str, AfterValidator(_method_pattern)]
Code = Annotated[
    StatusCode,
    BeforeValidator(_status_code),
    PlainSerializer(lambda code: code.name, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "enum": list(StatusCode.__members__)}),
]


class Algorithm(enum.StrEnum):
    """Balancing algorithms."""

    ROUND_ROBIN = "ROUND_ROBIN"
    LEAST_REQUEST = "LEAST_REQUEST"
    WEIGHTED_ROUND_ROBIN = "WEIGHTED_ROUND_ROBIN"
    RANDOM = "RANDOM"
    RING_HASH = "RING_HASH"
    PEAK_EWMA = "PEAK_EWMA"


class HashSource(enum.StrEnum):
    """Where the key of RING_HASH comes from."""

    SOURCE_IP = "SOURCE_IP"
    """The address of the inbound caller; outside a server, of this host: IP hash."""
    METADATA = "METADATA"
    """A metadata value of the outbound call."""
    EXPLICIT = "EXPLICIT"
    """The key that the caller sets with ``mesh_client.hash_key``."""


class RateLimitScope(enum.StrEnum):
    """Which callers share a bucket."""

    PER_CALLER = "PER_CALLER"
    ALL = "ALL"


class Backoff(Model):
    """Jittered exponential backoff: the n-th retry waits a random time up to ``min(initial * multiplier**(n-1), max)``.

    Full jitter, after https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    initial: PositiveDuration = 0.025
    max: PositiveDuration = 1.0
    multiplier: Annotated[float, Field(ge=1.0, le=10.0)] = 2.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.initial:
            raise ValueError("max must be at least initial")
        return self


class RetryBudget(Model):
    """Retries allowed as a share of calls."""

    ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    min_per_second: Annotated[float, Field(ge=0.0, le=10_000.0)] = 10.0


class RetryPolicy(Model):
    """Retries of failed calls, after gRFC A6."""

    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Attempts in all, the first included; 1 means no retry."""
    retry_on: Annotated[tuple[Code, ...], Field(min_length=1, max_length=16)] = (StatusCode.UNAVAILABLE,)
    """Status codes that are retried. Retry only what is safe to repeat."""
    per_try_timeout: PositiveDuration | None = None
    """Deadline of each attempt; one that exceeds it is retried whatever ``retry_on`` says."""
    backoff: Backoff = Backoff()
    budget: RetryBudget = RetryBudget()

    @model_validator(mode="after")
    def _no_ok(self) -> Self:
        if StatusCode.OK in self.retry_on or StatusCode.CANCELLED in self.retry_on:
            raise ValueError("retry_on must not hold OK or CANCELLED")
        return self


class HashKey(Model):
    """What RING_HASH hashes."""

    source: HashSource = HashSource.SOURCE_IP
    metadata_key: Annotated[str, Field(pattern=_METADATA_KEY.pattern)] | None = None

    @model_validator(mode="after")
    def _key_where_needed(self) -> Self:
        if (self.source is HashSource.METADATA) != (self.metadata_key is not None):
            raise ValueError("metadata_key is needed for METADATA, and for nothing else")
        return self


class LoadBalancer(Model):
    """Balancing algorithm and its settings."""

    algorithm: Algorithm = Algorithm.LEAST_REQUEST
    hash_key: HashKey = HashKey()
    prefer_same_zone: bool = True
    slow_start: Duration = 0.0
    """Time in which a new endpoint's share grows to full; 0 for none."""
    panic_threshold: Percent = 50.0
    """With a smaller share of endpoints usable, in percent, what is reported of their health is ignored."""


class CircuitBreaker(Model):
    """Service breaker: opens when the service as a whole fails."""

    enabled: bool = True
    consecutive_failures: Annotated[int, Field(ge=1, le=1000)] = 5
    open_duration: PositiveDuration = 60.0
    half_open_probes: Annotated[int, Field(ge=1, le=100)] = 1


class OutlierDetection(Model):
    """Ejection of single failing endpoints, after Envoy's outlier detection."""

    enabled: bool = True
    consecutive_failures: Annotated[int, Field(ge=1, le=1000)] = 5
    base_ejection: PositiveDuration = 30.0
    max_ejection: PositiveDuration = 300.0
    max_ejected_percent: Percent = 10.0
    """At most this share is ejected at once, though always at least one endpoint."""
    interval: PositiveDuration = 10.0
    success_rate_min_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    success_rate_min_endpoints: Annotated[int, Field(ge=2, le=1000)] = 5
    success_rate_stdev_factor: Annotated[float, Field(ge=0.0, le=10.0)] = 1.9

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_ejection < self.base_ejection:
            raise ValueError("max_ejection must be at least base_ejection")
        return self


class ConcurrencyLimit(Model):
    """Limit on calls in flight; further ones are refused with RESOURCE_EXHAUSTED."""

    max_in_flight: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class FaultDelay(Model):
    """Delay before the first attempt."""

    duration: PositiveDuration
    percent: Percent = 0.0


class FaultAbort(Model):
    """Failure in place of a call."""

    code: Code
    percent: Percent = 0.0

    @model_validator(mode="after")
    def _fails(self) -> Self:
        if self.code is StatusCode.OK:
            raise ValueError("code must not be OK")
        return self


class FaultInjection(Model):
    """Faults injected on purpose."""

    delay: FaultDelay | None = None
    abort: FaultAbort | None = None


class WeightedSubset(Model):
    """One share of a traffic split."""

    labels: Annotated[dict[str, str], Field(min_length=1, max_length=32)]
    weight: Annotated[int, Field(ge=0, le=MAX_WEIGHT)] = 0
    """Relative to the other subsets. 0, which is also what protobuf takes an unset weight for, gets no calls."""


class Route(Model):
    """Settings of the methods that it matches, in place of the service's."""

    method: MethodPattern = "*"
    metadata: Annotated[dict[str, str], Field(max_length=16)] = {}  # noqa: RUF012  # pydantic copies it
    timeout: PositiveDuration | None = None
    retry: RetryPolicy | None = None
    fault: FaultInjection | None = None
    split: Annotated[tuple[WeightedSubset, ...], Field(max_length=16)] = ()

    @model_validator(mode="after")
    def _split_adds_up(self) -> Self:
        if self.split and not any(subset.weight for subset in self.split):
            raise ValueError("split needs at least one weight above 0")
        return self


class RateLimit(Model):
    """Token bucket over calls that one server instance admits."""

    method: MethodPattern = "*"
    scope: RateLimitScope = RateLimitScope.PER_CALLER
    requests_per_second: Annotated[float, Field(gt=0.0, le=1_000_000.0)]
    burst: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Calls at once from a full bucket; by default ``requests_per_second`` rounded up."""


def _caller_pattern(value: str) -> str:
    if value == ANYBODY:
        return value
    try:
        if value.startswith(OPERATOR_PREFIX):
            check_operator_name(value.removeprefix(OPERATOR_PREFIX))
        else:
            check_service_name(value)
    except InvalidValueError:
        raise ValueError(f"expected the name of a service, '{OPERATOR_PREFIX}NAME' or '{ANYBODY}'") from None
    return value


CallerPattern = Annotated[
    str,
    AfterValidator(_caller_pattern),
    WithJsonSchema({"type": "string", "pattern": rf"^(\*|({OPERATOR_PREFIX})?[a-z0-9]([a-z0-9-]{{0,61}}[a-z0-9])?)$"}),
]
"""The name of a service, ``operator:NAME`` or ``*``."""


class AuthorizationRule(Model):
    """Allows some callers some methods."""

    callers: Annotated[tuple[CallerPattern, ...], Field(min_length=1, max_length=1000)]
    """Who; ``*`` is everybody of the mesh."""
    methods: Annotated[tuple[MethodPattern, ...], Field(min_length=1, max_length=200)]
    """What."""


def _event_type_pattern(value: str) -> str:
    if not _EVENT_TYPE.fullmatch(value):
        raise ValueError("expected 'package.Message', 'package.*' or '*'")
    return value


def _group_pattern(value: str) -> str:
    if value != "*":
        try:
            check_group(value)
        except InvalidValueError as error:
            raise ValueError(f"expected '*' or {error.expected}") from None
    return value


def _publisher(value: str) -> str:
    if value != CONTROL_PLANE:
        try:
            check_service_name(value)
        except InvalidValueError:
            raise ValueError(f"expected the name of a service or '{CONTROL_PLANE}'") from None
    return value


EventTypePattern = Annotated[str, AfterValidator(_event_type_pattern)]
Publisher = Annotated[str, AfterValidator(_publisher)]
"""Who publishes events: the name of a service, or ``mesh:control-plane``."""


class EventHandling(Model):
    """How handlers of the events that it matches work, beside what their code says."""

    type: EventTypePattern = "*"
    publishers: Annotated[tuple[Publisher, ...], Field(max_length=1000)] = ()
    """Whose events are taken; those of others are dead letters. Empty for everybody's that the code takes."""
    timeout: Annotated[PositiveDuration, Field(le=3600.0)] | None = None
    """Time that a handler has, in place of the one that its code gives it."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] | None = None
    """Attempts in all, if the code's are not fewer; then the event is a dead letter."""


class EventGroup(Model):
    """How a group of the service's consumers works, beside what its code says."""

    group: Annotated[str, AfterValidator(_group_pattern)] = "*"
    paused: bool = False
    """Whether handlers are not called: events wait in the group's queue."""
    max_in_flight: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Handlers at once in each instance, if the code's are not fewer."""
    handlers: Annotated[tuple[EventHandling, ...], Field(max_length=200)] = ()
    """By type of event; the first match wins."""

    def handling(self, message_type: str) -> EventHandling:
        """How handlers of a type of event work."""
        return next((each for each in self.handlers if _type_matches(each.type, message_type)), NO_HANDLING)


NO_HANDLING = EventHandling()
"""The code alone says how events are handled."""
NO_GROUP = EventGroup()
"""Likewise of a whole group."""


class ServicePolicy(Policy):
    """How clients call one service, and what its servers admit. The defaults are what a service without policy gets."""

    NAMED_BY: ClassVar[str] = "service"
    STORED_AS: ClassVar[str] = "policies"

    service: DnsLabel
    timeout: PositiveDuration | None = None
    """Deadline of a call whose caller gave none."""
    retry: RetryPolicy = RetryPolicy()
    load_balancer: LoadBalancer = LoadBalancer()
    circuit_breaker: CircuitBreaker = CircuitBreaker()
    outlier_detection: OutlierDetection = OutlierDetection()
    concurrency_limit: ConcurrencyLimit = ConcurrencyLimit()
    fault: FaultInjection = FaultInjection()
    routes: Annotated[tuple[Route, ...], Field(max_length=200)] = ()
    rate_limits: Annotated[tuple[RateLimit, ...], Field(max_length=200)] = ()
    server_concurrency_limit: ConcurrencyLimit = ConcurrencyLimit()
    authorization: Annotated[tuple[AuthorizationRule, ...], Field(max_length=200)] = ()
    """Who may call what; with one rule or more, calls that no rule allows are refused."""
    events: Annotated[tuple[EventGroup, ...], Field(max_length=200)] = ()
    """How the service's groups handle events; the first match wins."""

    def event_group(self, name: str) -> EventGroup:
        """How a group of the service's consumers works."""
        return next((each for each in self.events if each.group in ("*", name)), NO_GROUP)


def _type_matches(pattern: str, message_type: str) -> bool:
    if pattern == "*":
        return True
    return message_type.startswith(pattern[:-1]) if pattern.endswith(".*") else message_type == pattern


def method_matches(pattern: str, method: str) -> bool:
    """Whether a `MethodPattern` covers a full method name, with or without its leading slash."""
    if pattern == "*":
        return True
    method = method.removeprefix("/")
    if pattern.endswith("/*"):
        return method.startswith(pattern[:-1])
    return method == pattern
