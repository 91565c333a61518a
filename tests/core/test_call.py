"""The machine of one call: what it decides, in which order, and what it accounts."""

from __future__ import annotations

from random import Random

import pytest

from mesh_client.core.breaker import BreakerState
from mesh_client.core.call import Action, Attempt, AttemptFailure, AwaitEndpoints, Call, Failed, Pause
from mesh_client.core.errors import InvalidTransitionError, Reason
from mesh_client.core.model import Outcome, StatusCode
from mesh_client.core.retry import Pushback
from mesh_client.core.service import Service
from mesh_client.core.store import Resolution
from tests.core.worlds import activate, service

METHOD = "/shop.v1.OrderService/PlaceOrder"
DOWN = AttemptFailure(StatusCode.UNAVAILABLE, "connection refused")
NO_RETRY = {"max_attempts": 1}


def attempt(action: Action) -> Attempt:
    assert isinstance(action, Attempt), action
    return action


def pause(action: Action) -> float:
    assert isinstance(action, Pause), action
    return action.delay


def failed(action: Action) -> Failed:
    assert isinstance(action, Failed), action
    return action


def outstanding(world: Service) -> int:
    return sum(node.load.outstanding for node in world.nodes)


def fail_all(world: Service, calls: int, now: float = 0.0) -> None:
    for _ in range(calls):
        call = Call(world, METHOD)
        attempt(call.begin(now))
        failed(call.failed(DOWN, now))


def test_a_call_that_succeeds_is_one_attempt_and_leaves_nothing_behind() -> None:
    world = service("a")
    call = Call(world, METHOD)
    first = attempt(call.begin(5.0))
    assert (first.node.endpoint.id, first.number, first.deadline, first.started_at) == ("a", 1, None, 5.0)
    assert outstanding(world) == world.gate.in_flight == 1
    assert not call.over
    call.succeeded(5.1)
    assert call.over
    assert outstanding(world) == world.gate.in_flight == 0


def test_streams_that_end_with_their_connection_for_its_age_say_nothing_of_the_endpoint() -> None:
    world = service("a", retry=NO_RETRY)
    for _ in range(20):
        call = Call(world, METHOD)
        attempt(call.begin(0.0))
        result = failed(call.failed(AttemptFailure(StatusCode.UNAVAILABLE, "max connection age", committed=True), 0.1))
        assert (result.code, result.from_attempt) == (StatusCode.UNAVAILABLE, True)
    assert world.breaker.state(0.1) is BreakerState.CLOSED
    assert not any(node.ejected for node in world.nodes)
    assert outstanding(world) == world.gate.in_flight == 0


def test_a_passed_deadline_fails_before_anything_else() -> None:
    call = Call(service(), METHOD, deadline=1.0)
    result = failed(call.begin(1.0))
    assert (result.code, result.detail.reason) == (StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED)
    assert not result.from_attempt


def test_the_policys_timeout_counts_where_the_caller_gave_none() -> None:
    world = service("a", timeout="2s")
    assert attempt(Call(world, METHOD).begin(1.0)).deadline == 3.0
    assert attempt(Call(world, METHOD, deadline=10.0).begin(1.0)).deadline == 10.0


def test_each_attempt_has_its_own_deadline_within_that_of_the_call() -> None:
    world = service("a", retry={"per_try_timeout": "500ms"})
    assert attempt(Call(world, METHOD, deadline=10.0).begin(1.0)).deadline == 1.5
    assert attempt(Call(world, METHOD, deadline=1.2).begin(1.0)).deadline == 1.2
    assert attempt(Call(world, METHOD).begin(1.0)).deadline == 1.5


def test_a_failed_attempt_is_repeated_on_another_endpoint_after_a_wait() -> None:
    world = service("a", "b")
    call = Call(world, METHOD)
    first = attempt(call.begin(0.0))
    assert 0.0 <= pause(call.failed(DOWN, 0.01)) <= 0.025
    second = attempt(call.resumed(0.03))
    assert second.number == 2
    assert second.node is not first.node
    call.succeeded(0.04)
    assert outstanding(world) == 0


