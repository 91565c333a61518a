"""Turns what processes report, cumulative counters, into what happened when. Pure.

For each process it keeps the last value of each counter: what is above it is new. A process that begins to count anew
says so by another epoch. What a report says is checked as a whole before any of it counts.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from control_plane.subscription import ClientNode
from control_plane.telemetry.timeline import (
    ATTEMPTS,
    BUSY,
    CODES,
    FIRST_BUCKET,
    PEAK,
    RATE_LIMITED,
    SHED,
    STEP,
    UNAUTHORIZED,
    WINDOW,
    Counters,
)
from control_plane.telemetry.window import (
    INSTANCE,
    EndpointKey,
    EventKey,
    FailureExample,
    FailureKey,
    Limits,
    MethodKey,
    ReceivedKey,
    ReportedKey,
    Window,
)
from mesh_client.core.errors import InvalidValueError, MeshError
from mesh_client.core.events.state import RelayState
from mesh_client.core.incidents import Transition
from mesh_client.core.load_report import LoadReport, ServedInstance, ServiceState, Totals
from mesh_client.core.outlier import Ejection
from mesh_client.core.tally import BOUNDS

MAX_RATE = 1_000_000.0
"""Calls a second of one thing that one process can be believed to make."""
MAX_UPTIME = 10 * 366 * 86_400.0
MAX_SERVICES = 500
"""Services that one process calls, and servers in it, of which the state is kept."""
MAX_EVENTS = 20
"""Ejections, and transitions of breakers, that are kept of each process and service."""

_EPOCH = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_MIDDLES = tuple(
    round((lower + upper) / 2 * 1e6) for lower, upper in zip((0.0, *BOUNDS), (*BOUNDS, BOUNDS[-1]), strict=True)
)
"""Microseconds that a call of each bucket took, about."""


class TooManyReportersError(MeshError):
    """As many processes report as may."""


class SupersededError(MeshError):
    """The process has opened another stream since; what comes on this one is older."""


@dataclass(frozen=True, slots=True)
class OutboxReport:
    """An outbox of events, as a process sees it.

    Attributes:
        events: how many wait.
        max_events: for how many there is room.
        oldest: when the oldest was published, seconds since the epoch; None when there is none.
        refused: events that the broker will never take.
        relay: what becomes of them; None for something that this version does not know.
        broker: the same in words.
    """

    events: int
    max_events: int
    oldest: float | None
    refused: int
    relay: RelayState | None
    broker: str

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits, and what comes is sent."""
        return not (self.events or self.refused) and self.relay in (RelayState.CONNECTED, RelayState.STANDBY)


@dataclass(frozen=True, slots=True)
class ProcessState:
    """A process as a whole.

    Attributes:
        control_plane: state of its discovery stream, in words.
        certificate_expires: seconds since the epoch; None in plaintext, and without a certificate.
        identity_warning: what an operator should know of its identity, or empty.
        outbox: of events; None when it has none.
    """

    control_plane: str = ""
    certificate_expires: float | None = None
    identity_warning: str = ""
    outbox: OutboxReport | None = None


class CalledState:
    """One service as one process saw it last."""

    __slots__ = ("ejections", "service", "state", "transitions")

    def __init__(self, service: str) -> None:
        self.service = service
        self.state: ServiceState | None = None
        self.ejections: deque[Ejection] = deque(maxlen=MAX_EVENTS)
        self.transitions: deque[Transition] = deque(maxlen=MAX_EVENTS)


class Reporter:
    """One process from when it began to count.

    Attributes:
        node: who it is.
        epoch: which beginning.
        owner: whose room it takes; empty for nobody's.
        last_at: when it reported last; when it came, until then.
        gone_at: when it stopped reporting; None while it does.
        process: it as a whole.
        called: the services that it calls, by name.
        served: the servers in it, by id of their instance.
    """

    def __init__(self, node: ClientNode, epoch: str, owner: str, now: float) -> None:
        self.node = node
        self.epoch = epoch
        self.owner = owner
        self.generation = 0
        self.last_at = now
        self.gone_at: float | None = None
        self.process = ProcessState()
        self.called: dict[str, CalledState] = {}
        self.served: dict[str, ServedInstance] = {}
        self.known: dict[ReportedKey, Counters] = {}
        """The last value of each counter."""
        self.calls: Counter[str] = Counter()
        """Calls since the epoch, by service called."""
        self.received: Counter[tuple[str, str]] = Counter()
        """Calls that its servers received since the epoch, by caller and service."""

    @property
    def service(self) -> str:
        """The service that it belongs to."""
        return self.node.service

    @property
    def connected(self) -> bool:
        """Whether it reports now."""
        return self.gone_at is None


