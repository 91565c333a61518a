"""What sources tell the catalog and the policy books. Pure values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh_client.core.model import Endpoint


@dataclass(frozen=True, slots=True)
class Registration:
    """What a source knows to tell an endpoint's registration from another one under the same id."""

    text: str = ""
    """Another text is another registration, hence another process."""
    of_process: bool = False
    """The same text is the same process, too. Otherwise a process may have taken the place of another one unseen."""


@dataclass(frozen=True, slots=True)
class ServiceObserved:
    """A source's whole view of one service, in place of what it said of it before."""

    source: str
    service: str
    endpoints: tuple[Endpoint, ...]
    registrations: Mapping[str, Registration] = field(default_factory=dict)
    """By endpoint id, where the source can tell."""


@dataclass(frozen=True, slots=True)
class ServiceVanished:
    """The source does not list the service any more."""

    source: str
    service: str


@dataclass(frozen=True, slots=True)
class EndpointDrained:
    """An endpoint is leaving: it must not be published any more, even while its source still lists it.

    Raised by ``RegistryService.Drain``, and for operators. The removal of a drained endpoint is never a loss.
    """

    service: str
    endpoint_id: str
    operator: str = ""
    """Who drained it; empty when it asked itself."""
    at: float = 0.0
    """When the operator did, seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class EndpointUndrained:
    """An operator takes back what an operator has drained. Those that asked themselves to leave do leave."""

    service: str
    endpoint_id: str


@dataclass(frozen=True, slots=True)
class SourceConnected:
    """The source can be read: what it said last is current."""

    source: str


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The source cannot be read. Everything it said stays."""

    source: str
    detail: str


@dataclass(frozen=True, slots=True)
class PolicyStored:
    """A policy document as its store holds it, valid or not."""

    name: str
    document: bytes
    stored_version: str


@dataclass(frozen=True, slots=True)
class PolicyDeleted:
    """The store holds no policy of this name any more."""

    name: str


EndpointEvent = ServiceObserved | ServiceVanished | EndpointDrained | EndpointUndrained | SourceConnected | SourceLost
PolicyEvent = PolicyStored | PolicyDeleted
Event = EndpointEvent | PolicyEvent
