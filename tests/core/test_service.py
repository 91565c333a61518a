"""What all calls of a client to one service share."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from mesh_client.core.call import Attempt, AttemptFailure, Call, Failed
from mesh_client.core.errors import Reason
from mesh_client.core.model import Endpoint, Outcome, StatusCode
from mesh_client.core.policy import HashSource, ServicePolicy
from mesh_client.core.service import Service
from mesh_client.core.store import EndpointsResource, PolicyResource, Resolution
from tests.core.worlds import UNHEALTHY, activate, endpoint, service

METHOD = "/shop.v1.OrderService/PlaceOrder"


def picked(world: Service, now: float = 0.0, count: int = 200, **call: Any) -> Counter[str]:
    ids: Counter[str] = Counter()
    for _ in range(count):
        made = Call(world, METHOD, **call)
        action = made.begin(now)
        assert isinstance(action, Attempt)
        ids[action.node.endpoint.id] += 1
        made.succeeded(now)
    return ids


def test_nodes_outlive_changes_of_their_siblings_and_keep_their_load() -> None:
    world = service("a", "b")
    before = {node.endpoint.id: node for node in world.nodes}
    before["a"].load.start(0.0)
    assert activate(world, endpoint("a"), endpoint("c")) == ["b"]
    after = {node.endpoint.id: node for node in world.nodes}
    assert after["a"] is before["a"]
    assert after["a"].load.outstanding == 1
    assert set(after) == {"a", "c"}


def test_an_endpoint_that_comes_back_at_another_address_is_another_node() -> None:
    world = service("a")
    (before,) = world.nodes
    moved = endpoint("a")
    activate(world, type(moved)("a", "127.0.0.1", 9))
    (after,) = world.nodes
    assert after is not before


def test_what_does_not_change_is_left_alone() -> None:
    world = service("a")
    policy = PolicyResource("orders", world.policy_version, world.policy)
    endpoints = EndpointsResource("orders", world.endpoints_version, (endpoint("zzz"),))
    assert world.activate(policy, endpoints, 0.0) == []
    assert [node.endpoint.id for node in world.nodes] == ["a"]


def test_a_service_that_goes_gives_up_its_nodes() -> None:
    world = service("a", "b")
    assert [node.endpoint.id for node in world.deactivate(Resolution.UNKNOWN, 0.0)] == ["a", "b"]
    assert world.picker.pick(None, (), 0.0) is None
    activate(world, endpoint("a"))
    assert picked(world) == {"a": 200}


def test_newcomers_start_slowly_and_the_first_ones_do_not() -> None:
    slow: dict[str, Any] = {"load_balancer": {"slow_start": "10s", "algorithm": "ROUND_ROBIN"}}
    world = service("a", **slow)
    activate(world, endpoint("a"), endpoint("b"), now=0.0, **slow)
    early = picked(world, 1.0)
    assert early["b"] < 60 < early["a"]
    settled = picked(world, 20.0)
    assert settled["b"] == pytest.approx(100, abs=2)


def test_an_endpoint_that_recovers_starts_slowly_again() -> None:
    slow: dict[str, Any] = {"load_balancer": {"slow_start": "10s", "algorithm": "ROUND_ROBIN"}}
    world = service("a", "b", "c", **slow)
    ill = [endpoint("a"), endpoint("b"), endpoint("c", health=UNHEALTHY)]
    activate(world, *ill, now=5.0, **slow)
    assert "c" not in picked(world, 5.0)
    activate(world, *map(endpoint, "abc"), now=6.0, **slow)
    assert 0 < picked(world, 7.0, 300)["c"] < 60


def test_an_ejected_endpoint_gets_no_calls_until_its_time_is_up() -> None:
    world = service("a", "b", outlier_detection={"consecutive_failures": 1, "base_ejection": "30s"})
    node = next(iter(world.nodes))
    world.record(node, Outcome.FAILURE, 0.0)
    assert node.ejected
    assert picked(world, 1.0) == {"b": 200}
    assert set(picked(world, 31.0)) == {"a", "b"}
    assert not node.ejected


def test_time_that_changes_nothing_leaves_the_picker_alone() -> None:
    world = service("a", "b")
    before = world.picker
    picked(world, 0.0)
    picked(world, 1000.0)
    assert world.picker is before


def test_results_of_an_endpoint_that_moved_do_not_count_against_its_successor() -> None:
    world = service("a", "b", outlier_detection={"consecutive_failures": 1})
    before = next(iter(world.nodes))
    moved = endpoint("a")
    activate(world, type(moved)("a", "127.0.0.1", 9), endpoint("b"), outlier_detection={"consecutive_failures": 1})
    world.record(before, Outcome.FAILURE, 0.0)
    assert not any(node.ejected for node in world.nodes)


def test_the_successor_of_an_ejected_endpoint_is_not_ejected_for_it() -> None:
    outliers: dict[str, Any] = {"consecutive_failures": 1, "max_ejected_percent": 50}
    world = service("a", "b", "c", "d", outlier_detection=outliers)
    for node in list(world.nodes)[:2]:
        world.record(node, Outcome.FAILURE, 0.0)
    moved = Endpoint("a", "127.0.0.1", 9)
    activate(world, moved, endpoint("b"), endpoint("c"), endpoint("d"), outlier_detection=outliers)
    assert [node.endpoint.id for node in world.nodes if node.ejected] == ["b"]
    assert picked(world)["a"] > 0


def test_the_first_route_that_matches_decides() -> None:
    world = service(
        "a",
        timeout="1s",
        routes=[
            {"method": "shop.v1.OrderService/GetOrder", "timeout": "2s"},
            {"method": "shop.v1.OrderService/*", "metadata": {"x-slow": "yes"}, "timeout": "3s"},
            {"method": "shop.v1.OrderService/PlaceOrder", "retry": {"max_attempts": 1}},
        ],
    )
    assert world.settings("/shop.v1.OrderService/GetOrder").timeout == 2.0
    assert world.settings(METHOD, [("x-slow", "yes")]).timeout == 3.0
    assert world.settings(METHOD, [("x-slow", "no")]).timeout == 1.0
    assert world.settings(METHOD).retry.max_attempts == 1
    assert world.settings("/other.Service/Method").retry.max_attempts == 3
    assert world.settings("/other.Service/Method") is world.settings("/other.Service/Method")


def test_a_split_divides_calls_over_subsets() -> None:
    world = service()
    split = [{"labels": {"version": "v1"}, "weight": 90}, {"labels": {"version": "v2"}, "weight": 10}]
    dead = [{"labels": {"version": "v0"}, "weight": 0}]
    activate(
        world,
        endpoint("a", metadata={"version": "v1"}),
        endpoint("b", metadata={"version": "v2", "extra": "x"}),
        endpoint("c"),
        routes=[{"split": dead + split}],
    )
    spread = picked(world, count=2000)
    assert set(spread) == {"a", "b"}
    assert spread["b"] == pytest.approx(200, rel=0.25)


def test_a_subset_without_endpoints_is_told_from_a_service_without_any() -> None:
    split = [{"split": [{"labels": {"version": "v9"}, "weight": 1}]}]
    world = service("a", routes=split)
    action = Call(world, METHOD).begin(0.0)
    assert isinstance(action, Failed)
    assert action.detail.reason is Reason.NO_MATCHING_ENDPOINTS
    assert "split" in action.detail.hint


def test_a_new_policy_counts_at_once_and_keeps_what_it_does_not_change() -> None:
    world = service("a", circuit_breaker={"consecutive_failures": 1}, retry={"max_attempts": 1})
    call = Call(world, METHOD)
    call.begin(0.0)
    call.failed(AttemptFailure(StatusCode.UNAVAILABLE), 0.0)
    assert world.breaker.state(0.0).value == "open"
    activate(world, endpoint("a"), circuit_breaker={"consecutive_failures": 1}, timeout="1s")
    assert world.breaker.state(0.0).value == "open"
    activate(
        world,
        endpoint("a"),
        circuit_breaker={"enabled": False},
        outlier_detection={"enabled": False},
        retry={"budget": {"ratio": 0.5}},
        concurrency_limit={"max_in_flight": 7},
    )
    assert world.breaker.state(0.0).value == "closed"
    assert world.gate.limit == 7


def test_a_call_that_began_under_an_older_breaker_does_not_count_for_the_newer() -> None:
    world = service("a", circuit_breaker={"consecutive_failures": 1}, retry={"max_attempts": 1})
    call = Call(world, METHOD)
    call.begin(0.0)
    activate(
        world,
        endpoint("a"),
        circuit_breaker={"consecutive_failures": 1, "open_duration": "1s"},
        retry={"max_attempts": 1},
    )
    call.failed(AttemptFailure(StatusCode.UNAVAILABLE), 0.0)
    assert world.breaker.state(0.0).value == "closed"


def test_the_hash_source_is_known_only_while_hashing() -> None:
    assert service("a").hash_source is None
    hashing = service("a", load_balancer={"algorithm": "RING_HASH", "hash_key": {"source": "EXPLICIT"}})
    assert hashing.hash_source is HashSource.EXPLICIT


def test_a_key_sticks_to_its_endpoint() -> None:
    world = service("a", "b", "c", load_balancer={"algorithm": "RING_HASH"})
    assert len(picked(world, key="customer-7")) == 1


def test_transitions_of_the_breaker_are_told() -> None:
    told: list[tuple[str, str]] = []
    world = Service(
        "orders",
        zone="",
        rng=Random(1),
        now=0.0,
        on_transition=lambda old, new: told.append((old.value, new.value)),
        snapshot_age=lambda now: 2.5,
        control_plane=lambda: "connected",
    )
    activate(world, endpoint("a"), circuit_breaker={"consecutive_failures": 1}, retry={"max_attempts": 1})
    call = Call(world, METHOD)
    call.begin(0.0)
    result = call.failed(AttemptFailure(StatusCode.UNAVAILABLE), 0.0)
    assert told == [("closed", "open")]
    assert isinstance(result, Failed)
    assert "2.5 s old" in str(result.detail)
    assert "control plane connected" in str(result.detail)


def test_a_policy_is_the_default_before_any_is_known() -> None:
    assert Service("orders", zone="", rng=Random(1), now=0.0).policy == ServicePolicy(service="orders")


def test_calls_and_retries_are_counted_from_the_start_whatever_the_policy_becomes() -> None:
    world = service("a", "b")
    for now in (0.0, 30.0, 30.5):
        made = Call(world, METHOD)
        made.begin(now)
        assert not isinstance(made.failed(AttemptFailure(StatusCode.UNAVAILABLE), now), Failed)
        made.resumed(now)
        made.succeeded(now)
    assert (world.calls, world.retries) == (3, 3)
    activate(world, endpoint("a"), endpoint("b"), now=31.0, retry={"budget": {"ratio": 0.5}})
    assert (world.calls, world.retries) == (3, 3)
    picked(world, now=31.0, count=2)
    assert (world.calls, world.retries) == (5, 3)


def test_calls_that_are_refused_are_not_counted() -> None:
    world = service("a", concurrency_limit={"max_in_flight": 1})
    Call(world, METHOD).begin(0.0)
    assert isinstance(Call(world, METHOD).begin(0.0), Failed)
    assert world.calls == 1
