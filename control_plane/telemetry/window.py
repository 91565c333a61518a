"""What happened in the last minutes, by who did it to whom: bounded, whatever comes in. Pure.

Who reports decides the names of what it reports, so each of them has a budget of names. Past it, what it reports counts
under a common name: nothing is lost of sums, and nobody takes the room of others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar, cast

from control_plane.telemetry.timeline import STEPS, Counters, Timeline, add_up, spread, step_of
from mesh_client.core.errors import Reason
from mesh_client.core.incidents import Example
from mesh_client.core.tally import OTHER


class MethodKey(NamedTuple):
    """Whole calls of one service to a method of another."""

    caller: str
    service: str
    method: str

    def folded(self) -> tuple[MethodKey, ...]:
        """What it counts under when there is no room for it, in turn; for the last there always is."""
        return MethodKey(self.caller, self.service, OTHER), MethodKey(self.caller, OTHER, OTHER)


class EdgeKey(NamedTuple):
    """Whole calls of one service to another, all methods together."""

    caller: str
    service: str

    def folded(self) -> tuple[EdgeKey, ...]:
        """As for `MethodKey`; there are never more of these than of those."""
        return (EdgeKey(self.caller, OTHER),)


class EndpointKey(NamedTuple):
    """Attempts of one service on an endpoint of another."""

    caller: str
    service: str
    endpoint_id: str

    def folded(self) -> tuple[EndpointKey, ...]:
        """As for `MethodKey`."""
        return EndpointKey(self.caller, self.service, OTHER), EndpointKey(self.caller, OTHER, OTHER)


class FailureKey(NamedTuple):
    """Calls of one service to a method of another that failed in one way."""

    caller: str
    service: str
    method: str
    code: str
    reason: Reason | None

    def folded(self) -> tuple[FailureKey, ...]:
        """As for `MethodKey`."""
        return self._replace(method=OTHER), FailureKey(self.caller, OTHER, OTHER, "UNKNOWN", None)


class ReceivedKey(NamedTuple):
    """Calls that one instance of a service received from one caller."""

    service: str
    instance_id: str
    caller: str
    method: str

    def folded(self) -> tuple[ReceivedKey, ...]:
        """As for `MethodKey`."""
        return self._replace(caller=OTHER, method=OTHER), ReceivedKey(self.service, OTHER, OTHER, OTHER)


class ServedKey(NamedTuple):
    """Calls that a service received from one caller, all instances and methods together."""

    service: str
    caller: str

    def folded(self) -> tuple[ServedKey, ...]:
        """As for `MethodKey`; there are never more of these than of `ReceivedKey`."""
        return (ServedKey(self.service, OTHER),)


class EventKey(NamedTuple):
    """Events of one publisher and type that one group of a service handled."""

    service: str
    group: str
    publisher: str
    type: str

    def folded(self) -> tuple[EventKey, ...]:
        """As for `MethodKey`."""
        return self._replace(publisher=OTHER, type=OTHER), EventKey(self.service, OTHER, OTHER, OTHER)


ReportedKey = MethodKey | EndpointKey | FailureKey | ReceivedKey | EventKey
"""Names of what is reported. The first one of each is the service of who reports it."""
Key = ReportedKey | EdgeKey | ServedKey
"""Names of what is counted."""

INSTANCE = ""
"""Stands for caller and method in a `ReceivedKey` of an instance as a whole."""

K = TypeVar("K", bound=Key)
G = TypeVar("G", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is kept at most.

    Attributes:
        keys: names in all, of some 22 KiB each when they are busy all of the time.
        keys_of_one: names that the processes of one service bring.
        series: cumulative counters of all processes, of some 1 KiB each.
        series_of_one: those of one process.
        reporters: processes that report, or did within the window.
        reporters_of_one: those of one workload, or, without identity, of one service.
    """

    keys: int = 10_000
    keys_of_one: int = 2_000
    series: int = 200_000
    series_of_one: int = 3_000
    reporters: int = 20_000
    reporters_of_one: int = 100


