"""Snapshots: versions, structural sharing, consistency, deltas."""

from __future__ import annotations

import gc
import hashlib
from types import MappingProxyType

import hypothesis.strategies as st
import pytest
from hypothesis import given

from control_plane.events import PolicyStored
from control_plane.policies import PolicyBook
from control_plane.snapshot import (
    EMPTY,
    DeltaCache,
    EndpointsResource,
    InconsistentSnapshotError,
    PolicyResource,
    Snapshot,
    build_snapshot,
    changes,
    check_consistency,
    endpoints_delta,
)
from mesh_client.core.model import Endpoint, Health, Locality, ResourceKind
from mesh_client.core.policy import ServicePolicy


def endpoints(*ids: str, port: int = 1000) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(id, "127.0.0.1", port) for id in ids)


def resource(*members: Endpoint) -> EndpointsResource:
    return build_snapshot({"orders": members}, PolicyBook(ServicePolicy).policy).endpoints["orders"]


class TestVersions:
    def test_equal_content_has_an_equal_version_everywhere(self) -> None:
        one = Endpoint("1", "127.0.0.1", 1000, metadata={"b": "2", "a": "1"})
        same = Endpoint("1", "127.0.0.1", 1000, metadata={"a": "1", "b": "2"})
        assert resource(one).version == resource(same).version

    def test_the_version_is_a_hash_that_no_release_may_change_silently(self) -> None:
        canonical = b'[["1","127.0.0.1",1000,1,"healthy","","",[]]]'
        assert resource(*endpoints("1")).version == hashlib.sha256(canonical).hexdigest()[:16]

    @pytest.mark.parametrize(
        "other",
        [
            Endpoint("2", "127.0.0.1", 1000),
            Endpoint("1", "127.0.0.2", 1000),
            Endpoint("1", "127.0.0.1", 1001),
            Endpoint("1", "127.0.0.1", 1000, weight=2),
            Endpoint("1", "127.0.0.1", 1000, health=Health.UNHEALTHY),
            Endpoint("1", "127.0.0.1", 1000, locality=Locality(zone="z")),
            Endpoint("1", "127.0.0.1", 1000, locality=Locality(region="r")),
            Endpoint("1", "127.0.0.1", 1000, metadata={"a": "1"}),
        ],
    )
    def test_every_field_counts(self, other: Endpoint) -> None:
        assert resource(other).version != resource(*endpoints("1")).version

    def test_a_service_without_endpoints_has_a_version(self) -> None:
        assert len(resource().version) == 16


class TestBuilding:
    def test_every_known_service_has_policy_and_endpoints(self) -> None:
        book = PolicyBook(ServicePolicy)
        book.apply(PolicyStored("orders", b"service: orders\ntimeout: 3s\n", "1"))
        book.apply(PolicyStored("unknown", b"service: unknown\n", "1"))
        snapshot = build_snapshot({"orders": endpoints("1"), "payments": ()}, book.policy)
        assert snapshot.policies.keys() == snapshot.endpoints.keys() == {"orders", "payments"}
        assert snapshot.policies["orders"].policy.timeout == 3.0
        assert snapshot.policies["payments"].policy.timeout is None
        check_consistency(snapshot)

    def test_what_does_not_change_stays_the_same_object(self) -> None:
        book = PolicyBook(ServicePolicy)
        before = build_snapshot({"orders": endpoints("1"), "payments": endpoints("2")}, book.policy)
        book.apply(PolicyStored("orders", b"service: orders\ntimeout: 3s\n", "1"))
        after = build_snapshot({"orders": endpoints("1"), "payments": endpoints("2", "3")}, book.policy, before)
        assert after.endpoints["orders"] is before.endpoints["orders"]
        assert after.policies["payments"] is before.policies["payments"]
        assert set(changes(before, after)) == {(ResourceKind.POLICY, "orders"), (ResourceKind.ENDPOINTS, "payments")}

    def test_new_and_gone_services_are_changes_of_both_kinds(self) -> None:
        book = PolicyBook(ServicePolicy)
        before = build_snapshot({"old": ()}, book.policy)
        after = build_snapshot({"new": ()}, book.policy, before)
        assert set(changes(before, after)) == {(kind, name) for kind in ResourceKind for name in ("old", "new")}
        assert not list(changes(after, after))

    def test_resources_are_found_by_kind_and_name(self) -> None:
        snapshot = build_snapshot({"orders": ()}, PolicyBook(ServicePolicy).policy)
        assert snapshot.get(ResourceKind.POLICY, "orders") is snapshot.policies["orders"]
        assert snapshot.get(ResourceKind.ENDPOINTS, "orders") is snapshot.endpoints["orders"]
        assert snapshot.get(ResourceKind.ENDPOINTS, "payments") is None