def test_after_the_last_attempt_the_application_gets_its_error_and_the_whole_story() -> None:
    world = service("a", "b")
    call = Call(world, METHOD)
    tried = [attempt(call.begin(0.0)).node.endpoint.id]
    for now in (0.1, 0.2):
        pause(call.failed(DOWN, now))
        tried.append(attempt(call.resumed(now)).node.endpoint.id)
    result = failed(call.failed(DOWN, 0.3))
    assert result.from_attempt
    assert result.code is StatusCode.UNAVAILABLE
    assert [each.endpoint_id for each in result.detail.attempts] == tried
    assert [each.code for each in result.detail.attempts] == ["UNAVAILABLE"] * 3
    assert result.detail.attempts[0].elapsed == pytest.approx(0.1)
    assert "tried" in str(result.detail)
    assert world.gate.in_flight == 0


@pytest.mark.parametrize(
    "failure",
    [
        AttemptFailure(StatusCode.NOT_FOUND),
        AttemptFailure(StatusCode.UNAVAILABLE, committed=True),
        AttemptFailure(StatusCode.UNAVAILABLE, pushback=Pushback(allowed=False)),
        AttemptFailure(StatusCode.INTERNAL),
    ],
    ids=["not in retry_on", "a response byte has arrived", "the server says no", "a failure, but not in retry_on"],
)
def test_what_must_not_be_repeated_is_not(failure: AttemptFailure) -> None:
    call = Call(service("a", "b"), METHOD)
    call.begin(0.0)
    assert failed(call.failed(failure, 0.1)).from_attempt


def test_the_server_says_how_long_to_wait() -> None:
    call = Call(service("a", "b"), METHOD)
    call.begin(0.0)
    assert pause(call.failed(AttemptFailure(StatusCode.UNAVAILABLE, pushback=Pushback(delay=0.7)), 0.1)) == 0.7


def test_no_retry_begins_past_the_deadline() -> None:
    call = Call(service("a", "b"), METHOD, deadline=0.5)
    call.begin(0.0)
    assert failed(call.failed(AttemptFailure(StatusCode.UNAVAILABLE, pushback=Pushback(delay=0.7)), 0.1)).from_attempt


def test_the_budget_bounds_retries() -> None:
    world = service("a", retry={"budget": {"ratio": 0.0, "min_per_second": 0.0}})
    call = Call(world, METHOD)
    call.begin(0.0)
    assert failed(call.failed(DOWN, 0.1)).from_attempt


def test_a_per_try_timeout_is_a_failure_of_the_endpoint_and_repeated() -> None:
    world = service("a", "b", retry={"per_try_timeout": "100ms"}, outlier_detection={"consecutive_failures": 1})
    call = Call(world, METHOD, deadline=10.0)
    first = attempt(call.begin(0.0)).node
    pause(call.failed(AttemptFailure(StatusCode.DEADLINE_EXCEEDED), 0.1))
    assert first.ejected
    assert attempt(call.resumed(0.15)).node is not first


def test_the_callers_own_deadline_says_nothing_about_the_endpoint() -> None:
    world = service(
        "a", "b", outlier_detection={"consecutive_failures": 1}, circuit_breaker={"consecutive_failures": 1}
    )
    call = Call(world, METHOD, deadline=0.1)
    node = attempt(call.begin(0.0)).node
    result = failed(call.failed(AttemptFailure(StatusCode.DEADLINE_EXCEEDED), 0.1))
    assert result.detail.reason is Reason.DEADLINE_EXCEEDED
    assert not node.ejected
    assert result.detail.breaker == "closed"


def test_a_deadline_that_the_server_reports_itself_is_its_answer() -> None:
    world = service("a", outlier_detection={"consecutive_failures": 1})
    call = Call(world, METHOD, deadline=10.0)
    call.begin(0.0)
    result = failed(call.failed(AttemptFailure(StatusCode.DEADLINE_EXCEEDED, received=True), 0.1))
    assert result.detail.reason is Reason.ATTEMPTS_FAILED


