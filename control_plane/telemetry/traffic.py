"""Questions about the calls of the last minutes. Pure; every answer is bounded by what is kept."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from control_plane.telemetry.recorder import CalledState, Recorder, Reporter
from control_plane.telemetry.stats import Stats
from control_plane.telemetry.timeline import STEP, STEPS, WINDOW, Counters, add_up, step_of
from control_plane.telemetry.unreported import Unreported
from control_plane.telemetry.window import INSTANCE, EventKey, FailureExample, FailureKey, Window
from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import Reason

_LEAST = 0.1
"""Seconds that a rate is reckoned from at least."""
MAX_FAILURES = 100
"""Groups of failed calls in one answer."""


@dataclass(frozen=True, slots=True)
class Edge:
    """Calls of one service to another.

    Attributes:
        caller: who calls; empty for processes that belong to no service.
        service: who is called.
        calls: how they went.
        in_flight: calls that are under way.
        processes: processes of the caller that report and call the service.
        breakers_open: in how many of them the breaker is open or half-open.
        ejected: ids of endpoints that at least one of them has ejected.
        total: calls since its processes began to count, those included that have ended within the window.
        received: whether its caller does not report, and all of this is what instances of ``service`` received.
    """

    caller: str
    service: str
    calls: Stats
    in_flight: int = 0
    processes: int = 0
    breakers_open: int = 0
    ejected: tuple[str, ...] = ()
    total: int = 0
    received: bool = False


@dataclass(frozen=True, slots=True)
class EventEdge:
    """Events of one publisher and type that a group of a service handles.

    Attributes:
        publisher: who published.
        service: who handles.
        group: of that service.
        type: full name of the message.
        handled: calls of the handler, and how long it took.
    """

    publisher: str
    service: str
    group: str
    type: str
    handled: Stats


@dataclass(frozen=True, slots=True)
class MethodLoad:
    """Calls of one method, full name with leading slash."""

    method: str
    calls: Stats


@dataclass(frozen=True, slots=True)
class EndpointLoad:
    """Attempts on one endpoint, and how many processes have ejected it."""

    endpoint_id: str
    attempts: Stats
    ejected_by: int


@dataclass(frozen=True, slots=True)
class Failures:
    """Calls that failed in one way.

    Attributes:
        caller: who called.
        service: who was called.
        method: full name with leading slash.
        code: name of their status.
        reason: why; None when nobody said, or for one that this version does not know.
        count: how many.
        example: the last one that is known.
        received: whether the caller does not report, and they are those that instances of ``service`` answered so.
    """

    caller: str
    service: str
    method: str
    code: str
    reason: Reason | None
    count: int
    example: FailureExample | None
    received: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """What happened in one step.

    Attributes:
        ago: seconds since its end, 0 for the step that is not over.
        calls: how they went.
    """

    ago: float
    calls: Stats


@dataclass(frozen=True, slots=True)
class Event:
    """An ejection, or a transition of a breaker.

    Attributes:
        at: when, seconds.
        caller: the service of the process where it happened.
        node_id: the process.
        service: the service called.
        what: in words.
    """

    at: float
    caller: str
    node_id: str
    service: str
    what: str


@dataclass(frozen=True, slots=True)
class ReceivedStep:
    """What one instance received within one step. Its keys are caller and method.

    Attributes:
        instance_id: which instance.
        step: which step.
        calls: counters by caller and method.
        whole: counters of the instance as a whole.
    """

    instance_id: str
    step: int
    calls: dict[tuple[str, str], Counters] = field(default_factory=dict)
    whole: Counters = field(default_factory=dict)


class Traffic:
    """Answers questions. All times are seconds on the clock by which reports were taken in.

    Args:
        recorder: who reports.
        window: what they reported.
        since: when that began.
    """

    def __init__(self, recorder: Recorder, window: Window, since: float) -> None:
        self._recorder = recorder
        self._window = window
        self._since = since

    def reach(self, now: float, span: float) -> float:
        """Seconds that an answer about ``span`` covers: at most what is kept, or since it is."""
        return max(0.0, min(span, WINDOW, now - self._since))

    def edges(self, now: float, span: float = 60.0, service: str = "") -> list[Edge]:
        """Who called whom, ordered by caller and service; of one service, if it is given, its callers and its callees.

        Those whose last call was before ``span``, but within the window, are there too, without calls. Where callers
        do not report, it is what was received of them.
        """
        sums = self._window.edges.grouped(
            self._first(now, span),
            lambda key: (key.caller, key.service) if service in ("", key.caller, key.service) else None,
        )
        seconds = self._seconds(now, span)
        unreported = Unreported(self._window).edges(self._first(now, span), service)
        received: Counter[tuple[str, str]] = Counter()
        states: dict[tuple[str, str], list[CalledState]] = {}
        totals: Counter[tuple[str, str]] = Counter()
        for reporter in self._recorder.reporters:
            totals.update({(reporter.service, called): count for called, count in reporter.calls.items()})
            received.update(reporter.received)
            if reporter.connected:
                for state in reporter.called.values():
                    states.setdefault((reporter.service, state.service), []).append(state)
        told = [
            _edge(edge, Stats.of(counters, seconds[edge[0]]), states.get(edge, ()), totals[edge])
            for edge, counters in sums.items()
        ]
        told += [
            Edge(*edge, Stats.of(counters, seconds[edge[1]]), total=received[edge], received=True)
            for edge, counters in unreported.items()
        ]
        return sorted(told, key=lambda edge: (edge.caller, edge.service))

    def event_edges(self, now: float, span: float = 60.0, service: str = "") -> list[EventEdge]:
        """Who handled whose events, ordered by names; of one service, if it is given, those it handles or published."""
        sums = self._window.events.grouped(
            self._first(now, span), lambda key: key if service in ("", key.publisher, key.service) else None
        )
        seconds = self._seconds(now, span)
        return [
            EventEdge(key.publisher, key.service, key.group, key.type, Stats.of(counters, seconds[key.service]))
            for key, counters in sorted(sums.items(), key=lambda item: (item[0].publisher, item[0]))
        ]

    def handled(self, service: str, now: float, span: float = WINDOW) -> list[tuple[EventKey, Counters]]:
        """The events that each group of a service handled, by publisher and type, in no order."""
        sums = self._window.events.grouped(self._first(now, span), lambda key: key if key.service == service else None)
        return [*sums.items()]

    def calls_to(self, service: str, now: float, span: float = 60.0) -> Stats:
        """How the calls to a service went, all callers and methods together."""
        first = self._first(now, span)
        sums = self._window.edges.grouped(first, lambda key: service if key.service == service else None)
        add_up(sums.setdefault(service, {}), [Unreported(self._window).to(service, first)])
        return Stats.of(sums[service], self._seconds(now, span)[None])

    def callers(self, service: str) -> Iterator[tuple[Reporter, CalledState]]:
        """Processes that report now and call a service, with what they say of it."""
        for reporter in self._recorder.reporters:
            state = reporter.called.get(service)
            if reporter.connected and state is not None:
                yield reporter, state

    def methods(self, service: str, now: float, span: float = 60.0) -> list[MethodLoad]:
        """The methods of a service, all callers together, ordered by name."""
        first = self._first(now, span)
        sums = self._window.methods.grouped(first, lambda key: key.method if key.service == service else None)
        _merge(sums, Unreported(self._window).methods(service, first))
        seconds = self._seconds(now, span)[None]
        return [MethodLoad(method, Stats.of(counters, seconds)) for method, counters in sorted(sums.items())]

    def endpoints(self, service: str, now: float, span: float = 60.0) -> list[EndpointLoad]:
        """The endpoints of a service, all callers together, ordered by id."""
        first = self._first(now, span)
        sums = self._window.endpoints.grouped(first, lambda key: key.endpoint_id if key.service == service else None)
        _merge(sums, Unreported(self._window).endpoints(service, first))
        seconds = self._seconds(now, span)[None]
        ejected = [state.state.ejected for _, state in self.callers(service) if state.state is not None]
        return [
            EndpointLoad(endpoint_id, Stats.of(counters, seconds), sum(endpoint_id in ids for ids in ejected))
            for endpoint_id, counters in sorted(sums.items())
        ]

    def failures(self, now: float, span: float = WINDOW, service: str = "") -> list[Failures]:
        """Failed calls, to one service if it is given; the largest groups first, at most `MAX_FAILURES`."""
        first = self._first(now, span)
        sums = self._window.failures.grouped(first, lambda key: key if service in ("", key.service) else None)
        groups = [self._failures(key, sum(counters.values())) for key, counters in sums.items() if counters]
        answered = Unreported(self._window).failures(first, service)
        groups += [Failures(*key, count, None, received=True) for key, count in answered.items()]
        return sorted(groups, key=lambda each: (-each.count, each.caller, each.service, each.method))[:MAX_FAILURES]

    def failure_of(self, trace_id: str) -> Failures | None:
        """The failed call of a trace, if it is one of the examples that are kept."""
        for key, example in self._window.examples.items():
            if trace_id and example.example.detail.trace_id == trace_id:
                return self._failures(key, 1)
        return None

    def _failures(self, key: FailureKey, count: int) -> Failures:
        return Failures(*key, count, self._window.examples.get(key))

    def history(self, now: float, caller: str | None = None, service: str | None = None) -> list[Moment]:
        """Each step of the window, oldest first: of the calls of a caller, to a service, or of both; None for any."""
        last = step_of(now)
        first = max(last - STEPS + 1, step_of(self._since))
        by_step: dict[int, Counters] = {}
        for key in self._window.edges.keys():  # noqa: SIM118 - it is no dictionary
            if caller in (None, key.caller) and service in (None, key.service):
                for step, counters in self._window.edges.steps(key, first):
                    add_up(by_step.setdefault(step, {}), [counters])
        for step, counters in Unreported(self._window).steps(first, caller, service):
            add_up(by_step.setdefault(step, {}), [counters])
        return [
            Moment(
                max(0.0, now - (step + 1) * STEP),
                Stats.of(
                    by_step.get(step, {}), max(min(now, (step + 1) * STEP) - max(step * STEP, self._since), _LEAST)
                ),
            )
            for step in range(first, last + 1)
        ]

    def events(self, service: str = "") -> list[Event]:
        """Ejections and transitions of breakers, to one service if it is given; the latest first."""
        events = []
        for reporter in self._recorder.reporters:
            for state in reporter.called.values():
                if service in ("", state.service):
                    events += [
                        Event(at, reporter.service, reporter.node.id, state.service, what) for at, what in _told(state)
                    ]
        return sorted(events, key=lambda event: -event.at)

    def received(self, service: str, now: float, span: float = WINDOW) -> list[ReceivedStep]:
        """What each instance of a service received in each step, in order."""
        first = self._first(now, span)
        found: dict[tuple[str, int], ReceivedStep] = {}
        for key in self._window.received.keys():  # noqa: SIM118 - it is no dictionary
            if key.service != service:
                continue
            for step, counters in self._window.received.steps(key, first):
                made = found.setdefault((key.instance_id, step), ReceivedStep(key.instance_id, step))
                if (key.caller, key.method) == (INSTANCE, INSTANCE):
                    made.whole.update(counters)
                else:
                    made.calls[key.caller, key.method] = counters
        return [found[where] for where in sorted(found)]

    def knows(self, service: str) -> bool:
        """Whether any process spoke of a service within the window: as one that it calls, or that it is of."""
        return any(service == each.service or service in each.called for each in self._recorder.reporters)

    def _first(self, now: float, span: float) -> int:
        return step_of(now - self.reach(now, span))

    def _seconds(self, now: float, span: float) -> defaultdict[str | None, float]:
        """How many seconds an answer about ``span`` is about, by service of the caller; None for all together.

        What a process did since its last report is not known yet: so much, on average, is missing at the end.
        """
        whole = now - max(self._first(now, span) * STEP, self._since)
        lags: dict[str | None, list[float]] = {}
        for each in self._recorder.reporters:
            if each.connected:
                for caller in (each.service, None):
                    lags.setdefault(caller, []).append(min(now - each.last_at, STEP))
        known = {caller: max(_LEAST, whole - sum(each) / len(each)) for caller, each in lags.items()}
        return defaultdict(lambda: max(_LEAST, whole), known)


def _merge(sums: dict[str, Counters], more: dict[str, Counters]) -> None:
    for name, counters in more.items():
        add_up(sums.setdefault(name, {}), [counters])


def _edge(names: tuple[str, str], calls: Stats, states: Collection[CalledState], total: int) -> Edge:
    seen = [each.state for each in states if each.state is not None]
    return Edge(
        *names,
        calls,
        in_flight=sum(state.in_flight for state in seen),
        processes=len(states),
        breakers_open=sum(state.breaker is not BreakerState.CLOSED for state in seen),
        ejected=tuple(sorted({endpoint_id for state in seen for endpoint_id in state.ejected})),
        total=total,
    )


def _told(state: CalledState) -> Iterator[tuple[float, str]]:
    for ejection in state.ejections:
        seconds = ejection.until - ejection.at
        yield ejection.at, f"ejected {ejection.endpoint_id} for {seconds:.0f} s: {ejection.reason.value}"
    for transition in state.transitions:
        yield transition.at, f"breaker {transition.old.value} -> {transition.new.value}"
