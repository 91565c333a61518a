"""What a process reports of its calls, and what it has to send of it.

Counters are cumulative, since the moment that the process began to count. So a report that is lost, or comes twice,
loses and doubles nothing, and who never heard the process before knows all of it by one report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import Reason
from mesh_client.core.incidents import Example, Transition
from mesh_client.core.outlier import Ejection
from mesh_client.core.served import ServedBook
from mesh_client.core.service import Service
from mesh_client.core.store import Resolution
from mesh_client.core.tally import GONE, OTHER, Tally


@dataclass(frozen=True, slots=True)
class Totals:
    """How calls, or attempts, ended since the beginning.

    Attributes:
        codes: how many, by name of their status.
        buckets: how many, by number of the bucket of their duration, see `mesh_client.core.tally.BOUNDS`.
    """

    codes: Mapping[str, int]
    buckets: Mapping[int, int]

    @property
    def count(self) -> int:
        """How many."""
        return sum(self.codes.values())

    @classmethod
    def of(cls, tally: Tally) -> Totals:
        """What a tally holds."""
        codes = {"OK": tally.ok, **tally.failures}
        return cls(
            {code: count for code, count in codes.items() if count},
            {bucket: count for bucket, count in enumerate(tally.buckets) if count},
        )


@dataclass(frozen=True, slots=True)
class MethodTotals:
    """Whole calls of one method, and how many attempts they took."""

    method: str
    calls: Totals
    attempts: int


@dataclass(frozen=True, slots=True)
class EndpointTotals:
    """Attempts on one endpoint."""

    endpoint_id: str
    attempts: Totals


@dataclass(frozen=True, slots=True)
class FailureTotals:
    """Calls that failed in one way.

    Attributes:
        method: full name with leading slash.
        code: name of their status.
        reason: why; None for one that this version does not know.
        count: how many.
        example: the last one; None when only the number is known.
    """

    method: str
    code: str
    reason: Reason | None
    count: int
    example: Example | None = None


@dataclass(frozen=True, slots=True)
class ServiceState:
    """One service as its client sees it now."""

    resolution: Resolution
    policy_version: str
    endpoints_version: str
    breaker: BreakerState
    ejected: tuple[str, ...]
    """Ids of endpoints."""
    endpoints: int
    """How many there are."""
    in_flight: int
    """Calls."""
    retries: int
    """Since the beginning."""
    budget: int
    """Retries that are left, rounded down."""


@dataclass(frozen=True, slots=True)
class CalledService:
    """What changed of one service that a process calls. Times are on the clock of whoever holds this."""

    service: str
    state: ServiceState | None = None
    methods: tuple[MethodTotals, ...] = ()
    endpoints: tuple[EndpointTotals, ...] = ()
    failures: tuple[FailureTotals, ...] = ()
    ejections: tuple[Ejection, ...] = ()
    transitions: tuple[Transition, ...] = ()


@dataclass(frozen=True, slots=True)
class ReceivedTotals:
    """Calls of one method that one caller made, as the server counted them. An empty caller is nobody of the mesh."""

    caller: str
    method: str
    calls: Totals


@dataclass(frozen=True, slots=True)
class ServedInstance:
    """What changed of one server of a process."""

    service: str
    instance_id: str
    in_flight: int
    peak_in_flight: int
    """Since the report before."""
    unauthorized: int
    """Calls refused because of who called, since the beginning."""
    rate_limited: int
    """Calls refused by rate limits, since the beginning."""
    shed: int
    """Calls refused because too many were in flight, since the beginning."""
    received: tuple[ReceivedTotals, ...] = ()


@dataclass(frozen=True, slots=True)
class EventTotals:
    """Calls of a group's handler for events of one type by one publisher."""

    publisher: str
    type: str
    handled: Totals


