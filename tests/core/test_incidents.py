"""What a client remembers of what is rare: enough to explain it, never more than a bound."""

from __future__ import annotations

from typing import Any

from mesh_client.core.breaker import BreakerState
from mesh_client.core.call import Attempt, AttemptFailure, Call, Failed
from mesh_client.core.errors import MeshErrorDetail, Reason
from mesh_client.core.incidents import MAX_EVENTS, MAX_EXAMPLES, EventLog, Incidents
from mesh_client.core.model import StatusCode
from mesh_client.core.outlier import EjectionReason
from mesh_client.core.service import Service
from tests.core.worlds import activate, endpoint, service

METHOD = "/shop.v1.OrderService/PlaceOrder"
DOWN = AttemptFailure(StatusCode.UNAVAILABLE, "connection refused")
ONCE: dict[str, Any] = {"retry": {"max_attempts": 1}}


def fail(world: Service, now: float, failure: AttemptFailure = DOWN, *, trace_id: str = "") -> Failed:
    call = Call(world, METHOD)
    call.trace_id = trace_id
    attempt = call.begin(now)
    if isinstance(attempt, Failed):
        return attempt
    assert isinstance(attempt, Attempt)
    failed = call.failed(failure, now)
    assert isinstance(failed, Failed)
    return failed


def test_of_failed_calls_the_last_of_each_kind_is_kept_with_its_explanation_and_its_trace() -> None:
    world = service("a", **ONCE)
    fail(world, 1.0, trace_id="a" * 32)
    last = fail(world, 2.0, trace_id="b" * 32)
    assert last.detail.trace_id == "b" * 32
    example = world.incidents.examples[METHOD, "UNAVAILABLE", Reason.ATTEMPTS_FAILED]
    assert (example.at, example.detail) == (2.0, last.detail)


def test_answers_of_an_application_are_no_incidents() -> None:
    world = service("a", **ONCE)
    fail(world, 1.0, AttemptFailure(StatusCode.NOT_FOUND, "no order 1", received=True))
    assert world.failed_calls == {(METHOD, "NOT_FOUND", Reason.ATTEMPTS_FAILED): 1}
    assert world.incidents.examples == {}


def test_kinds_of_failed_calls_are_bounded_and_the_oldest_goes() -> None:
    incidents = Incidents()
    keys = [(f"/s/M{number}", "UNAVAILABLE", Reason.ATTEMPTS_FAILED) for number in range(MAX_EXAMPLES + 1)]
    for now, key in enumerate([*keys[:-1], keys[0], keys[-1]]):
        incidents.failed(key, MeshErrorDetail("orders", key[0], key[2]), float(now))
    assert len(incidents.examples) == MAX_EXAMPLES
    assert list(incidents.examples)[-2:] == [keys[0], keys[-1]]
    assert keys[1] not in incidents.examples


def test_the_breakers_transitions_are_remembered_with_their_time_also_those_after_a_new_policy() -> None:
    seen: list[tuple[BreakerState, BreakerState]] = []
    breaker = {"circuit_breaker": {"consecutive_failures": 2, "open_duration": "5s"}, **ONCE}
    world = service("a", **breaker)
    world._on_transition = lambda old, new: seen.append((old, new))
    fail(world, 1.0)
    fail(world, 2.0)
    assert fail(world, 3.0).detail.reason is Reason.BREAKER_OPEN
    fail(world, 8.0)
    activate(world, endpoint("a"), now=20.0, circuit_breaker={"consecutive_failures": 1}, **ONCE)
    fail(world, 21.0)
    moves = [(each.at, each.old.value, each.new.value) for each in world.incidents.transitions.after(0)]
    assert moves == [
        (2.0, "closed", "open"),
        (8.0, "open", "half-open"),
        (8.0, "half-open", "open"),
        (21.0, "closed", "open"),
    ]
    assert world.incidents.entered == {BreakerState.OPEN: 3, BreakerState.HALF_OPEN: 1}
    assert len(seen) == 4


def test_ejections_are_remembered_with_their_reason_and_end() -> None:
    world = service("a", "b", outlier_detection={"consecutive_failures": 1, "base_ejection": "7s"}, **ONCE)
    fail(world, 1.0)
    (ejection,) = world.incidents.ejections.after(0)
    assert (ejection.at, ejection.until, ejection.reason) == (1.0, 8.0, EjectionReason.CONSECUTIVE_FAILURES)
    assert ejection.endpoint_id in {"a", "b"}
    assert world.incidents.ejected == {EjectionReason.CONSECUTIVE_FAILURES: 1}


def test_an_endpoint_that_succeeds_less_often_than_the_others_is_ejected_for_that() -> None:
    ids = ("a", "b", "c", "d", "e")
    world = service(
        *ids,
        load_balancer={"algorithm": "ROUND_ROBIN"},
        outlier_detection={"interval": "10s", "success_rate_min_requests": 10, "success_rate_stdev_factor": 1.0},
        circuit_breaker={"enabled": False},
        **ONCE,
    )
    for turn in range(100):
        call = Call(world, METHOD)
        attempt = call.begin(1.0)
        assert isinstance(attempt, Attempt)
        if attempt.node.endpoint.id == "c" and turn % 2:
            call.failed(DOWN, 1.0)
        else:
            call.succeeded(1.0)
    world.tick(10.0)
    assert [(each.endpoint_id, each.reason) for each in world.incidents.ejections.after(0)] == [
        ("c", EjectionReason.SUCCESS_RATE)
    ]


def test_an_event_log_goes_on_where_its_reader_stopped_and_forgets_the_oldest() -> None:
    log: EventLog[int] = EventLog()
    assert log.after(0) == []
    for number in range(1, MAX_EVENTS + 11):
        log.append(number)
    assert log.count == MAX_EVENTS + 10
    assert log.after(log.count) == []
    assert log.after(log.count - 2) == [MAX_EVENTS + 9, MAX_EVENTS + 10]
    assert log.after(0) == list(range(11, MAX_EVENTS + 11))