def test_overload_never_ejects_but_counts_against_the_service() -> None:
    world = service(
        "a", "b", outlier_detection={"consecutive_failures": 1}, circuit_breaker={"consecutive_failures": 2}
    )
    for _ in range(2):
        call = Call(world, METHOD)
        call.begin(0.0)
        failed(call.failed(AttemptFailure(StatusCode.RESOURCE_EXHAUSTED), 0.1))
    assert not any(node.ejected for node in world.nodes)
    assert failed(Call(world, METHOD).begin(0.2)).detail.reason is Reason.BREAKER_OPEN


def test_a_service_that_fails_as_a_whole_opens_the_breaker_and_fails_fast_then_recovers() -> None:
    world = service("a", "b", "c", retry=NO_RETRY, circuit_breaker={"open_duration": "10s"})
    now = 0.0
    while world.breaker.state(now).value == "closed":
        now += 0.1
        assert now < 10.0
        fail_all(world, 1, now)
    refused = failed(Call(world, METHOD).begin(now))
    assert refused.code is StatusCode.UNAVAILABLE
    assert refused.detail.breaker == "open"
    assert world.gate.in_flight == 0
    probe = Call(world, METHOD)
    attempt(probe.begin(now + 10.0))
    assert failed(Call(world, METHOD).begin(now + 10.0)).detail.reason is Reason.BREAKER_OPEN
    probe.succeeded(now + 10.1)
    attempt(Call(world, METHOD).begin(now + 10.2))


def test_a_failed_probe_opens_the_breaker_again() -> None:
    world = service("a", retry=NO_RETRY, circuit_breaker={"consecutive_failures": 1, "open_duration": "10s"})
    fail_all(world, 1)
    fail_all(world, 1, 10.0)
    assert failed(Call(world, METHOD).begin(15.0)).detail.reason is Reason.BREAKER_OPEN


def test_one_failing_host_among_others_does_not_open_the_breaker() -> None:
    world = service("a", "b", retry=NO_RETRY, outlier_detection={"enabled": False})
    calls = [Call(world, METHOD) for _ in range(200)]
    failing = [call for call in calls if attempt(call.begin(0.0)).node.endpoint.id == "a"]
    assert len(failing) > 50
    for call in failing:
        failed(call.failed(DOWN, 0.1))
    assert world.breaker.state(0.1).value == "closed"


def test_calls_that_were_saved_by_a_retry_do_not_open_the_breaker() -> None:
    world = service("a", "b", outlier_detection={"enabled": False}, load_balancer={"algorithm": "ROUND_ROBIN"})
    calls = [Call(world, METHOD) for _ in range(40)]
    for call in calls:
        call.begin(0.0)
    for call in calls:
        pause(call.failed(DOWN, 0.1))
    for call in calls:
        call.resumed(0.2)
        call.succeeded(0.3)
    assert world.breaker.state(0.3).value == "closed"


def test_retries_stop_when_the_breaker_opens_meanwhile() -> None:
    world = service("a", "b", circuit_breaker={"consecutive_failures": 1})
    call = Call(world, METHOD)
    call.begin(0.0)
    other = Call(world, METHOD)
    other.begin(0.0)
    failed(other.failed(AttemptFailure(StatusCode.INTERNAL), 0.1))
    assert failed(call.failed(DOWN, 0.2)).detail.breaker == "open"


def test_the_concurrency_limit_refuses_and_frees_its_places() -> None:
    world = service("a", concurrency_limit={"max_in_flight": 1})
    first = Call(world, METHOD)
    first.begin(0.0)
    refused = failed(Call(world, METHOD).begin(0.0))
    assert (refused.code, refused.detail.reason) == (StatusCode.RESOURCE_EXHAUSTED, Reason.CONCURRENCY_LIMIT)
    assert "max_in_flight" in str(refused.detail)
    first.succeeded(0.1)
    attempt(Call(world, METHOD).begin(0.2))


