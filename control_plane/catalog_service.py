"""What the catalog knows of one service: what sources list, what is leaving, what was lost. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from control_plane.events import Registration
from mesh_client.core.model import Endpoint, Health


@dataclass(frozen=True, slots=True)
class OperatorDrain:
    """An endpoint that an operator has taken out of what clients get, and how to know it again."""

    service: str
    endpoint_id: str
    target: str
    """``host:port``."""
    registration: Registration
    operator: str
    """Who drained it."""
    at: float
    """When, seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """One endpoint as operators see it."""

    endpoint: Endpoint
    """With health DRAINING once it was drained."""
    source: str
    changed_at: float
    held: bool
    """Only the mass removal guard keeps it."""
    drained_by: str = ""
    """The operator who drained it; empty when none did."""


@dataclass(frozen=True, slots=True)
class ServiceView:
    """One known service."""

    service: str
    sources: tuple[str, ...]
    """That list it; of a service that none lists, those that did last."""
    records: tuple[EndpointRecord, ...]
    """Every endpoint ordered by id, those included that are leaving."""
    published: tuple[Endpoint, ...]
    """What clients get, ordered by id. The same object as in the view before when nothing changed."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An endpoint that a source lists."""

    endpoint: Endpoint
    source: str
    changed_at: float
    registration: Registration


@dataclass(slots=True)
class DrainMark:
    """The mark of an endpoint that leaves, because it asked to or an operator did."""

    target: str
    registration: Registration
    was_away: bool
    """It was listed as unhealthy or leaving since."""
    operator: str = ""
    """Who drained it; empty when it asked itself."""
    at: float = 0.0
    """When the operator did, seconds since the epoch."""

    def holds(self, listed: Listed) -> bool:
        """Whether what is listed now is still what the mark was meant for.

        An operator's outlasts bad health: whoever is looked into may well be unhealthy meanwhile.
        """
        healthy = listed.endpoint.health is Health.HEALTHY
        if (listed.endpoint.target, listed.registration) != (self.target, self.registration):
            return False
        if healthy and self.was_away and not self.registration.of_process and not self.operator:
            return False
        self.was_away |= not healthy
        return True


@dataclass(slots=True)
class Lost:
    """A published endpoint that its source stopped listing without draining it."""

    listed: Listed
    at: float
    held: bool = False


@dataclass(slots=True)
class ServiceRecord:
    """One service, changed in place by the catalog."""

    by_source: dict[str, dict[str, Listed]] = field(default_factory=dict)
    listed: dict[str, Listed] = field(default_factory=dict)
    """All sources merged; where two list one id, the source whose name sorts first has it."""
    drained: dict[str, DrainMark] = field(default_factory=dict)
    """By id, endpoints that are leaving and are listed still."""
    lost: dict[str, Lost] = field(default_factory=dict)
    last_sources: tuple[str, ...] = ()
    live: int = 0

    def is_live(self, listed: Listed) -> bool:
        """Whether clients get what is listed."""
        return listed.endpoint.health is not Health.DRAINING and listed.endpoint.id not in self.drained

    def held(self) -> int:
        """How many endpoints only the mass removal guard keeps."""
        return sum(lost.held for lost in self.lost.values())

    def drain(self, endpoint_id: str, operator: str, at: float) -> bool | None:
        """Marks a listed endpoint; whether it was given to clients before, or None when nothing changes.

        An endpoint that asks itself is not an operator's any more: it is about to end.
        """
        listed, mark = self.listed.get(endpoint_id), self.drained.get(endpoint_id)
        if listed is None:
            return None
        if mark is not None:
            if not mark.operator or operator:
                return None
            mark.operator, mark.at = "", 0.0
            return False
        live = self.is_live(listed)
        away = listed.endpoint.health is not Health.HEALTHY
        self.drained[endpoint_id] = DrainMark(listed.endpoint.target, listed.registration, away, operator, at)
        return live

    def undrain(self, endpoint_id: str) -> bool:
        """Takes an operator's mark away; False when there is none."""
        mark = self.drained.get(endpoint_id)
        if mark is None or not mark.operator:
            return False
        del self.drained[endpoint_id]
        return True

    def operator_drains(self, name: str) -> list[OperatorDrain]:
        """What operators have drained, of the service of this name."""
        return [
            OperatorDrain(name, endpoint_id, mark.target, mark.registration, mark.operator, mark.at)
            for endpoint_id, mark in self.drained.items()
            if mark.operator
        ]

    def view(self, name: str, before: ServiceView | None) -> ServiceView:
        """The service as others see it; what did not change is the same object as before."""
        records = []
        for endpoint_id, listed in self.listed.items():
            mark, endpoint = self.drained.get(endpoint_id), listed.endpoint
            if mark is not None:
                endpoint = replace(endpoint, health=Health.DRAINING)
            by = "" if mark is None else mark.operator
            records.append(EndpointRecord(endpoint, listed.source, listed.changed_at, held=False, drained_by=by))
        records += [
            EndpointRecord(lost.listed.endpoint, lost.listed.source, lost.listed.changed_at, held=True)
            for lost in self.lost.values()
            if lost.held
        ]
        records.sort(key=lambda record: record.endpoint.id)
        published = tuple(record.endpoint for record in records if record.endpoint.health is not Health.DRAINING)
        if before is not None and before.published == published:
            published = before.published
        return ServiceView(name, tuple(sorted(self.by_source)) or self.last_sources, tuple(records), published)
