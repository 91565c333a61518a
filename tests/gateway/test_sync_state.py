"""What an edge is told, and when: policies, endpoints, credentials, failures and leadership come in, pushes go out."""

from __future__ import annotations

from random import Random

import pytest

from gateway.endpoints import routable
from gateway.sync_state import MAXIMUM, PATIENCE, QUIET, RETRY, Observe, PolicyVersion, Push, Result, Sync
from mesh_client.core.edge_policy import EdgePolicy, ExposedService
from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.model import Endpoint, Health
from mesh_client.core.store import EndpointsResource


def policy(version: str, *upstreams: str) -> PolicyVersion:
    services = {f"shop.v1.{name.capitalize()}": ExposedService(upstream=name) for name in upstreams}
    return PolicyVersion(version, EdgePolicy(services=services))


def endpoints(service: str, version: str, *ports: int) -> EndpointsResource:
    return EndpointsResource(service, version, tuple(Endpoint(f"e{port}", "10.0.0.1", port) for port in ports))


NOTHING = PolicyVersion("", EdgePolicy())
P1, P2 = policy("p1", "orders"), policy("p2", "orders", "stock")
BAD = policy("bad", "orders", "wrong")
E1, E2, E3 = endpoints("orders", "e1", 1, 2), endpoints("orders", "e2", 2), endpoints("orders", "e3", 2, 3)


def check(policy: EdgePolicy) -> str:
    return "no such service" if "wrong" in policy.upstreams else ""


def machine(*, good: PolicyVersion | None = None, pushes: bool = True) -> Sync:
    sync = Sync(check, Random(1), 0.0)
    if good is not None:
        sync.recovered(good)
    sync.lead(0.0, pushes=pushes)
    return sync


def push(sync: Sync, now: float) -> Push:
    action = sync.due(now)
    assert isinstance(action, Push)
    return action


def in_force(sync: Sync | None = None, now: float = 0.0) -> Sync:
    """One that has told the edge the first policy and the first endpoints."""
    sync = sync or machine()
    sync.policy_changed(P1, now)
    sync.endpoints_changed("orders", E1, now)
    push(sync, now + 1.0)
    sync.applied(now + 1.0)
    return sync


def test_a_policy_is_pushed_once_the_endpoints_of_all_its_services_are_known() -> None:
    sync = machine()
    assert sync.state().result is Result.PENDING
    sync.policy_changed(P2, 0.0)
    assert sync.upstreams == {"orders", "stock"}
    sync.endpoints_changed("orders", E1, 0.0)
    assert sync.due(1.0) is None
    assert sync.deadline(1.0) is None
    sync.endpoints_changed("stock", None, 1.0)
    assert sync.deadline(1.0) == pytest.approx(MAXIMUM)
    action = push(sync, 1.0)
    assert (action.policy, action.endpoints) == (P2, {"orders": E1, "stock": None})
    assert sync.deadline(1.0) is None
    assert sync.settled < sync.generation
    sync.applied(1.1)
    assert sync.settled == sync.generation == action.generation
    assert sync.due(9.0) is None
    assert sync.deadline(9.0) is None
    state = sync.state()
    assert (state.result, state.policy_version, state.applied_version) == (Result.APPLIED, "p2", "p2")
    assert (state.endpoints, state.reason) == ({"orders": "e1"}, "")


def test_endpoints_are_not_held_back_by_those_that_come_only_after_them() -> None:
    sync = machine()
    sync.policy_changed(P2, 0.0)
    sync.endpoints_changed("orders", E1, 0.0)
    assert sync.settled == sync.generation
    sync.endpoints_changed("stock", None, 0.0)
    assert sync.settled < sync.generation
    sync = in_force()
    sync.policy_changed(P2, 2.0)
    sync.endpoints_changed("orders", E2, 2.0)
    assert sync.settled < sync.generation  # the policy before has all that it needs
    action = push(sync, 3.0)
    assert (action.policy, action.endpoints) == (P1, {"orders": E2})


