"""What a client holds of the mesh: applies discovery responses, and knows what to ask for and what to answer.

The client's half of the protocol in discovery.proto, without the stream. After any sequence of responses, lost streams
and reconnects it holds what the control plane last sent, or the last good version of what it rejected.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mesh_client.core.errors import InvalidTransitionError, InvalidValueError
from mesh_client.core.model import Endpoint, ResourceKind, check_service_name, sorted_endpoints
from mesh_client.core.policy import ServicePolicy


@dataclass(frozen=True, slots=True)
class PolicyResource:
    """A service's policy at one version."""

    service: str
    version: str
    policy: ServicePolicy
    provisional: bool = False
    """Whether these are defaults in place of a policy that may exist: good for calling, no permission to serve."""


@dataclass(frozen=True, slots=True)
class EndpointsResource:
    """All endpoints of a service at one version, ordered by id."""

    service: str
    version: str
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class EndpointsDelta:
    """The change of a service's endpoints from ``base_version`` to ``version``."""

    service: str
    version: str
    base_version: str
    upserts: tuple[Endpoint, ...]
    removed_ids: tuple[str, ...]

    def apply(self, base: EndpointsResource) -> EndpointsResource:
        """The endpoints at ``version``.

        Raises:
            InvalidValueError: ``base`` is of another version, or an id stands in the delta twice.
        """
        if base.version != self.base_version:
            raise InvalidValueError(
                "endpoints_delta.base_version", self.base_version, f"the held version {base.version}"
            )
        endpoints = {endpoint.id: endpoint for endpoint in base.endpoints}
        for removed in self.removed_ids:
            endpoints.pop(removed, None)
        endpoints.update((endpoint.id, endpoint) for endpoint in sorted_endpoints(self.upserts))
        return EndpointsResource(self.service, self.version, sorted_endpoints(endpoints.values()))


Resource = PolicyResource | EndpointsResource | EndpointsDelta


@dataclass(frozen=True, slots=True)
class Update:
    """One discovery response, decoded."""

    kind: ResourceKind
    nonce: str
    resources: tuple[Resource, ...] = ()
    removed: tuple[str, ...] = ()
    invalid: Mapping[str, str] = field(default_factory=dict)
    """Resources that could not be decoded: service to what is wrong."""


