"""What the mesh believes of Consul's catalog, given what Consul answers and may have lost. Pure.

An answer is not always the truth: under ACLs a token without rights gets an empty catalog and status 200, and an agent
or a server that lost its state shows a catalog that fills up again only as every agent's anti-entropy comes round (a
minute, and longer in large clusters: https://developer.hashicorp.com/consul/docs/architecture/anti-entropy).
So removals are believed only from a view that can see them, and for a while after a restart not at all. Additions and
changes are believed at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from control_plane.events import Registration, ServiceObserved, ServiceVanished
from control_plane.sources.consul_answers import ServiceList
from mesh_client.core.model import Endpoint, Health, sorted_endpoints

SOURCE = "consul"

EMPTY_CATALOG = (
    "Consul answers with an empty catalog, which it never is: the token, or the anonymous one where none is given, "
    'lacks rights; it needs service_prefix "" {policy = "read"} and node_prefix "" {policy = "read"}'
)
FEWER_RIGHTS = (
    "Consul shows fewer services than this token was allowed to see before: its policies were changed; give it "
    'service_prefix "" {policy = "read"} again, or restart the control plane to accept what it sees now'
)

ViewEvent = ServiceObserved | ServiceVanished


@dataclass(slots=True)
class _Service:
    listed: bool = True
    truth: tuple[Endpoint, ...] = ()
    """As answered last."""
    kept: dict[str, Endpoint] = field(default_factory=dict)
    """Not in the last answer, but kept until the hold ends."""
    registrations: Mapping[str, Registration] = field(default_factory=dict)
    """Of the last answer, by endpoint id."""
    emitted: tuple[Endpoint, ...] | None = None
    emitted_registrations: Mapping[str, Registration] = field(default_factory=dict)


class ConsulView:
    """Folds answers into events.

    Args:
        hold: seconds after a restart in which nothing is removed.
    """

    def __init__(self, hold: float = 90.0) -> None:
        self._hold = hold
        self._hold_until: float | None = None
        self._was_complete = False
        self._services: dict[str, _Service] = {}

    @property
    def watched(self) -> frozenset[str]:
        """Services whose endpoints are to be watched."""
        return frozenset(self._services)

    def is_listed(self, service: str) -> bool:
        """Whether the last list named the service."""
        found = self._services.get(service)
        return found is not None and found.listed

    def next_tick(self) -> float | None:
        """When `tick` has something to do, monotonic seconds; None when nothing is held."""
        return self._hold_until

    def services(self, answer: ServiceList, restarted: bool, now: float) -> tuple[list[ViewEvent], str | None]:
        """Takes a list of services in.

        Returns:
            Events, and why the answer is not believed; None when it is.
        """
        if answer.empty:
            return [], EMPTY_CATALOG
        if self._was_complete and not answer.complete:
            return [], FEWER_RIGHTS
        self._was_complete = answer.complete
        if restarted:
            self._begin_hold(now)
        for name in answer.names:
            self._services.setdefault(name, _Service())
        for name, service in self._services.items():
            service.listed = name in answer.names
        return self._forget_unlisted(now), None

    def endpoints(
        self,
        name: str,
        endpoints: tuple[Endpoint, ...],
        restarted: bool,
        now: float,
        registrations: Mapping[str, Registration] = MappingProxyType({}),
    ) -> list[ViewEvent]:
        """Takes the endpoints of a service in. Those of a service that is not watched any more are ignored.

        Args:
            name: the service.
            endpoints: as answered, ordered by id.
            restarted: Consul may have lost what it knew.
            now: monotonic seconds.
            registrations: what tells registrations apart, by endpoint id.
        """
        service = self._services.get(name)
        if service is None:
            return []
        if restarted:
            self._begin_hold(now)
        service.truth, service.registrations = endpoints, registrations
        if self._holds(now):
            for endpoint in service.emitted or ():
                if endpoint.health is not Health.DRAINING:
                    service.kept.setdefault(endpoint.id, endpoint)
        return self._settle(name, service)

    def tick(self, now: float) -> list[ViewEvent]:
        """Believes the removals that were held, once the hold is over."""
        if self._hold_until is None or now < self._hold_until:
            return []
        self._hold_until = None
        events = self._forget_unlisted(now)
        for name, service in self._services.items():
            if service.kept:
                service.kept.clear()
                events += self._settle(name, service)
        return events

    def _begin_hold(self, now: float) -> None:
        if self._services:
            self._hold_until = now + self._hold

    def _holds(self, now: float) -> bool:
        return self._hold_until is not None and now < self._hold_until

    def _forget_unlisted(self, now: float) -> list[ViewEvent]:
        if self._holds(now):
            return []
        gone = {name: service for name, service in self._services.items() if not service.listed}
        for name in gone:
            del self._services[name]
        return [ServiceVanished(SOURCE, name) for name, service in gone.items() if service.emitted is not None]

    @staticmethod
    def _settle(name: str, service: _Service) -> list[ViewEvent]:
        # What came back under the same id or the same address is not missing.
        ids = {endpoint.id for endpoint in service.truth}
        targets = {endpoint.target for endpoint in service.truth}
        for endpoint_id, endpoint in list(service.kept.items()):
            if endpoint_id in ids or endpoint.target in targets:
                del service.kept[endpoint_id]
        believed = sorted_endpoints((*service.truth, *service.kept.values()))
        # What is kept is still the same registration: it may be leaving, which must not be forgotten.
        before = service.emitted_registrations
        registrations = {each: before[each] for each in service.kept if each in before} | dict(service.registrations)
        if (believed, registrations) == (service.emitted, before):
            return []
        service.emitted, service.emitted_registrations = believed, registrations
        return [ServiceObserved(SOURCE, name, believed, registrations)]