def test_where_nothing_is_exposed_the_edge_is_told_that() -> None:
    sync = machine()
    sync.policy_changed(NOTHING, 0.0)
    assert push(sync, 1.0).endpoints == {}
    assert sync.state().result is Result.PENDING
    sync.applied(1.0)
    assert sync.state().result is Result.APPLIED


def test_changes_that_come_close_together_are_pushed_together_and_not_for_ever_later() -> None:
    sync = in_force()
    start = 10.0
    sync.endpoints_changed("orders", E2, start)
    assert sync.due(start + QUIET / 2) is None
    assert sync.deadline(start + QUIET / 2) == pytest.approx(start + QUIET)
    now = start
    for _ in range(9):
        now += QUIET * 0.99
        sync.credentials_changed(now)
        assert sync.due(now) is None
    sync.endpoints_changed("orders", E3, now)
    assert sync.deadline(now) == pytest.approx(min(now + QUIET, start + MAXIMUM))
    assert push(sync, start + MAXIMUM).endpoints == {"orders": E3}


def test_what_changes_during_a_push_is_pushed_after_it_and_only_then_settled() -> None:
    sync = in_force()
    sync.endpoints_changed("orders", E2, 2.0)
    push(sync, 3.0)
    sync.endpoints_changed("orders", E3, 3.0)
    wanted = sync.generation
    assert sync.due(4.0) is None
    sync.applied(4.0)
    assert sync.settled == wanted - 1
    assert push(sync, 4.0).endpoints == {"orders": E3}
    sync.applied(4.1)
    assert sync.settled == wanted


def test_what_is_told_again_changes_nothing() -> None:
    sync = in_force()
    sync.policy_changed(P1, 2.0)
    sync.endpoints_changed("orders", E1, 2.0)
    assert sync.settled == sync.generation


def test_a_policy_that_does_not_fit_is_rejected_and_the_last_good_one_follows_the_endpoints() -> None:
    sync = in_force()
    sync.policy_changed(BAD, 2.0)
    assert sync.due(3.0) is None
    state = sync.state()
    assert (state.result, state.policy_version, state.applied_version) == (Result.REJECTED, "bad", "p1")
    assert state.reason == "no such service"
    assert sync.upstreams == {"orders"}
    sync.endpoints_changed("orders", E2, 3.0)
    action = push(sync, 4.0)
    assert (action.policy, action.endpoints) == (P1, {"orders": E2})
    sync.applied(4.0)
    assert sync.state().result is Result.REJECTED
    sync.policy_changed(P1, 5.0)
    push(sync, 6.0)
    sync.applied(6.0)
    assert sync.state().result is Result.APPLIED


def test_a_policy_that_the_edge_refuses_is_rejected_and_the_last_good_one_is_pushed_with_what_is_new() -> None:
    sync = in_force()
    sync.policy_changed(P2, 2.0)
    sync.endpoints_changed("stock", None, 2.0)
    assert push(sync, 3.0).policy == P2
    sync.rejected("schema violation", 3.1)
    assert sync.state().reason == "schema violation"
    assert sync.settled < sync.generation
    assert push(sync, 3.1).policy == P1
    sync.applied(3.2)
    assert sync.settled == sync.generation
    assert sync.state().result is Result.REJECTED
    assert sync.deadline(9.0) is None


def test_a_policy_refused_for_a_reason_that_may_pass_is_tried_again() -> None:
    sync = in_force()
    sync.policy_changed(P2, 2.0)
    sync.endpoints_changed("stock", None, 2.0)
    push(sync, 3.0)
    sync.rejected("there is no secret web-key", 3.0, again=30.0)
    assert push(sync, 3.0).policy == P1
    sync.applied(3.0)
    assert sync.deadline(3.0) == 33.0
    assert sync.due(32.9) is None
    assert sync.due(33.0) is None  # begins to wait for further changes, as ever
    assert push(sync, 33.1).policy == P2
    sync.applied(33.2)
    assert sync.state().result is Result.APPLIED