class Budget:
    """Room for names, in all and for each who brings some."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._of: Counter[str] = Counter()
        self._in_all = 0

    def take(self, owner: str) -> bool:
        """Takes room for one more; False when there is none."""
        if self._in_all >= self._limits.keys or self._of[owner] >= self._limits.keys_of_one:
            return False
        self.force(owner)
        return True

    def force(self, owner: str) -> None:
        """Takes room for one more, whether there is any or not."""
        self._of[owner] += 1
        self._in_all += 1

    def give_back(self, owner: str) -> None:
        """One is gone."""
        self._in_all -= 1
        self._of[owner] -= 1
        if not self._of[owner]:
            del self._of[owner]


class Keyed(Generic[K]):
    """What happened to things of one kind."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._lines: dict[K, Timeline] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __contains__(self, key: K) -> bool:
        return key in self._lines

    def keys(self) -> Iterable[K]:
        """The names."""
        return self._lines.keys()

    def add(self, key: K, counters: Mapping[int, int], now: float, interval: float) -> K:
        """These grew by so much within the last ``interval`` seconds; the name that it counts under."""
        key = self._admitted(key)
        line = self._lines[key]
        for step, part in spread(counters, now, interval):
            line.add(step, part)
        return key

    def _admitted(self, key: K) -> K:
        for each in (key, *cast("tuple[K, ...]", key.folded())):
            if each in self._lines:
                return each
            if self._budget.take(each[0]):
                break
        else:
            self._budget.force(each[0])
        self._lines[each] = Timeline()
        return each

    def grouped(self, first: int, group: Callable[[K], G | None]) -> dict[G, Counters]:
        """By how much counters grew from a step on, added up by what ``group`` makes of names; None: do not count.

        Groups in which nothing grew since then, but before within the window, are there, and empty.
        """
        groups: dict[G, Counters] = {}
        for key, line in self._lines.items():
            name = group(key)
            if name is not None:
                add_up(groups.setdefault(name, {}), (counters for _, counters in line.steps(first)))
        return groups

    def steps(self, key: K, first: int) -> Iterator[tuple[int, Counters]]:
        """Each step from ``first`` on in which something happened, in no order."""
        line = self._lines.get(key)
        return iter(()) if line is None else line.steps(first)

    def expire(self, first: int) -> list[K]:
        """Forgets what happened before a step; the names of which nothing is left."""
        gone = [key for key, line in self._lines.items() if line.expire(first)]
        for key in gone:
            del self._lines[key]
            self._budget.give_back(key[0])
        return gone


@dataclass(frozen=True, slots=True)
class FailureExample:
    """A failed call, and the process that made it."""

    node_id: str
    example: Example


class Window:
    """The last minutes.

    Attributes:
        methods: whole calls, by caller, service and method.
        edges: the same by caller and service: questions about all calls are frequent, and would take long otherwise.
        endpoints: attempts, by caller, service and endpoint.
        failures: failed calls, by caller, service, method, status and reason.
        received: calls as servers received them, by service, instance, caller and method.
        served: the same by service and caller, as ``edges`` are.
        events: calls of handlers of events, by service, group, publisher and message type.
        examples: the last failed call that is known of each of ``failures``.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        budget = Budget(limits or Limits())
        self.methods: Keyed[MethodKey] = Keyed(budget)
        self.edges: Keyed[EdgeKey] = Keyed(Budget(limits or Limits()))
        self.endpoints: Keyed[EndpointKey] = Keyed(budget)
        self.failures: Keyed[FailureKey] = Keyed(budget)
        self.received: Keyed[ReceivedKey] = Keyed(budget)
        self.served: Keyed[ServedKey] = Keyed(Budget(limits or Limits()))
        self.events: Keyed[EventKey] = Keyed(budget)
        self.examples: dict[FailureKey, FailureExample] = {}

    def __len__(self) -> int:
        """How many names share the room for them: all but those of ``edges`` and ``served``."""
        return sum((len(self.methods), len(self.endpoints), len(self.failures), len(self.received), len(self.events)))

    def add_calls(self, key: MethodKey, counters: Mapping[int, int], now: float, interval: float) -> None:
        """Whole calls; as `Keyed.add`."""
        counted = self.methods.add(key, counters, now, interval)
        self.edges.add(EdgeKey(counted.caller, counted.service), counters, now, interval)

    def add_received(self, key: ReceivedKey, counters: Mapping[int, int], now: float, interval: float) -> None:
        """Calls that an instance received, or what it says of itself as a whole; as `Keyed.add`."""
        counted = self.received.add(key, counters, now, interval)
        if (key.caller, key.method) != (INSTANCE, INSTANCE):
            self.served.add(ServedKey(counted.service, counted.caller), counters, now, interval)

    def exemplify(self, key: FailureKey, example: FailureExample) -> None:
        """Keeps an example, unless there is a later one, or nothing is kept of its kind."""
        known = self.examples.get(key)
        if key in self.failures and (known is None or known.example.at <= example.example.at):
            self.examples[key] = example

    def expire(self, now: float) -> None:
        """Forgets what is older than the window."""
        first = step_of(now) - STEPS + 1
        self.methods.expire(first)
        self.edges.expire(first)
        self.endpoints.expire(first)
        self.received.expire(first)
        self.served.expire(first)
        self.events.expire(first)
        for key in self.failures.expire(first):
            self.examples.pop(key, None)
