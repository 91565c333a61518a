"""Values that the mesh is about: endpoints, their health and place, and the outcome of an attempt."""

from __future__ import annotations

import enum
import ipaddress
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from mesh_client.core.errors import InvalidValueError

MAX_METADATA_PAIRS = 32
MAX_METADATA_LENGTH = 256
MAX_WEIGHT = 1000

_SERVICE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_ENDPOINT_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")
_PLACE = re.compile(r"[A-Za-z0-9._-]{0,64}")


class ResourceKind(enum.Enum):
    """Types of what control planes send, each with its own subscriptions and versions.

    The order is that in which a new service is announced.
    """

    POLICY = "policy"
    ENDPOINTS = "endpoints"


class Health(enum.Enum):
    """Whether an endpoint should receive calls, as the control plane knows it."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


class StatusCode(enum.IntEnum):
    """gRPC status codes, by number: https://grpc.github.io/grpc/core/md_doc_statuscodes.html."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Outcome(enum.Enum):
    """What an attempt says about the endpoint that served it."""

    SUCCESS = "success"
    """It answered; an application error is a healthy answer."""
    FAILURE = "failure"
    """It did not answer, or answered that it is broken."""
    OVERLOAD = "overload"
    """It refused for load. Counts against the service breaker, never towards ejection."""
    NEUTRAL = "neutral"
    """It says nothing: the caller gave up, or the connection had become old."""


@dataclass(frozen=True, slots=True)
class Locality:
    """Where something runs. Empty strings mean not known."""

    region: str = ""
    zone: str = ""

    def __post_init__(self) -> None:
        for name in ("region", "zone"):
            value = getattr(self, name)
            if not _PLACE.fullmatch(value):
                raise InvalidValueError(f"locality.{name}", value, "at most 64 characters of A-Z a-z 0-9 . _ -")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One process that serves one service at one address.

    Raises:
        InvalidValueError: a field is outside the range that endpoint.proto states.
    """

    id: str
    address: str
    port: int
    weight: int = 1
    health: Health = Health.HEALTHY
    locality: Locality = Locality()
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        check_endpoint_id(self.id, "endpoint.id")
        check_address(self.address, "endpoint.address")
        if not 1 <= self.port <= 65535:
            raise InvalidValueError("endpoint.port", self.port, "1 to 65535")
        if not 1 <= self.weight <= MAX_WEIGHT:
            raise InvalidValueError("endpoint.weight", self.weight, f"1 to {MAX_WEIGHT}")
        if len(self.metadata) > MAX_METADATA_PAIRS:
            raise InvalidValueError("endpoint.metadata", len(self.metadata), f"at most {MAX_METADATA_PAIRS} pairs")
        for key, value in self.metadata.items():
            if not key or len(key) > MAX_METADATA_LENGTH or len(value) > MAX_METADATA_LENGTH:
                raise InvalidValueError(
                    f"endpoint.metadata[{key[:32]!r}]", value[:32], f"keys and values of at most {MAX_METADATA_LENGTH}"
                )
            if not _is_text(key) or not _is_text(value):
                raise InvalidValueError(f"endpoint.metadata[{key[:32]!r}]", value[:32], "Unicode text")
        if not isinstance(self.metadata, MappingProxyType):
            object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    def __hash__(self) -> int:
        return hash((self.id, self.address, self.port))

    @property
    def target(self) -> str:
        """``host:port`` as grpc takes it, an IPv6 address in brackets."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def _is_text(value: str) -> bool:
    """Whether it can be encoded: JSON can smuggle in half of a surrogate pair, which protobuf refuses."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def sorted_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """The endpoints ordered by id.

    Raises:
        InvalidValueError: two endpoints have one id.
    """
    ordered = tuple(sorted(endpoints, key=lambda endpoint: endpoint.id))
    for left, right in itertools.pairwise(ordered):
        if left.id == right.id:
            raise InvalidValueError("endpoint.id", left.id, "unique within its service")
    return ordered


def check_service_name(name: str) -> str:
    """The name itself, when it is a DNS label: services appear in host names and certificates (RFC 1035).

    Raises:
        InvalidValueError: it is not.
    """
    if not _SERVICE_NAME.fullmatch(name):
        raise InvalidValueError("service", name, "a DNS label: 1 to 63 of a-z 0-9 -, not beginning or ending with -")
    return name


def check_endpoint_id(endpoint_id: str, path: str = "endpoint_id") -> str:
    """The id itself, when it is one.

    Raises:
        InvalidValueError: it is not.
    """
    if not _ENDPOINT_ID.fullmatch(endpoint_id):
        raise InvalidValueError(path, endpoint_id, "1 to 128 characters of A-Z a-z 0-9 . _ : -")
    return endpoint_id


def check_address(address: str, path: str = "address") -> str:
    """The address itself, when it is an IP address or a host name.

    Raises:
        InvalidValueError: it is neither, or it is an address nobody can call such as 0.0.0.0.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        if len(address) > 253 or not _HOST_NAME.fullmatch(address) or address.replace(".", "").isdigit():
            raise InvalidValueError(path, address, "an IP address without brackets, or a DNS name") from None
    else:
        if ip.is_unspecified or ip.is_multicast:
            raise InvalidValueError(path, address, "an address that others can call; register the host's own") from None
    return address
