"""The client's half of the discovery protocol."""

from __future__ import annotations

import pytest

from mesh_client.core.errors import InvalidTransitionError, InvalidValueError
from mesh_client.core.model import Endpoint, ResourceKind
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.store import (
    Acknowledge,
    EndpointsDelta,
    EndpointsResource,
    PolicyResource,
    Resolution,
    Store,
    Subscribe,
    Update,
)

POLICY, ENDPOINTS = ResourceKind.POLICY, ResourceKind.ENDPOINTS


def endpoint(name: str, port: int = 1) -> Endpoint:
    return Endpoint(name, "127.0.0.1", port)


def policy(service: str = "orders", version: str = "p1") -> PolicyResource:
    return PolicyResource(service, version, ServicePolicy(service=service))


def endpoints(*names: str, service: str = "orders", version: str = "e1") -> EndpointsResource:
    return EndpointsResource(service, version, tuple(map(endpoint, names)))


def update(*resources: PolicyResource | EndpointsResource | EndpointsDelta, removed: tuple[str, ...] = ()) -> Update:
    kind = POLICY if resources and isinstance(resources[0], PolicyResource) else ENDPOINTS
    return Update(kind, "n", resources, removed)


def active_store(*names: str) -> Store:
    store = Store()
    store.subscribe("orders")
    store.opened()
    store.apply(update(policy()))
    store.apply(update(endpoints(*names)))
    return store


def test_a_service_is_active_once_it_has_policy_and_endpoints() -> None:
    store = Store()
    assert store.subscribe("orders") == ()
    store.opened()
    assert store.resolution("orders") is Resolution.PENDING
    assert store.apply(update(policy())) == (Acknowledge(POLICY, "n", {}, ()), frozenset({"orders"}))
    assert store.resolution("orders") is Resolution.PENDING
    store.apply(update(endpoints()))
    assert store.resolution("orders") is Resolution.ACTIVE
    assert store.endpoints("orders") == endpoints()
    assert store.policy("orders") == policy()


def test_removed_is_unknown_and_empty_is_not() -> None:
    store = active_store("a")
    _, changed = store.apply(update(removed=("orders",)))
    assert changed == {"orders"}
    assert store.resolution("orders") is Resolution.UNKNOWN
    store.apply(Update(POLICY, "n", removed=("orders",)))
    assert store.policy("orders") is None
    store.apply(update(policy(version="p2")))
    assert store.resolution("orders") is Resolution.PENDING


def test_a_first_request_states_what_is_held() -> None:
    store = active_store("a")
    store.closed()
    store.subscribe("inventory")
    assert store.opened() == (
        Subscribe(POLICY, ("orders", "inventory"), held_versions={"orders": "p1"}),
        Subscribe(ENDPOINTS, ("orders", "inventory"), held_versions={"orders": "e1"}),
    )
    assert store.services == ("orders", "inventory")


def test_a_subscription_on_an_open_stream_is_sent_for_both_kinds_and_once() -> None:
    store = active_store()
    assert store.subscribe("inventory") == (Subscribe(POLICY, ("inventory",)), Subscribe(ENDPOINTS, ("inventory",)))
    assert store.subscribe("inventory") == ()


def test_a_name_that_is_no_dns_label_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="DNS label"):
        Store().subscribe("Orders!")


def test_a_delta_changes_what_is_held() -> None:
    store = active_store("a", "b")
    delta = EndpointsDelta("orders", "e2", "e1", (endpoint("a", 2), endpoint("c")), ("b", "never-there"))
    answer, _ = store.apply(update(delta))
    assert answer.resync == ()
    held = store.endpoints("orders")
    assert held is not None
    assert held == EndpointsResource("orders", "e2", (endpoint("a", 2), endpoint("c")))


def test_a_delta_on_another_base_asks_for_the_whole_and_keeps_what_is_held() -> None:
    store = active_store("a")
    answer, changed = store.apply(update(EndpointsDelta("orders", "e3", "e2", (), ("a",))))
    assert answer.resync == ("orders",)
    assert changed == frozenset()
    assert store.endpoints("orders") == endpoints("a")


def test_a_delta_before_any_whole_asks_for_the_whole() -> None:
    store = Store()
    store.subscribe("orders")
    store.opened()
    answer, _ = store.apply(update(EndpointsDelta("orders", "e2", "e1", (), ())))
    assert answer.resync == ("orders",)


def test_a_delta_that_contradicts_itself_is_rejected() -> None:
    store = active_store("a")
    answer, changed = store.apply(update(EndpointsDelta("orders", "e2", "e1", (endpoint("b"), endpoint("b", 2)), ())))
    assert "unique" in answer.rejected["orders"]
    assert changed == frozenset()
    assert store.endpoints("orders") == endpoints("a")


def test_a_delta_refuses_another_base() -> None:
    with pytest.raises(InvalidValueError, match="base_version"):
        EndpointsDelta("orders", "e3", "e2", (), ()).apply(endpoints("a"))


def test_what_could_not_be_decoded_is_rejected_and_the_rest_is_taken() -> None:
    store = active_store("a")
    store.subscribe("inventory")
    answer, changed = store.apply(
        Update(ENDPOINTS, "n", (endpoints("b", version="e2"),), invalid={"inventory": "endpoint.port: 0"})
    )
    assert answer.rejected == {"inventory": "endpoint.port: 0"}
    assert changed == {"orders"}
    assert store.endpoints("orders") == endpoints("b", version="e2")