class Session:
    """One stream of a process."""

    __slots__ = ("generation", "heard", "interval", "reporter")

    def __init__(self, reporter: Reporter, interval: float) -> None:
        self.reporter = reporter
        self.generation = reporter.generation
        self.interval = interval
        """Seconds in which what the first report brings has happened."""
        self.heard = False


class Recorder:
    """All processes that report, or did lately.

    Args:
        window: where what happened goes.
        limits: how much is kept.

    Attributes:
        taken: reports that were taken in.
        ignored: counters that were left out for want of room.
    """

    def __init__(self, window: Window, limits: Limits | None = None) -> None:
        self._window = window
        self._limits = limits or Limits()
        # By workload first: node id and epoch are what a process says of itself.
        self._reporters: dict[tuple[str, str, str, str], Reporter] = {}
        self._series = 0
        self.taken = 0
        self.ignored = 0

    @property
    def reporters(self) -> Collection[Reporter]:
        """Every process."""
        return self._reporters.values()

    @property
    def connected(self) -> int:
        """How many report now."""
        return sum(reporter.connected for reporter in self._reporters.values())

    def outboxes(self) -> Iterator[tuple[str, str, OutboxReport]]:
        """Service, process and outbox of all that report one now."""
        for reporter in self._reporters.values():
            if reporter.connected and reporter.process.outbox is not None:
                yield reporter.service, reporter.node.id, reporter.process.outbox

    def open(self, node: ClientNode, epoch: str, uptime: float, owner: str, now: float) -> Session:
        """A process begins to report, or goes on after its stream broke. An older stream of it is over.

        Args:
            node: who it is; whether it may be that is decided elsewhere.
            epoch: made up when it began to count.
            uptime: seconds since then.
            owner: whose room it takes: its workload; empty for nobody's.
            now: seconds.

        Raises:
            InvalidValueError: the epoch or the uptime cannot be.
            TooManyReportersError: there is no room.
        """
        if not _EPOCH.fullmatch(epoch):
            raise InvalidValueError("epoch", epoch, "1 to 64 characters of A-Z a-z 0-9 . _ : -")
        if not 0.0 <= uptime <= MAX_UPTIME:
            raise InvalidValueError("uptime", uptime, "0 s to 10 years")
        key = (owner, node.service, node.id, epoch)
        reporter = self._reporters.get(key)
        if reporter is None:
            self._make_room(owner)
            reporter = self._reporters[key] = Reporter(node, epoch, owner, now)
            return Session(reporter, uptime)
        reporter.generation += 1
        reporter.gone_at = None
        return Session(reporter, now - reporter.last_at)

    def _make_room(self, owner: str) -> None:
        limits = self._limits
        own = [each for each in self._reporters.values() if owner and each.owner == owner]
        if len(own) >= limits.reporters_of_one:
            self._drop_oldest(own, f"{limits.reporters_of_one} processes of this workload report already")
        if len(self._reporters) >= limits.reporters:
            self._drop_oldest(self._reporters.values(), f"{limits.reporters} processes report already, as many as may")

    def _drop_oldest(self, of: Collection[Reporter], refusal: str) -> None:
        gone = min((each for each in of if not each.connected), key=lambda each: each.last_at, default=None)
        if gone is None:
            raise TooManyReportersError(refusal)
        self._forget(gone)

    def _forget(self, reporter: Reporter) -> None:
        del self._reporters[reporter.owner, reporter.service, reporter.node.id, reporter.epoch]
        self._series -= len(reporter.known)

    def close(self, session: Session, now: float) -> None:
        """The stream is over. What is known of the process is kept for the length of the window: it may come back."""
        reporter = session.reporter
        if session.generation == reporter.generation:
            reporter.gone_at = now

    def take(self, session: Session, report: LoadReport, now: float, *, more: bool = False) -> None:
        """Takes a report in, or a part of it; ``more`` says that another part follows.

        Raises:
            SupersededError: the process has another stream.
            InvalidValueError: it cannot be true. Nothing of it counts.
        """
        reporter = session.reporter
        if session.generation != reporter.generation:
            raise SupersededError("this process has opened another stream, where it reports now")
        covers = report.covers if session.heard else session.interval
        interval = min(max(covers, 0.0), MAX_UPTIME)
        grown: dict[ReportedKey, tuple[Counters, Counters]] = {}
        for key, counters in _counters(reporter.service, report):
            if key in grown:
                raise InvalidValueError("report", key, "each counter once")
            news = _above(reporter.known.get(key, {}), counters)
            if any(count > MAX_RATE * (interval + STEP) for counter, count in news.items() if counter in _COUNTS):
                raise InvalidValueError("report", key, f"counters that grow by at most {MAX_RATE:.0f} a second")
            grown[key] = counters, news
        for key, (counters, news) in grown.items():
            self._grow(reporter, key, counters, news, now, interval)
        self._note(reporter, report, begins=not session.heard)
        if not more:
            reporter.last_at = now
            session.heard = True
            self.taken += 1

    def _grow(
        self, reporter: Reporter, key: ReportedKey, counters: Counters, news: Counters, now: float, interval: float
    ) -> None:
        if key not in reporter.known:
            if self._series >= self._limits.series or len(reporter.known) >= self._limits.series_of_one:
                self.ignored += 1
                return
            self._series += 1
        if isinstance(key, MethodKey):
            reporter.calls[key.service] += _calls(counters) - _calls(reporter.known.get(key, {}))
        elif isinstance(key, ReceivedKey) and key.method != INSTANCE:
            reporter.received[key.caller, key.service] += _calls(counters) - _calls(reporter.known.get(key, {}))
        reporter.known[key] = counters
        if not news:
            return
        window = self._window
        if isinstance(key, MethodKey):
            window.add_calls(key, news, now, interval)
        elif isinstance(key, EndpointKey):
            window.endpoints.add(key, news, now, interval)
        elif isinstance(key, FailureKey):
            window.failures.add(key, news, now, interval)
        elif isinstance(key, EventKey):
            window.events.add(key, news, now, interval)
        else:
            window.add_received(key, news, now, interval)

    def _note(self, reporter: Reporter, report: LoadReport, *, begins: bool) -> None:
        """Takes over what is no counter. A stream begins with all events that the process remembers."""
        for called in report.called:
            state = reporter.called.get(called.service)
            if state is None:
                if len(reporter.called) >= MAX_SERVICES:
                    continue
                state = reporter.called[called.service] = CalledState(called.service)
            if begins:
                state.ejections.clear()
                state.transitions.clear()
            state.state = called.state or state.state
            state.ejections.extend(called.ejections)
            state.transitions.extend(called.transitions)
            for failure in called.failures:
                if failure.example is not None:
                    key = FailureKey(reporter.service, called.service, failure.method, failure.code, failure.reason)
                    self._window.exemplify(key, FailureExample(reporter.node.id, failure.example))
        for served in report.served:
            if served.instance_id in reporter.served or len(reporter.served) < MAX_SERVICES:
                reporter.served[served.instance_id] = served

    def expire(self, now: float) -> None:
        """Forgets what is older than the window: what happened, and who has gone."""
        self._window.expire(now)
        for reporter in list(self._reporters.values()):
            if reporter.gone_at is not None and reporter.gone_at <= now - WINDOW:
                self._forget(reporter)


