"""What is sent of what was counted: cumulative, only what changed, and everything to who knows nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.breaker import BreakerState
from mesh_client.core.call import Attempt, AttemptFailure, Call, Pause
from mesh_client.core.errors import Reason
from mesh_client.core.load_report import (
    CalledService,
    Consumer,
    LoadReport,
    ReportBuilder,
    ServedInstance,
    Server,
    Totals,
)
from mesh_client.core.model import StatusCode
from mesh_client.core.outlier import EjectionReason
from mesh_client.core.served import MAX_CALLERS, NOBODY, ServedBook
from mesh_client.core.service import Service
from mesh_client.core.store import Resolution
from mesh_client.core.tally import MAX_GONE, MAX_METHODS, OTHER
from tests.core.worlds import activate, endpoint, service

PLACE, GET = "/shop.v1.OrderService/PlaceOrder", "/shop.v1.OrderService/GetOrder"
DOWN = AttemptFailure(StatusCode.UNAVAILABLE, "connection refused")
CALM: dict[str, Any] = {"outlier_detection": {"enabled": False}, "circuit_breaker": {"enabled": False}}


def succeed(world: Service, method: str = PLACE, now: float = 1.0) -> None:
    call = Call(world, method)
    call.begin(now)
    call.succeeded(now + 0.1)


def fail(world: Service, now: float = 1.0) -> None:
    call = Call(world, PLACE)
    action = call.begin(now)
    while isinstance(action, Attempt):
        action = call.failed(DOWN, now)
        if isinstance(action, Pause):
            action = call.resumed(now)


def only(report: LoadReport) -> CalledService:
    (called,) = report.called
    return called


def test_the_first_report_says_everything_and_the_next_what_changed() -> None:
    world = service("a", "b", **CALM)
    builder = ReportBuilder(0.0)
    first = builder.look([world], [], 5.0)
    assert first.covers == 5.0
    state = only(first).state
    assert state is not None
    assert (state.resolution, state.breaker, state.endpoints) == (Resolution.ACTIVE, BreakerState.CLOSED, 2)
    assert (only(first).methods, only(first).endpoints, only(first).failures) == ((), (), ())

    idle = builder.look([world], [], 9.0)
    assert not idle
    assert idle.covers == 4.0

    succeed(world)
    called = only(builder.look([world], [], 10.0))
    (method,) = called.methods
    assert (method.method, method.calls.codes, method.calls.count, method.attempts) == (PLACE, {"OK": 1}, 1, 1)
    assert sum(method.calls.buckets.values()) == 1
    (totals,) = called.endpoints
    assert (totals.endpoint_id in {"a", "b"}, totals.attempts) == (True, method.calls)

    succeed(world, GET)
    succeed(world, GET)
    (method,) = only(builder.look([world], [], 11.0)).methods
    assert (method.method, method.calls.codes) == (GET, {"OK": 2})


def test_counters_are_cumulative_and_whoever_knows_nothing_is_told_all() -> None:
    world = service("a", retry={"max_attempts": 1}, **CALM)
    builder = ReportBuilder(0.0)
    for _ in range(3):
        succeed(world)
        fail(world)
        builder.look([world], [], 1.0)
    assert not builder.look([world], [], 1.0)
    builder.reset()
    called = only(builder.look([world], [], 2.0))
    assert [(each.method, each.calls.codes) for each in called.methods] == [(PLACE, {"OK": 3, "UNAVAILABLE": 3})]
    assert [each.attempts.count for each in called.endpoints] == [6]
    assert [(each.code, each.reason, each.count) for each in called.failures] == [
        ("UNAVAILABLE", Reason.ATTEMPTS_FAILED, 3)
    ]
    assert called.state is not None


def test_a_call_is_one_call_however_many_attempts_it_took() -> None:
    world = service("a", "b", "c", **CALM)
    fail(world)
    (method,) = only(ReportBuilder(0.0).look([world], [], 1.0)).methods
    assert (method.calls.codes, method.attempts) == ({"UNAVAILABLE": 1}, 3)


def test_calls_that_never_became_an_attempt_are_reported_with_an_explanation() -> None:
    world = service()
    builder = ReportBuilder(0.0)
    builder.look([world], [], 0.5)
    fail(world)
    called = only(builder.look([world], [], 1.0))
    assert [(each.calls.codes, each.attempts) for each in called.methods] == [({"UNAVAILABLE": 1}, 0)]
    (failure,) = called.failures
    assert (failure.reason, failure.count) == (Reason.NO_ENDPOINTS, 1)
    assert failure.example is not None
    assert "start one" in str(failure.example.detail)


def test_a_call_that_is_given_up_between_two_attempts_is_reported() -> None:
    world = service("a", "b", **CALM)
    builder = ReportBuilder(0.0)
    call = Call(world, PLACE)
    call.begin(0.0)
    call.failed(DOWN, 0.1)
    before = only(builder.look([world], [], 0.2))
    assert [(each.calls.codes, each.attempts) for each in before.methods] == [({}, 1)]
    call.cancelled(0.3)
    (method,) = only(builder.look([world], [], 0.4)).methods
    assert (method.calls.codes, method.attempts) == ({"CANCELLED": 1}, 1)


def test_ejections_and_transitions_are_told_once() -> None:
    once: dict[str, Any] = {"retry": {"max_attempts": 1}, "circuit_breaker": {"consecutive_failures": 2}}
    world = service("a", "b", outlier_detection={"consecutive_failures": 1}, **once)
    builder = ReportBuilder(0.0)
    for now in range(1, 8):
        fail(world, float(now))
    called = only(builder.look([world], [], 8.0))
    assert [each.reason for each in called.ejections] == [EjectionReason.CONSECUTIVE_FAILURES]
    assert [each.new for each in called.transitions] == [BreakerState.OPEN]
    assert called.state is not None
    assert called.state.ejected == (called.ejections[0].endpoint_id,)
    fail(world, 9.0)
    called = only(builder.look([world], [], 9.0))
    assert (called.ejections, called.transitions) == ((), ())
    builder.reset()
    assert len(only(builder.look([world], [], 9.0)).transitions) == 1


def test_endpoints_that_left_long_ago_are_not_reported_anew_under_another_name_nor_remembered() -> None:
    world = service("e0", **CALM)
    builder = ReportBuilder(0.0)
    told: Counter[str] = Counter()
    for number in range(MAX_GONE + 20):
        activate(world, endpoint(f"e{number}"), **CALM)
        succeed(world)
        for totals in only(builder.look([world], [], 1.0)).endpoints:
            told[totals.endpoint_id] += totals.attempts.count
    assert told == {f"e{number}": 1 for number in range(MAX_GONE + 20)}
    assert len(builder._sent_endpoints["orders"]) <= MAX_GONE + 2
    (method,) = ReportBuilder(0.0).look([world], [], 1.0).called[0].methods
    assert method.calls.count == MAX_GONE + 20


def test_a_server_reports_what_it_received_by_caller_and_method_and_its_busiest_moment() -> None:
    book = ServedBook()
    builder = ReportBuilder(0.0)

    def look(in_flight: int) -> tuple[ServedInstance, ...]:
        return builder.look([], [Server("orders", "orders-1", book, in_flight)], 1.0).served

    assert look(0) == (ServedInstance("orders", "orders-1", 0, 0, 0, 0, 0),)
    assert look(0) == ()
    place = book.of(PLACE)
    book.tally(place, "checkout").succeeded(0.1)
    book.tally(place, NOBODY).failed("PERMISSION_DENIED", 0.0)
    book.peak, book.unauthorized = 7, 1
    (served,) = look(2)
    assert (served.in_flight, served.peak_in_flight, served.unauthorized) == (2, 7, 1)
    assert [(each.caller, each.method, each.calls.codes) for each in served.received] == [
        ("checkout", PLACE, {"OK": 1}),
        (NOBODY, PLACE, {"PERMISSION_DENIED": 1}),
    ]
    book.tally(place, "checkout").succeeded(0.1)
    (served,) = look(2)
    assert (served.peak_in_flight, [each.caller for each in served.received]) == (2, ["checkout"])
    builder.reset()
    assert len(look(2)[0].received) == 2


def test_callers_and_methods_beyond_the_bounds_share_their_tallies() -> None:
    book = ServedBook()
    place = book.of(PLACE)
    for number in range(MAX_CALLERS + 5):
        book.tally(place, f"c{number}").succeeded(0.1)
    assert len(place) == MAX_CALLERS + 1
    assert place[OTHER].ok == 5
    for number in range(MAX_METHODS + 5):
        book.of(f"/proxied/M{number}")
    assert len(dict(book)) == MAX_METHODS + 1
    assert book.of("/proxied/Another") is book.of("/proxied/YetAnother") is dict(book)[OTHER]
    assert book.of(PLACE) is place


class Receiver:
    """Takes reports in as their definition says: the last value of each counter counts."""

    def __init__(self) -> None:
        self.methods: dict[str, Totals] = {}
        self.failures: dict[object, int] = {}

    def take(self, report: LoadReport) -> None:
        for called in report.called:
            self.methods |= {each.method: each.calls for each in called.methods}
            self.failures |= {(each.method, each.code, each.reason): each.count for each in called.failures}


_STEPS: st.SearchStrategy[Callable[[Service], None]] = st.sampled_from(
    [succeed, fail, lambda world: succeed(world, GET), lambda world: fail(world, 2.0)]
)


@given(st.lists(st.tuples(_STEPS, st.sampled_from(["", "look", "lost", "new"])), max_size=30))
def test_who_takes_reports_in_knows_what_was_counted_however_often_it_begins_anew(
    steps: list[tuple[Callable[[Service], None], str]],
) -> None:
    world = service("a", "b", **CALM)
    builder, receiver = ReportBuilder(0.0), Receiver()
    for step, then in steps:
        step(world)
        if then == "look":
            receiver.take(builder.look([world], [], 1.0))
        elif then == "lost":  # with its stream; the next one begins with everything
            builder.look([world], [], 1.0)
            builder.reset()
        elif then == "new":  # the receiver was restarted
            receiver = Receiver()
            builder.reset()
    receiver.take(builder.look([world], [], 1.0))
    calls = world.calls_by_method()
    assert receiver.methods == {method: Totals.of(tally) for method, tally in calls.items() if tally.count}
    assert receiver.failures == world.failed_calls
    assert sum(tally.count for tally in calls.values()) == len(steps)


def test_events_that_groups_handle_are_reported_when_they_changed() -> None:
    book = ServedBook()
    builder = ReportBuilder(0.0)

    def look() -> LoadReport:
        return builder.look([], [], 1.0, [Consumer("labels", book)])

    assert not look()
    book.tally(book.of("/shop.v1.OrderPlaced"), "orders").succeeded(0.1)
    book.tally(book.of("/shop.v1.OrderShipped"), "shipping").failed("UNKNOWN", 0.1)
    report = look()
    assert report
    (group,) = report.consumed
    assert group.group == "labels"
    found = {(each.publisher, each.type): each.handled.codes for each in group.events}
    assert found == {
        ("orders", "shop.v1.OrderPlaced"): {"OK": 1},
        ("shipping", "shop.v1.OrderShipped"): {"UNKNOWN": 1},
    }
    assert not look()
    book.tally(book.of(OTHER), "orders").succeeded(0.1)
    (group,) = look().consumed
    assert [each.type for each in group.events] == [OTHER]
    builder.reset()
    assert len(look().consumed[0].events) == 3