@dataclass(frozen=True, slots=True)
class ConsumedGroup:
    """What changed of the events that one group of the process's service handled in it."""

    group: str
    events: tuple[EventTotals, ...]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What changed since the report before.

    Attributes:
        covers: seconds since the counters were looked at before, whether or not that was worth a report.
        called: services that the process calls.
        served: servers that run in it.
        consumed: groups that handle events in it.
    """

    covers: float
    called: tuple[CalledService, ...] = ()
    served: tuple[ServedInstance, ...] = ()
    consumed: tuple[ConsumedGroup, ...] = ()

    def __bool__(self) -> bool:
        """Whether anything changed."""
        return bool(self.called or self.served or self.consumed)


@dataclass(frozen=True, slots=True)
class Server:
    """One server, as far as its load is reported."""

    service: str
    instance_id: str
    book: ServedBook
    in_flight: int


@dataclass(frozen=True, slots=True)
class Consumer:
    """One group that handles events, as far as its load is reported.

    Attributes:
        group: its name.
        book: calls of its handlers; the methods are message types with a leading slash, the callers publishers.
    """

    group: str
    book: ServedBook


class ReportBuilder:
    """Finds what changed since it looked last.

    Args:
        now: when counting began, seconds.
    """

    def __init__(self, now: float) -> None:
        self._sent: dict[tuple[object, ...], object] = {}
        self._sent_endpoints: dict[str, dict[str, int]] = {}
        """Attempts by service and endpoint; those that are gone for long are forgotten."""
        self._looked_at = now

    def reset(self) -> None:
        """Whoever gets the next report knows nothing of those before."""
        self._sent.clear()
        self._sent_endpoints.clear()

    def look(
        self,
        services: Iterable[Service],
        servers: Iterable[Server],
        now: float,
        consumers: Iterable[Consumer] = (),
    ) -> LoadReport:
        """What changed. It counts as sent."""
        covers, self._looked_at = now - self._looked_at, now
        found = (self._called(service, now) for service in services)
        called = tuple(each for each in found if each is not None)
        heard = (self._served(server) for server in servers)
        served = tuple(each for each in heard if each is not None)
        consumed = tuple(each for each in map(self._consumed, consumers) if each.events)
        return LoadReport(covers, called, served, consumed)

    def _called(self, service: Service, now: float) -> CalledService | None:
        name = service.name
        state = _state(service, now)
        new_state = state if self._changed(("state", name), state) else None
        methods, endpoints = self._methods(service), self._endpoints(service)
        failures = tuple(self._failures(service))
        incidents = service.incidents
        ejections = tuple(incidents.ejections.after(self._passed(("ejections", name), incidents.ejections.count)))
        transitions = incidents.transitions.after(self._passed(("transitions", name), incidents.transitions.count))
        if new_state is None and not (methods or endpoints or failures or ejections or transitions):
            return None
        return CalledService(name, new_state, methods, endpoints, failures, ejections, tuple(transitions))

    def _methods(self, service: Service) -> tuple[MethodTotals, ...]:
        attempts: dict[str, int] = {}
        for _, tallies in service.tallies:
            for method, tally in tallies.items():
                attempts[method] = attempts.get(method, 0) + tally.count
        # Failed calls without an attempt, and calls that went on, are counted elsewhere.
        repeated = sum(tally.count for tally in service.repeated.values())
        if not self._changed(
            ("calls", service.name), (tuple(attempts.values()), service.failed_calls.total(), repeated)
        ):
            return ()
        return tuple(
            MethodTotals(method, Totals.of(tally), attempts.get(method, 0))
            for method, tally in service.calls_by_method().items()
            if self._changed(("method", service.name, method), (tally.count, attempts.get(method, 0)))
        )

    def _endpoints(self, service: Service) -> tuple[EndpointTotals, ...]:
        found = []
        sent, now = self._sent_endpoints.get(service.name, {}), {}
        for endpoint_id, tallies in service.tallies:
            # What is counted together for those that left long ago was reported by their names.
            if endpoint_id == GONE:
                continue
            count = now[endpoint_id] = sum(tally.count for tally in tallies.values())
            if count != sent.get(endpoint_id, 0):
                whole = Tally()
                for tally in tallies.values():
                    whole.add(tally)
                found.append(EndpointTotals(endpoint_id, Totals.of(whole)))
        self._sent_endpoints[service.name] = now
        return tuple(found)

    def _failures(self, service: Service) -> Iterable[FailureTotals]:
        for key, count in service.failed_calls.items():
            if self._changed(("failure", service.name, *key), count):
                yield FailureTotals(*key, count, service.incidents.examples.get(key))

    def _served(self, server: Server) -> ServedInstance | None:
        where, book = (server.service, server.instance_id), server.book
        received = tuple(
            ReceivedTotals(caller, method, Totals.of(tally))
            for method, tallies in book
            for caller, tally in tallies.items()
            if self._changed(("received", *where, caller, method), tally.count)
        )
        peak = book.take_peak(server.in_flight)
        figures = (server.in_flight, peak, book.unauthorized, book.rate_limited, book.shed)
        if not self._changed(("server", *where), figures) and not received:
            return None
        return ServedInstance(*where, *figures, received)

    def _consumed(self, consumer: Consumer) -> ConsumedGroup:
        return ConsumedGroup(
            consumer.group,
            tuple(
                EventTotals(publisher, method if method == OTHER else method.removeprefix("/"), Totals.of(tally))
                for method, tallies in consumer.book
                for publisher, tally in tallies.items()
                if tally.count and self._changed(("consumed", consumer.group, publisher, method), tally.count)
            ),
        )

    def _changed(self, key: tuple[object, ...], value: object) -> bool:
        if self._sent.get(key) == value:
            return False
        self._sent[key] = value
        return True

    def _passed(self, key: tuple[object, ...], count: int) -> int:
        """The number of the last event that was sent; ``count`` is that of the last one there is."""
        sent = self._sent.get(key, 0)
        self._sent[key] = count
        return sent if isinstance(sent, int) else 0


def _state(service: Service, now: float) -> ServiceState:
    return ServiceState(
        service.resolution,
        service.policy_version,
        service.endpoints_version,
        service.breaker.state(now),
        tuple(sorted(service.outliers.ejected)),
        len(service.nodes),
        service.gate.in_flight,
        service.retries,
        int(service.budget.balance(now)),
    )