class TestConsistency:
    @staticmethod
    def broken(policy: PolicyResource | None, members: EndpointsResource | None) -> Snapshot:
        return Snapshot(
            MappingProxyType({"orders": policy} if policy else {}),
            MappingProxyType({"orders": members} if members else {}),
        )

    def test_a_service_without_policy_is_refused(self) -> None:
        with pytest.raises(InconsistentSnapshotError, match="needs both"):
            check_consistency(self.broken(None, resource()))

    def test_a_resource_under_another_name_is_refused(self) -> None:
        good = build_snapshot({"payments": (), "orders": ()}, PolicyBook(ServicePolicy).policy)
        with pytest.raises(InconsistentSnapshotError, match="policy are named payments"):
            check_consistency(self.broken(good.policies["payments"], resource()))

    def test_a_policy_of_another_service_is_refused(self) -> None:
        policy, version = PolicyBook(ServicePolicy).policy("payments")
        with pytest.raises(InconsistentSnapshotError, match="that of payments"):
            check_consistency(self.broken(PolicyResource("orders", version, policy, 1), resource()))

    @pytest.mark.parametrize("ids", [("1", "1"), ("2", "1")])
    def test_endpoints_out_of_order_or_twice_are_refused(self, ids: tuple[str, ...]) -> None:
        policy = build_snapshot({"orders": ()}, PolicyBook(ServicePolicy).policy).policies["orders"]
        with pytest.raises(InconsistentSnapshotError, match="in order and unique"):
            check_consistency(self.broken(policy, EndpointsResource("orders", "v", endpoints(*ids), 1)))

    def test_what_was_published_before_is_not_checked_again(self) -> None:
        policy = build_snapshot({"orders": ()}, PolicyBook(ServicePolicy).policy).policies["orders"]
        odd = self.broken(policy, EndpointsResource("orders", "v", endpoints("1", "1"), 1))
        check_consistency(odd, previous=odd)

    def test_a_service_that_goes_leaves_nothing_to_check(self) -> None:
        check_consistency(EMPTY, previous=build_snapshot({"orders": ()}, PolicyBook(ServicePolicy).policy))


members = st.lists(st.integers(0, 30), unique=True).map(
    lambda numbers: tuple(Endpoint(f"endpoint-{number:02}", "127.0.0.1", 1000) for number in sorted(numbers))
)


class TestDeltas:
    def test_one_change_among_many_costs_one_endpoint(self) -> None:
        many = endpoints(*(f"{number:03}" for number in range(100)))
        base, target = resource(*many), resource(*many[1:], *endpoints("new"))
        delta = endpoints_delta(base, target)
        assert delta is not None
        assert (delta.name, delta.version, delta.base_version) == ("orders", target.version, base.version)
        assert [endpoint.id for endpoint in delta.upserts] == ["new"]
        assert delta.removed_ids == ("000",)
        assert delta.size < target.size / 20

    def test_a_delta_that_is_not_smaller_is_not_made(self) -> None:
        assert endpoints_delta(resource(*endpoints("1")), resource(*endpoints("2"))) is None
        assert endpoints_delta(resource(*endpoints("1", "2", "3")), resource()) is None

    @given(members, members, st.sets(st.integers(0, 30)))
    def test_a_delta_leads_from_base_to_target(
        self, old: tuple[Endpoint, ...], new: tuple[Endpoint, ...], moved: set[int]
    ) -> None:
        new = tuple(Endpoint(each.id, each.address, 2000) if int(each.id[-2:]) in moved else each for each in new)
        base, target = resource(*old), resource(*new)
        delta = endpoints_delta(base, target)
        if delta is None:
            return
        held = {endpoint.id: endpoint for endpoint in base.endpoints if endpoint.id not in delta.removed_ids}
        held |= {endpoint.id: endpoint for endpoint in delta.upserts}
        assert tuple(held[each] for each in sorted(held)) == target.endpoints
        assert delta.size < target.size

    def test_the_cache_makes_each_delta_once_and_forgets_it_with_its_target(self) -> None:
        cache = DeltaCache()
        many = endpoints(*(f"{number:03}" for number in range(20)))
        base, target = resource(*many), resource(*many[1:])
        assert cache(base, target) is cache(base, target) is not None
        assert cache(resource(), target) is cache(resource(), target)
        assert len(cache) == 1
        del target
        gc.collect()
        assert len(cache) == 0

    def test_a_resource_knows_its_endpoints(self) -> None:
        assert resource(*endpoints("1")).has("1")
        assert not resource(*endpoints("1")).has("2")