def test_faults_delay_and_abort_once_per_call() -> None:
    world = service(
        "a", fault={"delay": {"duration": "1s", "percent": 100}, "abort": {"code": "ABORTED", "percent": 100}}
    )
    call = Call(world, METHOD)
    assert pause(call.begin(0.0)) == 1.0
    result = failed(call.resumed(1.0))
    assert (result.code, result.detail.reason) == (StatusCode.ABORTED, Reason.FAULT_INJECTED)
    assert world.gate.in_flight == 0


def test_faults_hit_their_share_of_calls() -> None:
    world = service("a", fault={"delay": {"duration": "1s", "percent": 0}, "abort": {"code": "ABORTED", "percent": 20}})
    hit = 0
    for _ in range(5000):
        call = Call(world, METHOD)
        if isinstance(call.begin(0.0), Failed):
            hit += 1
        else:
            call.succeeded(0.0)
    assert hit == pytest.approx(1000, rel=0.1)


def test_an_unknown_service_and_an_empty_one_and_an_unreached_control_plane_are_told_apart() -> None:
    world = Service("orders", zone="", rng=Random(1), now=0.0)
    world.unreached = "127.0.0.1:1 unreachable"
    never = failed(Call(world, METHOD).begin(0.0)).detail
    assert never.reason is Reason.CONTROL_PLANE_NEVER_REACHED
    assert never.control_plane == "127.0.0.1:1 unreachable"
    world.deactivate(Resolution.UNKNOWN, 0.0)
    assert failed(Call(world, METHOD).begin(0.0)).detail.reason is Reason.UNKNOWN_SERVICE
    activate(world)
    assert failed(Call(world, METHOD).begin(0.0)).detail.reason is Reason.NO_ENDPOINTS


def test_a_process_without_a_certificate_says_so_and_why() -> None:
    world = Service("orders", zone="", rng=Random(1), now=0.0, identity=lambda: "the join token was refused")
    world.unreached, world.unreached_reason = "not asked", Reason.NO_IDENTITY
    detail = failed(Call(world, METHOD).begin(0.0)).detail
    assert (detail.reason, detail.identity) == (Reason.NO_IDENTITY, "the join token was refused")
    assert "MESH_ENROLMENT" in detail.hint


def test_a_connection_that_was_refused_for_its_certificate_is_explained() -> None:
    world = service("a", retry=NO_RETRY)
    world.identity = lambda: "certificate valid for 23 h"
    call = Call(world, METHOD)
    attempt(call.begin(0.0))
    why = "failed to connect to all addresses; last error: Hostname Verification Check failed."
    detail = failed(call.failed(AttemptFailure(StatusCode.UNAVAILABLE, why), 0.1)).detail
    assert "a certificate of somebody else than orders, and was refused" in detail.hint


def test_an_attempt_that_did_not_reach_its_endpoint_is_told_of_whatever_becomes_of_the_call() -> None:
    world = service("a", "b")
    told: list[tuple[str, str]] = []
    world.on_unreached = lambda node, details: told.append((node.endpoint.id, details))
    call = Call(world, METHOD)
    first = attempt(call.begin(0.0)).node.endpoint.id
    pause(call.failed(DOWN, 0.1))
    attempt(call.resumed(0.2))
    call.succeeded(0.3)
    assert told == [(first, "connection refused")]
    call = Call(world, METHOD)
    attempt(call.begin(1.0))
    call.failed(AttemptFailure(StatusCode.UNAVAILABLE, "said the server", received=True), 1.1)
    assert len(told) == 1


def test_calls_wait_for_the_first_word_of_a_service() -> None:
    world = Service("orders", zone="", rng=Random(1), now=0.0)
    call = Call(world, METHOD, deadline=3.0)
    assert call.begin(0.0) == AwaitEndpoints(3.0)
    assert call.resumed(0.5) == AwaitEndpoints(3.0)
    late = failed(call.resumed(3.0))
    assert late.code is StatusCode.DEADLINE_EXCEEDED
    other = Call(world, METHOD)
    other.begin(0.0)
    activate(world, *[node.endpoint for node in service("a").nodes])
    attempt(other.resumed(1.0))