def test_a_rejection_of_a_policy_that_is_no_longer_the_newest_rejects_nothing() -> None:
    sync = machine()
    sync.policy_changed(P1, 0.0)
    sync.endpoints_changed("orders", E1, 0.0)
    sync.endpoints_changed("stock", None, 0.0)
    push(sync, 1.0)
    sync.policy_changed(P2, 1.0)
    sync.rejected("no", 1.1)
    assert sync.state().result is Result.PENDING
    assert push(sync, 2.0).policy == P2


def test_a_refusal_of_what_was_good_before_is_a_failure_and_tried_again() -> None:
    sync = in_force()
    sync.endpoints_changed("orders", E2, 2.0)
    push(sync, 3.0)
    sync.rejected("odd", 3.0)
    state = sync.state()
    assert (state.result, state.reason) == (Result.FAILED, "odd")
    deadline = sync.deadline(3.0)
    assert deadline is not None
    assert push(sync, deadline).endpoints == {"orders": E2}


def test_a_first_policy_that_is_rejected_leaves_the_edge_alone_and_nobody_waits_for_it() -> None:
    sync = machine()
    sync.policy_changed(P1, 0.0)
    sync.endpoints_changed("orders", E1, 0.0)
    assert sync.settled < sync.generation
    push(sync, 1.0)
    sync.rejected("no", 1.0)
    assert sync.due(9.0) is None
    assert sync.settled == sync.generation


def test_what_fails_is_tried_again_later_and_later_and_no_sooner_than_the_edge_says() -> None:
    sync = in_force()
    sync.policy_changed(BAD, 2.0)
    sync.endpoints_changed("orders", E2, 2.0)
    now = 3.0
    for failures in range(1, 40):
        push(sync, now)
        sync.failed("connection refused", now)
        deadline = sync.deadline(now)
        assert deadline is not None
        bound = min(RETRY.initial * 2.0 ** (failures - 1), RETRY.max)
        assert now + bound / 2 <= deadline <= now + bound
        assert sync.due(deadline - 0.01) is None
        now = deadline
    state = sync.state()
    assert state.result is Result.FAILED
    assert state.reason == "connection refused; and version bad is rejected: no such service"
    push(sync, now)
    sync.failed("busy", now, after=60.0)
    assert sync.deadline(now) == now + 60.0
    push(sync, now + 60.0)
    sync.applied(now + 60.0)
    assert sync.state().result is Result.REJECTED


def test_a_new_certificate_is_pushed_and_so_is_everything_when_the_edge_has_lost_it() -> None:
    sync = in_force()
    sync.credentials_changed(2.0)
    push(sync, 3.0)
    sync.applied(3.0)
    sync.lost(4.0)
    assert push(sync, 5.0).endpoints == {"orders": E1}


def test_the_policy_of_an_earlier_process_is_used_when_the_control_plane_says_nothing() -> None:
    sync = machine(good=P1)
    assert sync.upstreams == {"orders"}
    sync.endpoints_changed("orders", E1, 0.0)
    assert sync.due(1.0) is None
    assert sync.deadline(1.0) == PATIENCE
    assert push(sync, PATIENCE).policy == P1
    sync.applied(PATIENCE)
    assert sync.deadline(PATIENCE) is None
    assert sync.state().result is Result.PENDING
    assert sync.state().applied_version == "p1"
    sync.policy_changed(P1, 6.0)
    assert sync.state().result is Result.APPLIED


def test_a_policy_that_was_found_good_in_this_process_is_not_replaced_by_that_of_an_earlier_one() -> None:
    sync = in_force()
    sync.recovered(P2)
    assert sync.upstreams == {"orders"}