def test_services_that_nobody_asked_for_are_ignored() -> None:
    store = active_store()
    _, changed = store.apply(update(endpoints("x", service="other"), removed=("another",)))
    assert changed == frozenset()
    assert store.services == ("orders",)


def test_it_is_in_sync_once_the_open_stream_has_spoken_of_both_kinds() -> None:
    store = Store()
    store.subscribe("orders")
    store.opened()
    assert not store.in_sync
    store.apply(Update(POLICY, "1"))
    assert not store.in_sync
    store.apply(Update(ENDPOINTS, "2"))
    assert store.in_sync
    store.closed()
    assert not store.in_sync
    store.opened()
    assert not store.in_sync


def test_illegal_events_raise_and_change_nothing() -> None:
    store = Store()
    store.subscribe("orders")
    with pytest.raises(InvalidTransitionError, match="no discovery stream"):
        store.apply(update(policy()))
    assert store.policy("orders") is None
    store.opened()
    with pytest.raises(InvalidTransitionError, match="open already"):
        store.opened()


def test_the_cache_counts_only_when_it_is_asked_to_and_only_for_what_is_not_known() -> None:
    store = Store()
    store.restore(
        [policy(), policy("inventory"), policy("half")], [endpoints("old"), endpoints("old", service="inventory")]
    )
    for name in ("orders", "inventory", "half"):
        store.subscribe(name)
    assert store.resolution("orders") is Resolution.PENDING
    store.opened()
    store.apply(update(policy(version="p2")))
    store.closed()
    assert store.use_cache() == {"inventory"}
    assert store.use_cache() == frozenset()
    assert store.resolution("inventory") is Resolution.ACTIVE
    assert store.resolution("half") is Resolution.PENDING
    assert not store.confirmed("inventory")
    assert store.confirmed("orders")


def applied_elsewhere() -> Store:
    store = Store(applied_elsewhere=True)
    store.subscribe("orders")
    return store


def test_endpoints_that_are_applied_elsewhere_do_not_count_as_held_before_they_are_in_force() -> None:
    store = applied_elsewhere()
    unsure = Subscribe(ENDPOINTS, ("orders",), resync=("orders",))
    # What an earlier process has applied is not known.
    assert store.opened() == (Subscribe(POLICY, ("orders",)), unsure)
    store.apply(update(policy()))
    store.apply(update(endpoints("a")))
    store.closed()
    assert store.opened() == (Subscribe(POLICY, ("orders",), held_versions={"orders": "p1"}), unsure)


def test_endpoints_that_are_applied_elsewhere_count_as_held_once_they_are_in_force() -> None:
    store = applied_elsewhere()
    store.opened()
    store.apply(update(endpoints("a")))
    store.applied(["orders"])
    store.closed()
    assert store.opened()[1] == Subscribe(ENDPOINTS, ("orders",), held_versions={"orders": "e1"})


@pytest.mark.parametrize(
    "change",
    [
        update(EndpointsDelta("orders", "e2", "e1", (endpoint("b"),), ("a",))),
        update(endpoints("b", version="e2")),
        update(removed=("orders",)),
    ],
    ids=["delta", "whole", "removed"],
)
def test_each_change_has_to_come_into_force_again(change: Update) -> None:
    store = applied_elsewhere()
    store.opened()
    store.apply(update(endpoints("a")))
    store.applied(["orders"])
    store.apply(change)
    store.closed()
    assert store.opened()[1] == Subscribe(ENDPOINTS, ("orders",), resync=("orders",))


def test_a_service_that_is_applied_elsewhere_is_unsure_also_when_it_is_subscribed_to_later() -> None:
    store = Store(applied_elsewhere=True)
    store.opened()
    assert store.subscribe("orders") == (
        Subscribe(POLICY, ("orders",)),
        Subscribe(ENDPOINTS, ("orders",), resync=("orders",)),
    )


def test_a_change_that_is_refused_leaves_in_force_what_was() -> None:
    store = applied_elsewhere()
    store.opened()
    store.apply(update(endpoints("a")))
    store.applied(["orders"])
    store.apply(update(EndpointsDelta("orders", "e2", "e1", (endpoint("b"), endpoint("b", 2)), ())))
    store.closed()
    assert store.opened()[1] == Subscribe(ENDPOINTS, ("orders",), held_versions={"orders": "e1"})


def test_what_is_cached_is_stated_as_held_when_a_stream_opens_at_last() -> None:
    store = Store()
    store.restore([policy()], [endpoints("old")])
    store.subscribe("orders")
    store.use_cache()
    first, second = store.opened()
    assert (first.held_versions, second.held_versions) == ({"orders": "p1"}, {"orders": "e1"})


def test_the_cache_keeps_active_services_and_those_not_heard_of_and_drops_unknown_ones() -> None:
    store = Store()
    store.restore([policy("gone"), policy("later")], [endpoints("x", service="gone"), endpoints("y", service="later")])
    for name in ("orders", "gone", "later"):
        store.subscribe(name)
    store.opened()
    store.apply(update(policy(), policy("gone")))
    store.apply(update(endpoints("a"), removed=("gone",)))
    assert {kept.service for kept, _ in store.active()} == {"orders", "later"}