def test_a_call_that_waits_for_ready_waits_for_a_service_and_for_endpoints() -> None:
    world = Service("orders", zone="", rng=Random(1), now=0.0)
    world.deactivate(Resolution.UNKNOWN, 0.0)
    call = Call(world, METHOD, wait_for_ready=True)
    assert call.begin(0.0) == AwaitEndpoints(None)
    activate(world)
    assert call.resumed(1.0) == AwaitEndpoints(None)
    activate(world, *[node.endpoint for node in service("a").nodes])
    attempt(call.resumed(2.0))


def test_a_call_that_waits_for_ready_goes_on_while_no_endpoint_can_be_reached() -> None:
    world = service("a", retry=NO_RETRY | {"budget": {"ratio": 0, "min_per_second": 0}})
    call = Call(world, METHOD, deadline=100.0, wait_for_ready=True)
    assert call.may_retry
    call.begin(0.0)
    for turn in range(40):
        pause(call.failed(DOWN, turn + 0.5))
        attempt(call.resumed(turn + 1.0))
    answered = AttemptFailure(StatusCode.UNAVAILABLE, "maintenance", received=True)
    assert failed(call.failed(answered, 41.0)).from_attempt


def test_whether_a_method_is_ever_repeated_is_known_once_it_is_routed() -> None:
    world = service("a", retry=NO_RETRY)
    call = Call(world, METHOD)
    assert call.may_retry
    call.begin(0.0)
    assert not call.may_retry


def test_cancelling_frees_every_place_and_blames_nobody() -> None:
    world = service(
        "a", "b", outlier_detection={"consecutive_failures": 1}, circuit_breaker={"consecutive_failures": 1}
    )
    call = Call(world, METHOD)
    node = attempt(call.begin(0.0)).node
    call.cancelled(0.1)
    call.cancelled(0.2)
    assert (outstanding(world), world.gate.in_flight, node.ejected) == (0, 0, False)
    waiting = Call(world, METHOD)
    waiting.begin(0.0)
    waiting.failed(DOWN, 0.1)
    waiting.cancelled(0.2)
    assert (outstanding(world), world.gate.in_flight) == (0, 0)


def test_a_deadline_that_passes_while_waiting_to_retry_tells_of_the_attempts() -> None:
    call = Call(service("a", "b"), METHOD, deadline=1.0)
    call.begin(0.0)
    call.failed(DOWN, 0.1)
    result = failed(call.resumed(1.0))
    assert result.code is StatusCode.DEADLINE_EXCEEDED
    assert result.detail.reason is Reason.ATTEMPTS_FAILED
    assert len(result.detail.attempts) == 1


def test_events_that_do_not_fit_raise_and_change_nothing() -> None:
    world = service("a")
    call = Call(world, METHOD)
    with pytest.raises(InvalidTransitionError, match="resumed"):
        call.resumed(0.0)
    with pytest.raises(InvalidTransitionError, match="succeeded"):
        call.succeeded(0.0)
    with pytest.raises(InvalidTransitionError, match="failed"):
        call.failed(DOWN, 0.0)
    attempt(call.begin(0.0))
    with pytest.raises(InvalidTransitionError, match="begin"):
        call.begin(0.0)
    call.succeeded(0.1)
    with pytest.raises(InvalidTransitionError, match="succeeded"):
        call.succeeded(0.1)
    assert outstanding(world) == 0


def test_a_success_is_accounted_as_one() -> None:
    world = service("a", "b", retry=NO_RETRY, circuit_breaker={"consecutive_failures": 2})
    for outcome in (Outcome.FAILURE, Outcome.SUCCESS) * 5:
        call = Call(world, METHOD)
        call.begin(0.0)
        if outcome is Outcome.SUCCESS:
            call.succeeded(0.1)
        else:
            failed(call.failed(DOWN, 0.1))
    assert world.breaker.state(0.1).value == "closed"