def test_the_policy_of_an_earlier_process_gives_way_to_the_stored_one() -> None:
    sync = machine(good=P2)
    sync.policy_changed(P1, 0.0)
    sync.endpoints_changed("orders", E1, 0.0)
    assert push(sync, 1.0).policy == P1


def test_a_gateway_that_stands_by_waits_until_what_has_left_is_gone_and_pushes_nothing() -> None:
    sync = machine(pushes=False)
    sync.policy_changed(P1, 0.0)
    sync.endpoints_changed("orders", E1, 0.0)
    assert sync.due(1.0) is None
    assert sync.settled == sync.generation  # nothing has left
    assert sync.state().result is Result.STANDBY
    sync.endpoints_changed("orders", E3, 1.0)
    action = sync.due(2.0)
    assert action == Observe(sync.generation, {"orders": frozenset({"10.0.0.1:1"})})
    sync.endpoints_changed("orders", endpoints("orders", "e4", 3), 2.0)
    sync.observed()
    assert sync.settled == action.generation
    action = sync.due(3.0)
    assert isinstance(action, Observe)
    assert action.gone == {"orders": frozenset({"10.0.0.1:2"})}
    sync.observed()
    assert sync.settled == sync.generation


def test_a_service_that_is_unknown_now_has_lost_all_its_endpoints() -> None:
    sync = machine(pushes=False)
    sync.policy_changed(P1, 0.0)
    sync.endpoints_changed("orders", E1, 0.0)
    assert sync.due(1.0) is None
    sync.endpoints_changed("orders", None, 1.0)
    action = sync.due(2.0)
    assert isinstance(action, Observe)
    assert action.gone == {"orders": frozenset({"10.0.0.1:1", "10.0.0.1:2"})}


def test_whoever_takes_over_pushes_at_once_what_it_knows() -> None:
    sync = machine(pushes=False)
    sync.policy_changed(P1, 0.0)
    sync.endpoints_changed("orders", E1, 0.0)
    assert sync.due(1.0) is None
    sync.endpoints_changed("orders", E2, 1.0)
    assert isinstance(sync.due(2.0), Observe)
    sync.lead(2.0, pushes=True)
    with pytest.raises(InvalidTransitionError, match="observed"):
        sync.observed()
    assert push(sync, 3.0).endpoints == {"orders": E2}
    sync.lead(3.0, pushes=True)
    sync.lead(3.0, pushes=False)
    sync.applied(3.0)
    assert sync.settled == sync.generation
    assert sync.state().result is Result.STANDBY


def test_a_push_stands_when_leadership_is_lost_and_won_again_meanwhile() -> None:
    sync = in_force()
    sync.endpoints_changed("orders", E2, 2.0)
    push(sync, 3.0)
    sync.lead(3.0, pushes=False)
    sync.lead(3.0, pushes=True)
    assert sync.due(3.5) is None
    sync.applied(4.0)
    push(sync, 4.0)


def test_ends_of_what_was_not_begun_are_refused() -> None:
    sync = in_force()
    with pytest.raises(InvalidTransitionError, match="nothing was pushed"):
        sync.applied(2.0)
    with pytest.raises(InvalidTransitionError, match="nothing was pushed"):
        sync.rejected("no", 2.0)
    with pytest.raises(InvalidTransitionError, match="nothing was pushed"):
        sync.failed("no", 2.0)
    with pytest.raises(InvalidTransitionError, match="observed"):
        sync.observed()
    assert sync.settled == sync.generation


def test_those_that_leave_are_not_routed_to_and_those_that_fail_only_when_all_do() -> None:
    healthy = Endpoint("a", "10.0.0.1", 1)
    failing = Endpoint("b", "10.0.0.1", 2, health=Health.UNHEALTHY)
    leaving = Endpoint("c", "10.0.0.1", 3, health=Health.DRAINING)
    assert routable([healthy, failing, leaving]) == (healthy,)
    assert routable([failing, leaving]) == (failing,)
    assert routable([leaving]) == ()
