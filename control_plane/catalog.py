"""Folds what sources say into the services and endpoints that the mesh publishes. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import assert_never

from control_plane.catalog_service import DrainMark, Listed, Lost, OperatorDrain, ServiceRecord, ServiceView
from control_plane.events import (
    EndpointDrained,
    EndpointEvent,
    EndpointUndrained,
    Registration,
    ServiceObserved,
    ServiceVanished,
    SourceConnected,
    SourceLost,
)
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import Endpoint, Health, check_service_name, sorted_endpoints


@dataclass(frozen=True, slots=True)
class CatalogSettings:
    """Times are in seconds.

    Raises:
        InvalidValueError: a value is below its range.
    """

    forget_after: float = 600.0
    """A service that no source lists any more stays known, and empty, for this long. At least 0."""
    guard_minimum: int = 4
    """The mass removal guard does not act when fewer endpoints were published before. At least 1."""
    guard_hold: float = 300.0
    """Held removals are published after this long without confirmation. Above 0; 0 turns the guard off."""
    guard_window: float = 5.0
    """Removals this close together count as one loss, for sources that report service by service. At least 0."""

    def __post_init__(self) -> None:
        for name, least in (("forget_after", 0.0), ("guard_minimum", 1), ("guard_hold", 0.0), ("guard_window", 0.0)):
            value = getattr(self, name)
            if not value >= least:
                raise InvalidValueError(name, value, f"at least {least:g}")


@dataclass(frozen=True, slots=True)
class RemovalHold:
    """What the mass removal guard keeps."""

    endpoints: int
    services: tuple[str, ...]
    since: float
    until: float


@dataclass(frozen=True, slots=True)
class SourceState:
    """Whether a source can be read."""

    name: str
    connected: bool
    detail: str
    since: float


@dataclass(frozen=True, slots=True)
class CatalogView:
    """Everything at one moment."""

    services: Mapping[str, ServiceView]
    hold: RemovalHold | None
    sources: tuple[SourceState, ...]
    next_deadline: float | None
    """When something changes by time alone; None: nothing does."""


class Catalog:
    """The services that sources list, as one machine.

    Published are the endpoints that some source lists, except those that drain, and except for the mass removal guard:
    when endpoints that did not drain vanish and less than half would be left of the most that was published within
    `CatalogSettings.guard_window`, those that vanished in this time stay published until they come back, are drained,
    the operator confirms, or `CatalogSettings.guard_hold` passes. Additions and changes are never held.

    A drained endpoint stays unpublished until its source stops listing it, or lists another process under its id: at
    another address, by another registration, or, where that does not tell processes apart, healthy after it was not.
    """

    def __init__(self, settings: CatalogSettings | None = None) -> None:
        self._settings = settings or CatalogSettings()
        self._services: dict[str, ServiceRecord] = {}
        self._vanished: dict[str, float] = {}
        self._losing: set[str] = set()
        self._sources: dict[str, SourceState] = {}
        self._views: dict[str, ServiceView] = {}
        self._dirty: set[str] = set()
        self._live = 0
        self._published = 0
        self._peaks: deque[tuple[float, int]] = deque()
        """Until when how many were published, within the guard's window: each entry lower than the one before."""
        self._hold_since: float | None = None
        self._awaited: dict[str, dict[str, OperatorDrain]] = {}
        """By service and id, what operators had drained before a restart and is not listed yet."""

    def restore_drains(self, drains: Iterable[OperatorDrain]) -> None:
        """Takes in what operators had drained before a restart; each holds once its endpoint is listed again."""
        for drain in drains:
            self._awaited.setdefault(drain.service, {})[drain.endpoint_id] = drain

    def operator_drains(self) -> list[OperatorDrain]:
        """What operators have drained, by service and id; what is not listed yet after a restart is among it."""
        drains = [drain for name, service in self._services.items() for drain in service.operator_drains(name)]
        drains += [drain for awaited in self._awaited.values() for drain in awaited.values()]
        return sorted(drains, key=lambda drain: (drain.service, drain.endpoint_id))

    def apply(self, event: EndpointEvent, now: float) -> bool:
        """Folds one event; whether anything that a view shows may have changed.

        Raises:
            InvalidValueError: a service name is wrong, or two endpoints of one service have one id. Nothing is changed.
        """
        match event:
            case ServiceObserved(source, name, endpoints, registrations):
                ordered = sorted_endpoints(endpoints)
                check_service_name(name)
                self.advance(now)
                return self._observe(source, name, ordered, registrations, now)
            case ServiceVanished(source, name):
                self.advance(now)
                return self._vanish(source, name, now)
            case EndpointDrained():
                self.advance(now)
                return self._drain(event, now)
            case EndpointUndrained():
                self.advance(now)
                return self._undrain(event, now)
            case SourceConnected(source):
                return self._source_is(source, True, "", now)
            case SourceLost(source, detail):
                return self._source_is(source, False, detail, now)
            case _:
                assert_never(event)

    def advance(self, now: float) -> bool:
        """Lets time act: holds end, vanished services are forgotten. Whether anything changed."""
        changed = False
        if self._hold_since is not None and now >= self._hold_since + self._settings.guard_hold:
            self._release(now)
            changed = True
        for name in [name for name in self._losing if self._forget_losses(name, now)]:
            self._losing.discard(name)
        due = [name for name, at in self._vanished.items() if now >= at + self._settings.forget_after]
        for name in due:
            if not self._services[name].held():
                self._losing.discard(name)
                del self._vanished[name], self._services[name]
                self._views.pop(name, None)
                self._dirty.discard(name)
                changed = True
        return changed

    def confirm_removals(self, now: float) -> int:
        """Publishes the removals that are held; how many there were."""
        self.advance(now)
        return self._release(now)

    def next_deadline(self) -> float | None:
        """When something that a view shows changes by time alone; None: nothing does."""
        deadlines = [
            at + self._settings.forget_after for name, at in self._vanished.items() if not self._services[name].held()
        ]
        if self._hold_since is not None:
            deadlines.append(self._hold_since + self._settings.guard_hold)
        return min(deadlines, default=None)

    def view(self, now: float) -> CatalogView:
        """Everything at ``now``. Services that did not change since the last view are the same objects."""
        self.advance(now)
        for name in self._dirty:
            self._views[name] = self._services[name].view(name, self._views.get(name))
        self._dirty.clear()
        return CatalogView(
            services=MappingProxyType(dict(self._views)),
            hold=self._view_hold(),
            sources=tuple(self._sources[name] for name in sorted(self._sources)),
            next_deadline=self.next_deadline(),
        )

    def _observe(
        self,
        source: str,
        name: str,
        endpoints: tuple[Endpoint, ...],
        registrations: Mapping[str, Registration],
        now: float,
    ) -> bool:
        service = self._services.setdefault(name, ServiceRecord())
        before = service.by_source.get(source)
        known = before or {}
        after = {}
        for endpoint in endpoints:
            registration = registrations.get(endpoint.id, Registration())
            old = known.get(endpoint.id)
            same = old is not None and (old.endpoint, old.registration) == (endpoint, registration)
            after[endpoint.id] = old if old is not None and same else Listed(endpoint, source, now, registration)
        if before == after:
            return False
        service.by_source[source] = after
        self._vanished.pop(name, None)
        self._merge(name, service, now)
        return True

    def _vanish(self, source: str, name: str, now: float) -> bool:
        service = self._services.get(name)
        if service is None or source not in service.by_source:
            return False
        service.last_sources = tuple(sorted(service.by_source))
        del service.by_source[source]
        if not service.by_source:
            self._vanished[name] = now
        self._merge(name, service, now)
        self.advance(now)
        return True

    def _merge(self, name: str, service: ServiceRecord, now: float) -> None:
        before = service.listed
        merged: dict[str, Listed] = {}
        for source in sorted(service.by_source):
            for endpoint_id, listed in service.by_source[source].items():
                merged.setdefault(endpoint_id, listed)
        lost = {
            endpoint_id: Lost(listed, now)
            for endpoint_id, listed in before.items()
            if endpoint_id not in merged and service.is_live(listed)
        }
        leaving = sum(
            service.is_live(listed) and endpoint_id in merged and merged[endpoint_id].endpoint.health is Health.DRAINING
            for endpoint_id, listed in before.items()
        )
        service.drained = {
            endpoint_id: mark
            for endpoint_id, mark in service.drained.items()
            if endpoint_id in merged and mark.holds(merged[endpoint_id])
        }
        service.listed = merged
        self._remember(name, service)
        for endpoint_id in service.lost.keys() & merged.keys():
            del service.lost[endpoint_id]
        service.lost.update(lost)
        if service.lost:
            self._losing.add(name)
        self._dirty.add(name)
        self._count(service)
        self._leave(leaving)
        if lost:
            self._guard(now)
        self._settle(now)

    def _drain(self, event: EndpointDrained, now: float) -> bool:
        # A drain of an endpoint that is not listed is not remembered: the mark would hit the next process of that id.
        service = self._services.get(event.service)
        if service is None:
            return False
        left = service.drain(event.endpoint_id, event.operator, event.at)
        if left is None:
            if event.endpoint_id not in service.lost:
                return False
            left = service.lost.pop(event.endpoint_id).held
        self._leave(left)
        self._marked(event.service, service, now)
        return True

    def _undrain(self, event: EndpointUndrained, now: float) -> bool:
        service = self._services.get(event.service)
        if service is None or not service.undrain(event.endpoint_id):
            return False
        self._marked(event.service, service, now)
        return True

    def _marked(self, name: str, service: ServiceRecord, now: float) -> None:
        self._dirty.add(name)
        self._count(service)
        self._settle(now)

    def _source_is(self, name: str, connected: bool, detail: str, now: float) -> bool:
        state = self._sources.get(name)
        if state is not None and state.connected == connected:
            self._sources[name] = replace(state, detail=detail)
            return state.detail != detail
        self._sources[name] = SourceState(name, connected, detail, now)
        return True

    def _remember(self, name: str, service: ServiceRecord) -> None:
        """Marks anew what was drained by operators before a restart, once it is listed and still is what it was."""
        for endpoint_id in service.listed.keys() & self._awaited.get(name, {}).keys():
            drain = self._awaited[name].pop(endpoint_id)
            mark = DrainMark(drain.target, drain.registration, False, drain.operator, drain.at)
            if mark.holds(service.listed[endpoint_id]):
                service.drained.setdefault(endpoint_id, mark)

    def _count(self, service: ServiceRecord) -> None:
        live = sum(service.is_live(listed) for listed in service.listed.values())
        self._live += live - service.live
        service.live = live

    def _guard(self, now: float) -> None:
        """Holds every recent loss when too little is left of the most that was published within the window."""
        while self._peaks and now >= self._peaks[0][0] + self._settings.guard_window:
            self._peaks.popleft()
        before = max(self._published, self._peaks[0][1] if self._peaks else 0)
        if not self._settings.guard_hold or before < self._settings.guard_minimum or 2 * self._live >= before:
            return
        for name in self._losing:
            for loss in self._services[name].lost.values():
                loss.held = True
            self._dirty.add(name)
        if self._hold_since is None:
            self._hold_since = now

    def _forget_losses(self, name: str, now: float) -> bool:
        """Forgets the losses that were published long enough ago; whether none is left."""
        service = self._services[name]
        service.lost = {
            endpoint_id: lost
            for endpoint_id, lost in service.lost.items()
            if lost.held or now < lost.at + self._settings.guard_window
        }
        return not service.lost

    def _release(self, now: float) -> int:
        released = 0
        for name, service in self._holding():
            released += service.held()
            service.lost = {endpoint_id: lost for endpoint_id, lost in service.lost.items() if not lost.held}
            self._dirty.add(name)
        self._leave(released)
        self._settle(now)
        return released

    def _leave(self, count: int) -> None:
        """So many published endpoints go on purpose: the guard forgets that they were there."""
        if count:
            self._published -= count
            self._peaks = deque((until, published - count) for until, published in self._peaks)

    def _settle(self, now: float) -> None:
        """Ends a hold that holds nothing, and remembers how many are published."""
        held = sum(service.held() for _, service in self._holding())
        if not held:
            self._hold_since = None
        published = self._live + held
        if published != self._published:
            while self._peaks and self._peaks[-1][1] <= self._published:
                self._peaks.pop()
            self._peaks.append((now, self._published))
            self._published = published

    def _holding(self) -> Iterator[tuple[str, ServiceRecord]]:
        for name in self._losing:
            if self._services[name].held():
                yield name, self._services[name]

    def _view_hold(self) -> RemovalHold | None:
        if self._hold_since is None:
            return None
        holding = sorted(self._holding(), key=lambda item: item[0])
        return RemovalHold(
            endpoints=sum(service.held() for _, service in holding),
            services=tuple(name for name, _ in holding),
            since=self._hold_since,
            until=self._hold_since + self._settings.guard_hold,
        )
