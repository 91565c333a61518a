"""The short way of a call decides and accounts what the machine does, whatever happens to calls and to the service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh_client.core import shortcut
from mesh_client.core.call import Action, Attempt, AttemptFailure, Call, Failed, Pause
from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.model import StatusCode
from mesh_client.core.outlier import EndpointRecord
from mesh_client.core.service import Service
from mesh_client.core.shortcut import FirstAttempt
from mesh_client.core.tally import Tally
from tests.core.worlds import activate, endpoint, service

METHODS = ("/shop.v1.OrderService/PlaceOrder", "/shop.v1.PaymentService/Charge")

POLICIES: tuple[dict[str, Any], ...] = (
    {},
    {"timeout": "2s", "retry": {"per_try_timeout": "500ms"}},
    {"retry": {"max_attempts": 1}, "circuit_breaker": {"consecutive_failures": 2, "open_duration": "3s"}},
    {"concurrency_limit": {"max_in_flight": 2}, "load_balancer": {"algorithm": "PEAK_EWMA"}},
    {"outlier_detection": {"enabled": False}, "load_balancer": {"algorithm": "ROUND_ROBIN"}},
    {"load_balancer": {"algorithm": "RING_HASH"}},
    {"routes": [{"method": "shop.v1.PaymentService/*", "fault": {"delay": {"duration": "1s", "percent": 50}}}]},
    {"routes": [{"method": "shop.v1.OrderService/*", "metadata": {"x-canary": "yes"}, "timeout": "1s"}]},
    {"outlier_detection": {"consecutive_failures": 2}, "load_balancer": {"slow_start": "10s"}},
)

_methods = st.sampled_from(METHODS)
_codes = st.sampled_from(
    [StatusCode.UNAVAILABLE, StatusCode.INTERNAL, StatusCode.NOT_FOUND, StatusCode.DEADLINE_EXCEEDED]
)
_which = st.integers(0, 2)
_begin = st.tuples(st.just("begin"), _methods, st.sampled_from([None, None, 0.0, 0.4, 30.0]))
_succeed = st.tuples(st.just("succeed"), _which)
_fail = st.tuples(st.just("fail"), _which, _codes, st.booleans())
_wait = st.tuples(st.just("wait"), st.sampled_from([0.01, 0.3, 1.0, 7.0, 40.0]))
_rarely = st.one_of(
    st.tuples(st.just("resume"), _which),
    st.tuples(st.just("cancel"), _which),
    st.tuples(st.just("policy"), st.sampled_from(POLICIES)),
    st.tuples(st.just("endpoints"), st.sets(st.sampled_from("abcd"))),
)
_events = st.lists(
    st.sampled_from([_begin, _begin, _begin, _succeed, _succeed, _fail, _fail, _wait, _rarely]).flatmap(
        lambda kind: kind
    ),
    min_size=40,
    max_size=80,
)


class Machine:
    """A call by its machine alone."""

    def __init__(self, world: Service, method: str, deadline: float | None, now: float) -> None:
        self.call = Call(world, method, deadline)
        self.action: Action | None = self.call.begin(now)

    def succeeded(self, now: float) -> None:
        self.call.succeeded(now)

    def decider(self) -> Call:
        return self.call


class Short(Machine):
    """The same as the shell drives it."""

    def __init__(self, world: Service, method: str, deadline: float | None, now: float) -> None:
        self.world, self.method, self.deadline = world, method, deadline
        self.first: FirstAttempt | None = shortcut.begin(world, method, deadline, now)
        if self.first is None:
            super().__init__(world, method, deadline, now)
        else:
            self.action = self.first

    def succeeded(self, now: float) -> None:
        if self.first is None:
            self.call.succeeded(now)
        else:
            shortcut.succeeded(self.world, self.first, self.method, now)

    def decider(self) -> Call:
        if self.first is not None:
            self.call = shortcut.machine(self.world, self.first, self.method, self.deadline, False, ())
            self.first = None
        return self.call


def shown(action: Action | None) -> object:
    if isinstance(action, Attempt):
        return action.node.endpoint.id, action.number, action.started_at, action.deadline
    if isinstance(action, Failed):
        return action.code, action.detail.reason, len(action.detail.attempts), action.from_attempt
    return action


def state(world: Service, now: float) -> object:
    return (
        *(world.gate.in_flight, world.calls, world.retries, world.budget.balance(now)),
        *(world.breaker.state(now), world.breaker.generation, world.breaker.quiet),
        *(world.outliers.ejected, world.next_tick, world.blamed and world.blamed.endpoint.id),
        [(node.endpoint.id, node.load.outstanding, node.load.latency_cost(now)) for node in world.nodes],
        [
            (each, method, tally.ok, tally.failures, tally.seconds)
            for each, book in world.tallies
            for method, tally in book.items()
        ],
        (world.failed_calls, shown_tallies(world.repeated), shown_tallies(world.repeated_attempts)),
        shown_tallies(world.unattempted),
        {key: (example.at, example.detail.attempts) for key, example in world.incidents.examples.items()},
        (world.incidents.ejections.after(0), world.incidents.transitions.after(0)),
        [counted(world.outliers.record_of(node.endpoint.id)) for node in world.nodes],
    )


def shown_tallies(tallies: Mapping[str, Tally]) -> object:
    return {method: (tally.ok, tally.failures, tally.seconds, tally.buckets) for method, tally in tallies.items()}


def counted(record: EndpointRecord) -> tuple[int, int, int]:
    return record.successes, record.failures, record.consecutive


class Run:
    """One service and its calls, all made by machines or all made the short way."""

    def __init__(self, kind: type[Machine], policy: dict[str, Any]) -> None:
        self.kind = kind
        self.world = service("a", "b", "c", seed=7, **policy)
        self.names, self.policy = {"a", "b", "c"}, policy
        self.calls: list[Machine] = []
        self.now = 0.0

    def step(self, event: tuple[Any, ...]) -> object:
        name, *arguments = event
        done: object = None
        if name == "begin":
            method, timeout = arguments
            call = self.kind(self.world, method, None if timeout is None else self.now + timeout, self.now)
            self.calls.append(call)
            done = shown(call.action)
        elif name == "wait":
            self.now += arguments[0]
        elif name in {"policy", "endpoints"}:
            self.policy = arguments[0] if name == "policy" else self.policy
            self.names = arguments[0] if name == "endpoints" else self.names
            activate(self.world, *map(endpoint, sorted(self.names)), now=self.now, **self.policy)
        elif arguments[0] < len(self.calls):
            done = self.drive(name, self.calls[arguments[0]], *arguments[1:])
        self.calls = [call for call in self.calls if call.action is not None and not isinstance(call.action, Failed)]
        return done, state(self.world, self.now)

    def drive(self, name: str, call: Machine, *arguments: Any) -> object:
        attempting = isinstance(call.action, Attempt)
        if name == "cancel":
            call.decider().cancelled(self.now)
            call.action = None
        elif name == "succeed" and attempting:
            call.succeeded(self.now)
            call.action = None
        elif name == "fail" and attempting:
            code, committed = arguments
            call.action = call.decider().failed(AttemptFailure(code, "no", committed=committed), self.now)
        elif name == "resume" and isinstance(call.action, Pause):
            call.action = call.decider().resumed(self.now)
        return shown(call.action)


@settings(max_examples=300)
@given(st.sampled_from(POLICIES), _events)
def test_the_short_way_decides_and_accounts_as_the_machine_does(
    policy: dict[str, Any], steps: list[tuple[Any, ...]]
) -> None:
    machines, short = Run(Machine, policy), Run(Short, policy)
    for step in steps:
        assert short.step(step) == machines.step(step)


def test_a_call_that_nothing_stands_in_the_way_of_needs_no_machine_from_the_second_of_its_method_on() -> None:
    world = service("a", "b")
    assert shortcut.begin(world, METHODS[0], None, 0.0) is None
    Call(world, METHODS[0]).begin(0.0)
    first = shortcut.begin(world, METHODS[0], None, 0.0)
    assert first is not None
    assert (first.number, first.started_at, first.deadline) == (1, 0.0, None)
    assert (world.gate.in_flight, world.calls) == (2, 2)
    shortcut.succeeded(world, first, METHODS[0], 0.1)
    assert world.gate.in_flight == 1


def test_a_service_that_is_not_known_any_more_has_no_short_way() -> None:
    world = service("a")
    Call(world, METHODS[0]).begin(0.0)
    world.deactivate(world.resolution.UNKNOWN, 0.0)
    assert shortcut.begin(world, METHODS[0], None, 0.0) is None


def test_a_service_without_endpoints_has_no_short_way() -> None:
    world = service("a")
    Call(world, METHODS[0]).begin(0.0)
    activate(world)
    Call(world, METHODS[0]).begin(0.0)
    assert shortcut.begin(world, METHODS[0], None, 0.0) is None
    assert world.gate.in_flight == 1


def test_a_machine_takes_over_once_and_only_before_it_has_begun() -> None:
    world = service("a")
    call = Call(world, METHODS[0])
    call.begin(0.0)
    first = shortcut.begin(world, METHODS[0], None, 0.0)
    assert first is not None
    with pytest.raises(InvalidTransitionError, match="take_over: the call is attempting"):
        call.take_over(first, first.settings, first.breaker, first.token)


def test_what_is_due_by_time_is_not_put_off_by_the_short_way() -> None:
    world = service("a", now=0.0, load_balancer={"slow_start": "0.5s"})
    activate(world, endpoint("a"), endpoint("b"), now=0.1, load_balancer={"slow_start": "0.5s"})
    Call(world, METHODS[0]).begin(0.2)
    due = world.next_tick
    assert due < world.budget.bucket_end
    assert shortcut.begin(world, METHODS[0], None, due) is None


def test_a_call_that_another_breaker_admitted_says_nothing_to_the_one_that_replaced_it() -> None:
    world = service("a", "b")
    Call(world, METHODS[0]).begin(0.0)
    first = shortcut.begin(world, METHODS[0], None, 0.0)
    assert first is not None
    activate(
        world, endpoint("a"), endpoint("b"), circuit_breaker={"consecutive_failures": 3}, retry={"max_attempts": 1}
    )
    failing = Call(world, METHODS[0])
    failing.begin(0.0)
    failing.failed(AttemptFailure(StatusCode.UNAVAILABLE), 0.0)
    blamed = world.blamed
    assert blamed is not None
    shortcut.succeeded(world, first, METHODS[0], 0.1)
    assert world.blamed is blamed