@dataclass(frozen=True, slots=True)
class Subscribe:
    """The first request of a kind on a new stream, or a change of subscriptions on an open one."""

    kind: ResourceKind
    subscribe: tuple[str, ...]
    unsubscribe: tuple[str, ...] = ()
    held_versions: Mapping[str, str] = field(default_factory=dict)
    resync: tuple[str, ...] = ()
    """Services to send whole: what is held of them is not in force yet, so it must not count as held."""


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The answer to a response: an acknowledgement, or a rejection of the services in ``rejected``."""

    kind: ResourceKind
    nonce: str
    rejected: Mapping[str, str]
    resync: tuple[str, ...]


class Resolution(enum.Enum):
    """What the client knows of a service that it subscribes to."""

    PENDING = "pending"
    """Not heard of yet."""
    ACTIVE = "active"
    """Policy and endpoints are both held."""
    UNKNOWN = "unknown"
    """The control plane says that there is no such service."""


@dataclass(slots=True)
class _Record:
    policy: PolicyResource | None = None
    endpoints: EndpointsResource | None = None
    removed: bool = False
    confirmed: bool = False
    """Heard of from a control plane in this process, as opposed to read from the disk cache."""
    in_force: bool = True
    """Whether nobody acts by other endpoints any more than those that are held."""


class Store:
    """Policies and endpoints of the services that a client subscribes to.

    Not thread-safe; one owner drives it.

    Args:
        applied_elsewhere: what is held comes into force later, when `applied` says so, as for the configuration of a
            proxy. Until then no control plane is told that it is held, and what was in force before this process
            started is not known.
    """

    def __init__(self, *, applied_elsewhere: bool = False) -> None:
        self._applied_elsewhere = applied_elsewhere
        self._records: dict[str, _Record] = {}
        self._cached: dict[str, tuple[PolicyResource, EndpointsResource]] = {}
        self._open = False
        self._synced: set[ResourceKind] = set()

    @property
    def services(self) -> tuple[str, ...]:
        """The services subscribed to, in order of subscription."""
        return tuple(self._records)

    def subscribe(self, service: str) -> tuple[Subscribe, ...]:
        """Adds a service; returns the requests to send when a stream is open.

        Raises:
            InvalidValueError: the name is not a DNS label.
        """
        if service in self._records:
            return ()
        self._records[check_service_name(service)] = _Record(in_force=not self._applied_elsewhere)
        if not self._open:
            return ()
        return tuple(Subscribe(kind, (service,), resync=self._unsure(kind, (service,))) for kind in ResourceKind)

    def _unsure(self, kind: ResourceKind, names: tuple[str, ...]) -> tuple[str, ...]:
        if kind is ResourceKind.POLICY:
            return ()
        return tuple(name for name in names if not self._records[name].in_force)

    def restore(self, policies: Iterable[PolicyResource], endpoints: Iterable[EndpointsResource]) -> None:
        """Remembers what an earlier process held; `use_cache` makes it count."""
        by_name = {resource.service: resource for resource in endpoints}
        for policy in policies:
            if policy.service in by_name:
                self._cached[policy.service] = (policy, by_name[policy.service])

    def use_cache(self) -> frozenset[str]:
        """The control plane cannot be reached: what is cached counts until it can.

        Returns the services that became active.
        """
        changed = set()
        for name, record in self._records.items():
            if not record.confirmed and record.policy is None and record.endpoints is None and name in self._cached:
                record.policy, record.endpoints = self._cached[name]
                changed.add(name)
        return frozenset(changed)

    def opened(self) -> tuple[Subscribe, ...]:
        """A stream is open: the first request of each kind.

        Raises:
            InvalidTransitionError: one is open already.
        """
        if self._open:
            raise InvalidTransitionError("a discovery stream is open already")
        self._open = True
        self._synced.clear()
        return tuple(
            Subscribe(
                kind,
                self.services,
                held_versions={
                    name: held.version
                    for name, record in self._records.items()
                    if (held := record.policy if kind is ResourceKind.POLICY else record.endpoints) is not None
                    and (record.in_force or kind is ResourceKind.POLICY)
                },
                resync=self._unsure(kind, self.services),
            )
            for kind in ResourceKind
        )

    def closed(self) -> None:
        """The stream is gone; everything held stays."""
        self._open = False

    @property
    def in_sync(self) -> bool:
        """Whether the open stream has confirmed both kinds since it was opened."""
        return self._open and len(self._synced) == len(ResourceKind)

    def apply(self, update: Update) -> tuple[Acknowledge, frozenset[str]]:
        """Takes over what is good in a response.

        Returns:
            The answer to send, and the services of which something changed.

        Raises:
            InvalidTransitionError: no stream is open.
        """
        if not self._open:
            raise InvalidTransitionError("no discovery stream is open")
        self._synced.add(update.kind)
        changed: set[str] = set()
        resync: list[str] = []
        rejected = dict(update.invalid)
        for resource in update.resources:
            record = self._records.get(resource.service)
            if record is None:
                continue  # unsubscribed meanwhile
            if isinstance(resource, PolicyResource):
                record.policy = resource
            elif isinstance(resource, EndpointsResource):
                record.endpoints = resource
                record.in_force = not self._applied_elsewhere
            elif record.endpoints is None or record.endpoints.version != resource.base_version:
                resync.append(resource.service)
                continue
            else:
                try:
                    record.endpoints = resource.apply(record.endpoints)
                except InvalidValueError as error:
                    rejected[resource.service] = str(error)
                    continue
                record.in_force = not self._applied_elsewhere
            record.removed = False
            record.confirmed = True
            changed.add(resource.service)
        for name in update.removed:
            record = self._records.get(name)
            if record is None:
                continue
            record.confirmed = True
            if update.kind is ResourceKind.POLICY:
                record.policy = None
            else:
                record.endpoints = None
                record.in_force = not self._applied_elsewhere
            record.removed = True
            changed.add(name)
        return Acknowledge(update.kind, update.nonce, rejected, tuple(resync)), frozenset(changed)

    def applied(self, services: Iterable[str]) -> None:
        """The endpoints that are held of these services are in force, so that they may be acknowledged."""
        for name in services:
            self._records[name].in_force = True

    def resolution(self, service: str) -> Resolution:
        """What is known of a subscribed service."""
        record = self._records[service]
        if record.policy is not None and record.endpoints is not None:
            return Resolution.ACTIVE
        return Resolution.UNKNOWN if record.removed else Resolution.PENDING

    def policy(self, service: str) -> PolicyResource | None:
        """The policy held for a subscribed service."""
        return self._records[service].policy

    def endpoints(self, service: str) -> EndpointsResource | None:
        """The endpoints held for a subscribed service."""
        return self._records[service].endpoints

    def confirmed(self, service: str) -> bool:
        """Whether a control plane spoke of the service in this process."""
        return self._records[service].confirmed

    def active(self) -> tuple[tuple[PolicyResource, EndpointsResource], ...]:
        """What is worth keeping on disk: every active service, and what is cached of those not heard of yet."""
        kept = dict(self._cached)
        for name, record in self._records.items():
            if record.policy is not None and record.endpoints is not None:
                kept[name] = (record.policy, record.endpoints)
            elif record.removed:
                kept.pop(name, None)
        return tuple(kept.values())