_COUNTS = frozenset({*CODES.values(), ATTEMPTS, UNAUTHORIZED, RATE_LIMITED, SHED})
"""Counters of calls and attempts."""


def _counters(caller: str, report: LoadReport) -> Iterator[tuple[ReportedKey, Counters]]:
    """What a report says, by name."""
    for called in report.called:
        for method in called.methods:
            counters = {**_totals(method.calls), ATTEMPTS: method.attempts}
            yield MethodKey(caller, called.service, method.method), counters
        for endpoint in called.endpoints:
            yield EndpointKey(caller, called.service, endpoint.endpoint_id), _totals(endpoint.attempts)
        for failure in called.failures:
            key = FailureKey(caller, called.service, failure.method, failure.code, failure.reason)
            yield key, {CODES[failure.code]: failure.count}
    for served in report.served:
        for received in served.received:
            counters = _totals(received.calls)
            counters[BUSY] = sum(_MIDDLES[bucket] * count for bucket, count in received.calls.buckets.items())
            yield ReceivedKey(served.service, served.instance_id, received.caller, received.method), counters
        yield (
            ReceivedKey(served.service, served.instance_id, INSTANCE, INSTANCE),
            {
                PEAK: served.peak_in_flight,
                UNAUTHORIZED: served.unauthorized,
                RATE_LIMITED: served.rate_limited,
                SHED: served.shed,
            },
        )
    for consumed in report.consumed:
        for event in consumed.events:
            yield EventKey(caller, consumed.group, event.publisher, event.type), _totals(event.handled)


def _calls(counters: Counters) -> int:
    return sum(counters.get(code, 0) for code in CODES.values())


def _totals(totals: Totals) -> Counters:
    return {
        **{CODES[code]: count for code, count in totals.codes.items()},
        **{FIRST_BUCKET + bucket: count for bucket, count in totals.buckets.items()},
    }


def _above(known: Mapping[int, int], counters: Counters) -> Counters:
    """By how much counters grew. One that is lower than before has begun anew."""
    if any(counters.get(counter, 0) < count for counter, count in known.items() if counter != PEAK):
        known = {}
    return {
        counter: above
        for counter, count in counters.items()
        if (above := count if counter == PEAK else count - known.get(counter, 0))
    }
