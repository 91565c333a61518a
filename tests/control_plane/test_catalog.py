"""The catalog: merging sources, drains, forgetting, the mass removal guard."""

from __future__ import annotations

import pytest

from control_plane.catalog import Catalog, CatalogSettings
from control_plane.events import (
    EndpointDrained,
    EndpointUndrained,
    Registration,
    ServiceObserved,
    ServiceVanished,
    SourceConnected,
    SourceLost,
)
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.model import Endpoint, Health

A = "a"
B = "b"


def endpoints(*ids: str, port: int = 1000, health: Health = Health.HEALTHY) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(id, "127.0.0.1", port, health=health) for id in ids)


def observed(*ids: str, source: str = A, service: str = "orders") -> ServiceObserved:
    return ServiceObserved(source, service, endpoints(*ids))


def published(catalog: Catalog, now: float, service: str = "orders") -> list[str]:
    return [endpoint.id for endpoint in catalog.view(now).services[service].published]


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(CatalogSettings(forget_after=100.0, guard_hold=50.0, guard_window=5.0))


class TestFolding:
    def test_endpoints_are_published_in_order_of_their_ids(self, catalog: Catalog) -> None:
        assert catalog.apply(ServiceObserved(A, "orders", endpoints("2", "1")), 0.0)
        assert published(catalog, 0.0) == ["1", "2"]

    def test_unhealthy_endpoints_are_published_and_draining_ones_are_not(self, catalog: Catalog) -> None:
        ill, leaving = endpoints("ill", health=Health.UNHEALTHY) + endpoints("leaving", health=Health.DRAINING)
        catalog.apply(ServiceObserved(A, "orders", (ill, leaving)), 0.0)
        view = catalog.view(0.0).services["orders"]
        assert view.published == (ill,)
        assert [record.endpoint for record in view.records] == [ill, leaving]

    def test_an_observation_that_says_nothing_new_changes_nothing(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        before = catalog.view(0.0).services["orders"]
        assert not catalog.apply(observed("1"), 1.0)
        assert catalog.view(1.0).services["orders"] is before

    def test_a_change_keeps_the_age_of_the_endpoints_that_it_does_not_touch(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 1.0)
        catalog.apply(observed("1", "2"), 3.0)
        assert [record.changed_at for record in catalog.view(3.0).services["orders"].records] == [1.0, 3.0]

    def test_services_that_do_not_change_are_the_same_objects_in_every_view(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", service="orders"), 0.0)
        catalog.apply(observed("1", service="payments"), 0.0)
        before = catalog.view(0.0).services
        catalog.apply(observed("1", "2", service="payments"), 1.0)
        after = catalog.view(1.0).services
        assert after["orders"] is before["orders"]
        assert after["payments"] is not before["payments"]

    def test_a_change_that_does_not_reach_what_is_published_keeps_the_published_tuple(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        before = catalog.view(0.0).services["orders"].published
        catalog.apply(ServiceObserved(A, "orders", endpoints("1") + endpoints("2", health=Health.DRAINING)), 1.0)
        assert catalog.view(1.0).services["orders"].published is before

    def test_two_sources_are_merged_and_the_first_by_name_has_a_shared_id(self, catalog: Catalog) -> None:
        catalog.apply(ServiceObserved(B, "orders", endpoints("1", "2", port=2000)), 0.0)
        catalog.apply(ServiceObserved(A, "orders", endpoints("2", "3", port=1000)), 0.0)
        view = catalog.view(0.0).services["orders"]
        assert [(each.id, each.port) for each in view.published] == [("1", 2000), ("2", 1000), ("3", 1000)]
        assert view.sources == (A, B)
        catalog.apply(ServiceVanished(A, "orders"), 1.0)
        assert published(catalog, 1.0) == ["1", "2"]

    def test_two_endpoints_of_one_id_are_refused_and_change_nothing(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        with pytest.raises(InvalidValueError, match="unique"):
            catalog.apply(observed("2", "2"), 1.0)
        assert published(catalog, 1.0) == ["1"]

    def test_a_bad_service_name_is_refused(self, catalog: Catalog) -> None:
        with pytest.raises(InvalidValueError, match="DNS label"):
            catalog.apply(observed("1", service="Not Good"), 0.0)
        assert not catalog.view(0.0).services

    def test_a_service_that_the_source_never_listed_may_vanish(self, catalog: Catalog) -> None:
        assert not catalog.apply(ServiceVanished(A, "orders"), 0.0)
        catalog.apply(observed("1"), 0.0)
        assert not catalog.apply(ServiceVanished(B, "orders"), 0.0)
        assert published(catalog, 0.0) == ["1"]


class TestSources:
    def test_a_lost_source_keeps_everything_it_said(self, catalog: Catalog) -> None:
        assert catalog.apply(SourceConnected(A), 0.0)
        catalog.apply(observed("1"), 0.0)
        assert catalog.apply(SourceLost(A, "no leader"), 5.0)
        view = catalog.view(9.0)
        assert published(catalog, 9.0) == ["1"]
        (source,) = view.sources
        assert (source.name, source.connected, source.detail, source.since) == (A, False, "no leader", 5.0)

    def test_a_further_loss_updates_the_reason_and_not_the_time(self, catalog: Catalog) -> None:
        catalog.apply(SourceLost(A, "refused"), 1.0)
        assert not catalog.apply(SourceLost(A, "refused"), 2.0)
        assert catalog.apply(SourceLost(A, "no leader"), 3.0)
        (source,) = catalog.view(3.0).sources
        assert (source.detail, source.since) == ("no leader", 1.0)


class TestDrains:
    def test_a_drained_endpoint_is_not_published_while_its_source_lists_it(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2"), 0.0)
        assert catalog.apply(EndpointDrained("orders", "1"), 1.0)
        catalog.apply(observed("1", "2", "3"), 2.0)
        view = catalog.view(2.0).services["orders"]
        assert [each.id for each in view.published] == ["2", "3"]
        assert {record.endpoint.id: record.endpoint.health for record in view.records}["1"] is Health.DRAINING

    def test_a_drain_is_idempotent(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        assert catalog.apply(EndpointDrained("orders", "1"), 1.0)
        assert not catalog.apply(EndpointDrained("orders", "1"), 2.0)

    @pytest.mark.parametrize("event", [EndpointDrained("orders", "2"), EndpointDrained("payments", "1")])
    def test_a_drain_of_an_unknown_endpoint_does_not_hit_a_later_one(
        self, catalog: Catalog, event: EndpointDrained
    ) -> None:
        catalog.apply(observed("1"), 0.0)
        assert not catalog.apply(event, 1.0)
        catalog.apply(observed("1", "2"), 2.0)
        assert published(catalog, 2.0) == ["1", "2"]

    def test_an_endpoint_that_was_gone_is_not_drained_when_it_comes_back(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2"), 0.0)
        catalog.apply(EndpointDrained("orders", "1"), 1.0)
        catalog.apply(observed("2"), 2.0)
        catalog.apply(observed("1", "2"), 3.0)
        assert published(catalog, 3.0) == ["1", "2"]

    def test_another_process_of_the_same_id_is_not_drained(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        catalog.apply(EndpointDrained("orders", "1"), 1.0)
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", port=2000)), 2.0)
        assert published(catalog, 2.0) == ["1"]

    def test_another_registration_of_the_same_id_and_address_is_not_drained(self, catalog: Catalog) -> None:
        first, second = ({"1": Registration(text)} for text in ("7", "8"))
        catalog.apply(ServiceObserved(A, "orders", endpoints("1"), first), 0.0)
        catalog.apply(EndpointDrained("orders", "1"), 1.0)
        assert not catalog.apply(ServiceObserved(A, "orders", endpoints("1"), dict(first)), 2.0)
        assert published(catalog, 2.0) == []
        assert catalog.apply(ServiceObserved(A, "orders", endpoints("1"), second), 3.0)
        assert published(catalog, 3.0) == ["1"]

    @pytest.mark.parametrize("before", [True, False], ids=["before the drain", "after it"])
    @pytest.mark.parametrize("away", [Health.UNHEALTHY, Health.DRAINING])
    def test_what_was_not_healthy_and_is_again_is_not_drained(
        self, catalog: Catalog, away: Health, before: bool
    ) -> None:
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", health=away if before else Health.HEALTHY)), 0.0)
        catalog.apply(EndpointDrained("orders", "1"), 1.0)
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", health=away)), 2.0)
        assert published(catalog, 2.0) == []
        catalog.apply(observed("1"), 3.0)
        assert published(catalog, 3.0) == ["1"]

    def test_a_drained_endpoint_that_turns_unhealthy_stays_drained(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        catalog.apply(EndpointDrained("orders", "1"), 1.0)
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", health=Health.UNHEALTHY)), 2.0)
        assert published(catalog, 2.0) == []

    def test_what_is_known_to_be_the_same_process_stays_drained_whatever_its_health(self, catalog: Catalog) -> None:
        first, second = ({"1": Registration(text, of_process=True)} for text in ("x", "y"))
        for now, health in enumerate((Health.HEALTHY, Health.UNHEALTHY, Health.DRAINING, Health.HEALTHY)):
            catalog.apply(ServiceObserved(A, "orders", endpoints("1", health=health), first), now)
            catalog.apply(EndpointDrained("orders", "1"), now)
            assert published(catalog, now) == []
        assert catalog.apply(ServiceObserved(A, "orders", endpoints("1"), second), 5.0)
        assert published(catalog, 5.0) == ["1"]

    def test_removals_after_drains_are_not_held(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        for each in ("1", "2", "3", "4"):
            catalog.apply(EndpointDrained("orders", each), 1.0)
        catalog.apply(observed(), 2.0)
        view = catalog.view(2.0)
        assert view.hold is None
        assert view.services["orders"].records == ()


class TestDrainsByOperators:
    DRAIN = EndpointDrained("orders", "1", "alice", 1000.0)
    UNDRAIN = EndpointUndrained("orders", "1")

    def test_one_is_not_published_until_it_is_taken_back(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2"), 0.0)
        assert catalog.apply(self.DRAIN, 1.0)
        assert not catalog.apply(self.DRAIN, 2.0)
        assert published(catalog, 2.0) == ["2"]
        first, second = catalog.view(2.0).services["orders"].records
        assert (first.drained_by, first.endpoint.health) == ("alice", Health.DRAINING)
        assert (second.drained_by, second.endpoint.health) == ("", Health.HEALTHY)
        assert catalog.apply(self.UNDRAIN, 3.0)
        assert not catalog.apply(self.UNDRAIN, 3.0)
        assert published(catalog, 3.0) == ["1", "2"]

    def test_what_asked_itself_to_leave_is_not_taken_back(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        catalog.apply(EndpointDrained("orders", "1"), 1.0)
        assert not catalog.apply(self.DRAIN, 2.0)
        assert not catalog.apply(self.UNDRAIN, 3.0)
        assert published(catalog, 3.0) == []

    def test_one_that_asks_itself_is_an_operators_no_more(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        catalog.apply(self.DRAIN, 1.0)
        assert catalog.apply(EndpointDrained("orders", "1"), 2.0)
        assert catalog.operator_drains() == []
        assert not catalog.apply(self.UNDRAIN, 3.0)

    def test_bad_health_does_not_end_it_but_another_process_does(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        catalog.apply(self.DRAIN, 1.0)
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", health=Health.UNHEALTHY)), 2.0)
        catalog.apply(observed("1"), 3.0)
        assert published(catalog, 3.0) == []
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", port=2000)), 4.0)
        assert published(catalog, 4.0) == ["1"]
        assert catalog.operator_drains() == []

    @pytest.mark.parametrize("event", [EndpointUndrained("payments", "1"), EndpointUndrained("orders", "9")])
    def test_there_is_nothing_to_take_back_of_what_is_unknown(self, catalog: Catalog, event: EndpointUndrained) -> None:
        catalog.apply(observed("1"), 0.0)
        assert not catalog.apply(event, 1.0)

    def test_it_outlives_a_restart_if_the_endpoint_is_what_it_was(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3"), 0.0)
        for each in ("1", "2", "3"):
            catalog.apply(EndpointDrained("orders", each, "alice", 1000.0), 1.0)
        drains = catalog.operator_drains()
        assert [(each.service, each.endpoint_id, each.operator, each.at) for each in drains] == [
            ("orders", each, "alice", 1000.0) for each in ("1", "2", "3")
        ]
        again = Catalog()
        again.restore_drains(drains)
        assert again.operator_drains() == drains
        (other,) = endpoints("2", port=2000)
        again.apply(ServiceObserved(A, "orders", (*endpoints("1"), other)), 0.0)
        assert published(again, 0.0) == ["2"]
        assert [each.endpoint_id for each in again.operator_drains()] == ["1", "3"]
        again.apply(observed("1", "3"), 1.0)
        assert published(again, 1.0) == []
        assert again.apply(self.UNDRAIN, 2.0)
        assert published(again, 2.0) == ["1"]


class TestForgetting:
    def test_a_vanished_service_stays_known_and_empty_until_it_is_forgotten(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        assert catalog.apply(ServiceVanished(A, "orders"), 10.0)
        view = catalog.view(10.0)
        assert view.services["orders"].published == ()
        assert view.services["orders"].sources == (A,)
        assert view.next_deadline == 110.0
        assert "orders" in catalog.view(109.0).services
        assert catalog.advance(110.0)
        assert not catalog.view(110.0).services

    def test_a_service_that_comes_back_is_not_forgotten(self, catalog: Catalog) -> None:
        catalog.apply(observed("1"), 0.0)
        catalog.apply(ServiceVanished(A, "orders"), 10.0)
        catalog.apply(observed("1"), 100.0)
        assert catalog.view(500.0).next_deadline is None
        assert published(catalog, 500.0) == ["1"]

    def test_an_empty_service_that_is_listed_is_never_forgotten(self, catalog: Catalog) -> None:
        assert catalog.apply(observed(), 0.0)
        assert published(catalog, 1e6) == []

    def test_without_memory_a_service_is_forgotten_at_once(self) -> None:
        catalog = Catalog(CatalogSettings(forget_after=0.0))
        catalog.apply(observed("1"), 0.0)
        catalog.apply(ServiceVanished(A, "orders"), 1.0)
        assert not catalog.view(1.0).services

    def test_a_forgotten_service_that_had_no_view_yet_is_gone_too(self) -> None:
        catalog = Catalog()
        catalog.apply(observed("1"), 0.0)
        catalog.apply(ServiceVanished(A, "orders"), 1.0)
        assert not catalog.view(1e6).services


class TestMassRemovalGuard:
    def test_the_loss_of_more_than_half_is_held(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed("1"), 10.0)
        view = catalog.view(10.0)
        assert [each.id for each in view.services["orders"].published] == ["1", "2", "3", "4"]
        assert [record.held for record in view.services["orders"].records] == [False, True, True, True]
        assert view.hold is not None
        assert (view.hold.endpoints, view.hold.services) == (3, ("orders",))
        assert (view.hold.since, view.hold.until, view.next_deadline) == (10.0, 60.0, 60.0)

    @pytest.mark.parametrize("left", [("1", "2"), ("1", "2", "3")])
    def test_the_loss_of_up_to_half_is_published(self, catalog: Catalog, left: tuple[str, ...]) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed(*left), 10.0)
        assert published(catalog, 10.0) == list(left)
        assert catalog.view(10.0).hold is None

    def test_fewer_than_four_are_not_guarded(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3"), 0.0)
        catalog.apply(observed(), 10.0)
        assert published(catalog, 10.0) == []

    def test_services_that_vanish_one_by_one_within_the_window_are_one_loss(self, catalog: Catalog) -> None:
        for name in ("s1", "s2", "s3", "s4", "s5"):
            catalog.apply(observed("1", "2", service=name), 0.0)
        for tenths, name in enumerate(("s1", "s2", "s3", "s4", "s5")):
            catalog.apply(ServiceVanished(A, name), 10.0 + tenths / 10)
        view = catalog.view(11.0)
        assert all(len(service.published) == 2 for service in view.services.values())
        assert view.hold is not None
        assert view.hold.endpoints == 10
        assert view.hold.services == ("s1", "s2", "s3", "s4", "s5")
        assert view.hold.since == pytest.approx(10.2)

    def test_losses_further_apart_than_the_window_are_not_added_up(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4", "5", "6"), 0.0)
        catalog.apply(observed("1", "2", "3", "4"), 10.0)
        catalog.apply(observed("1", "2"), 20.0)
        assert published(catalog, 20.0) == ["1", "2"]

    def test_without_a_window_each_event_counts_for_itself(self) -> None:
        catalog = Catalog(CatalogSettings(guard_window=0.0))
        catalog.apply(observed("1", "2", "3", "4", "5", "6"), 0.0)
        catalog.apply(observed("1", "2", "3", "4"), 10.0)
        catalog.apply(observed("1", "2"), 10.0)
        assert published(catalog, 10.0) == ["1", "2"]
        catalog.apply(observed("1", "2", "3", "4"), 11.0)
        catalog.apply(observed("1"), 12.0)
        assert published(catalog, 12.0) == ["1", "2", "3", "4"]

    def test_held_endpoints_are_released_when_the_hold_ends(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed(), 10.0)
        assert published(catalog, 59.9) == ["1", "2", "3", "4"]
        assert catalog.advance(60.0)
        assert published(catalog, 60.0) == []
        assert catalog.view(60.0).hold is None

    def test_a_confirmed_removal_is_published(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed(), 10.0)
        assert catalog.confirm_removals(11.0) == 4
        assert published(catalog, 11.0) == []
        assert catalog.confirm_removals(11.0) == 0
        assert catalog.next_deadline() is None

    def test_endpoints_that_come_back_end_the_hold(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed(), 10.0)
        catalog.apply(observed("1", "2"), 11.0)
        hold = catalog.view(11.0).hold
        assert hold is not None
        assert hold.endpoints == 2
        catalog.apply(observed("1", "2", "3", "4"), 12.0)
        assert catalog.view(12.0).hold is None
        assert published(catalog, 12.0) == ["1", "2", "3", "4"]

    def test_additions_and_changes_are_published_during_a_hold(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed("1"), 10.0)
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", health=Health.UNHEALTHY) + endpoints("5")), 11.0)
        view = catalog.view(11.0).services["orders"]
        assert [each.id for each in view.published] == ["1", "2", "3", "4", "5"]
        assert view.published[0].health is Health.UNHEALTHY

    def test_a_further_loss_joins_the_hold_and_does_not_prolong_it(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed("1"), 10.0)
        catalog.apply(observed(), 40.0)
        hold = catalog.view(40.0).hold
        assert hold is not None
        assert (hold.endpoints, hold.until) == (4, 60.0)

    def test_a_small_loss_during_a_hold_that_is_mostly_healed_is_published(self, catalog: Catalog) -> None:
        catalog.apply(observed(*"123456789"), 0.0)
        catalog.apply(observed("1"), 10.0)
        catalog.apply(observed(*"12345678"), 11.0)
        catalog.apply(observed(*"1234567"), 12.0)
        assert published(catalog, 12.0) == list("12345679")

    def test_what_went_on_purpose_just_before_does_not_make_a_small_loss_a_large_one(self, catalog: Catalog) -> None:
        catalog.apply(observed(*"123456"), 0.0)
        for each in "12":
            catalog.apply(EndpointDrained("orders", each), 1.0)
        leaving = endpoints("3", "4", health=Health.DRAINING)
        catalog.apply(ServiceObserved(A, "orders", leaving + endpoints("5", "6")), 2.0)
        catalog.apply(observed("5"), 3.0)
        assert published(catalog, 3.0) == ["5"]

    def test_what_was_confirmed_does_not_count_towards_the_next_hold(self, catalog: Catalog) -> None:
        catalog.apply(observed(*"1234"), 0.0)
        catalog.apply(observed("1"), 1.0)
        catalog.confirm_removals(2.0)
        catalog.apply(observed(), 3.0)
        assert published(catalog, 3.0) == []

    def test_one_instance_that_is_replaced_again_and_again_is_not_a_mass_removal(self, catalog: Catalog) -> None:
        for number in range(20):
            catalog.apply(observed(str(number)), number / 10)
            assert published(catalog, number / 10) == [str(number)]

    def test_replacing_every_endpoint_is_not_a_loss(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed("5", "6", "7", "8"), 10.0)
        assert published(catalog, 10.0) == ["5", "6", "7", "8"]

    def test_health_is_never_guarded(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(ServiceObserved(A, "orders", endpoints("1", "2", "3", "4", health=Health.DRAINING)), 1.0)
        assert published(catalog, 1.0) == []

    def test_a_held_endpoint_that_is_drained_leaves_at_once(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed(), 10.0)
        assert catalog.apply(EndpointDrained("orders", "1"), 11.0)
        assert published(catalog, 11.0) == ["2", "3", "4"]
        for each in ("2", "3", "4"):
            catalog.apply(EndpointDrained("orders", each), 12.0)
        assert catalog.view(12.0).hold is None

    def test_a_service_with_held_endpoints_is_not_forgotten(self) -> None:
        catalog = Catalog(CatalogSettings(forget_after=10.0, guard_hold=50.0))
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(ServiceVanished(A, "orders"), 1.0)
        assert catalog.next_deadline() == 51.0
        assert published(catalog, 50.0) == ["1", "2", "3", "4"]
        assert not catalog.view(51.0).services

    def test_a_hold_of_zero_turns_the_guard_off(self) -> None:
        catalog = Catalog(CatalogSettings(guard_hold=0.0))
        catalog.apply(observed("1", "2", "3", "4"), 0.0)
        catalog.apply(observed(), 1.0)
        assert published(catalog, 1.0) == []

    def test_losses_on_other_services_count_towards_the_same_limit(self, catalog: Catalog) -> None:
        catalog.apply(observed("1", "2", "3", "4", service="orders"), 0.0)
        catalog.apply(observed(*"0123456789", service="payments"), 0.0)
        catalog.apply(observed(service="orders"), 10.0)
        assert published(catalog, 10.0) == []
        assert catalog.view(10.0).hold is None


@pytest.mark.parametrize("name", ["forget_after", "guard_minimum", "guard_hold", "guard_window"])
def test_settings_outside_their_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidValueError, match=name):
        CatalogSettings(**{name: -1})
