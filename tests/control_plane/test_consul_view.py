"""What is believed of Consul's catalog."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from control_plane.catalog import Catalog
from control_plane.events import EndpointDrained, Registration, ServiceObserved, ServiceVanished
from control_plane.sources.consul_answers import ServiceList
from control_plane.sources.consul_view import EMPTY_CATALOG, FEWER_RIGHTS, ConsulView, ViewEvent
from mesh_client.core.model import Endpoint, Health

ONE = Endpoint("1", "10.0.0.1", 80)
TWO = Endpoint("2", "10.0.0.2", 80)


def services(*names: str, complete: bool = True) -> ServiceList:
    return ServiceList(frozenset(names), (), empty=False, complete=complete)


EMPTY = ServiceList(frozenset(), (), empty=True, complete=False)


def view(hold: float = 90.0) -> ConsulView:
    """With service a, endpoints 1 and 2."""
    made = ConsulView(hold)
    made.services(services("a"), False, 0.0)
    made.endpoints("a", (ONE, TWO), False, 0.0)
    return made


def observed(*endpoints: Endpoint, service: str = "a") -> ServiceObserved:
    return ServiceObserved("consul", service, endpoints)


VANISHED = ServiceVanished("consul", "a")


def test_a_listed_service_is_watched_and_said_once_its_endpoints_are_known() -> None:
    made = ConsulView()
    assert made.services(services("a"), False, 0.0) == ([], None)
    assert made.watched == {"a"}
    assert made.is_listed("a")
    assert not made.is_listed("b")
    assert made.endpoints("a", (ONE,), False, 0.0) == [observed(ONE)]
    assert made.endpoints("a", (ONE,), False, 0.0) == []


def test_another_registration_of_the_same_endpoint_is_said() -> None:
    made = ConsulView()
    made.services(services("a"), False, 0.0)
    first, second = ({"1": Registration(text)} for text in ("7", "8"))
    assert made.endpoints("a", (ONE,), False, 0.0, first) == [ServiceObserved("consul", "a", (ONE,), first)]
    assert made.endpoints("a", (ONE,), False, 1.0, dict(first)) == []
    assert made.endpoints("a", (ONE,), False, 2.0, second) == [ServiceObserved("consul", "a", (ONE,), second)]


def test_a_service_without_endpoints_is_known_and_empty() -> None:
    made = ConsulView()
    made.services(services("a"), False, 0.0)
    assert made.endpoints("a", (), False, 0.0) == [observed()]


def test_removals_are_believed_at_once_while_nothing_restarted() -> None:
    made = view()
    assert made.endpoints("a", (ONE,), False, 1.0) == [observed(ONE)]
    assert made.services(services(), False, 2.0) == ([VANISHED], None)
    assert made.watched == frozenset()


def test_a_service_that_was_never_said_vanishes_in_silence() -> None:
    made = ConsulView()
    made.services(services("a"), False, 0.0)
    assert made.services(services(), False, 1.0) == ([], None)


def test_endpoints_of_a_service_that_is_gone_are_ignored() -> None:
    assert ConsulView().endpoints("a", (ONE,), False, 0.0) == []


def test_an_empty_catalog_is_never_believed() -> None:
    made = view()
    assert made.services(EMPTY, True, 1.0) == ([], EMPTY_CATALOG)
    assert ConsulView().services(EMPTY, False, 1.0) == ([], EMPTY_CATALOG)
    assert made.watched == {"a"}
    assert made.next_tick() is None


def test_rights_that_shrink_remove_nothing() -> None:
    made = view()
    assert made.services(services("b", complete=False), False, 1.0) == ([], FEWER_RIGHTS)
    assert made.watched == {"a"}


def test_a_token_for_some_services_is_believed_about_them() -> None:
    made = ConsulView()
    made.services(services("a", "b", complete=False), False, 0.0)
    made.endpoints("a", (ONE,), False, 0.0)
    assert made.services(services("b", complete=False), False, 1.0) == ([VANISHED], None)


def test_after_a_restart_missing_endpoints_stay_until_the_hold_ends() -> None:
    made = view(hold=90.0)
    assert made.endpoints("a", (ONE,), True, 10.0) == []
    assert made.next_tick() == 100.0
    assert made.tick(99.9) == []
    assert made.tick(100.0) == [observed(ONE)]
    assert made.next_tick() is None
    assert made.tick(101.0) == []


def test_after_a_restart_missing_services_stay_until_the_hold_ends() -> None:
    made = view(hold=90.0)
    assert made.services(services("b"), True, 10.0) == ([], None)
    assert made.watched == {"a", "b"}
    assert not made.is_listed("a")
    assert made.endpoints("a", (), True, 11.0) == []
    assert made.tick(101.0) == [VANISHED]
    assert made.watched == {"b"}


def test_additions_and_changes_are_believed_during_the_hold() -> None:
    made = view()
    sick = replace(ONE, health=Health.UNHEALTHY)
    three = Endpoint("3", "10.0.0.3", 80)
    assert made.endpoints("a", (sick, three), True, 10.0) == [observed(sick, TWO, three)]


def test_what_is_kept_keeps_its_registration() -> None:
    registrations = {"1": Registration("7"), "2": Registration("8")}
    made = view()
    made.endpoints("a", (ONE, TWO), False, 1.0, registrations)
    assert made.endpoints("a", (ONE,), True, 10.0, {"1": registrations["1"]}) == []
    newer = {"1": Registration("9")}
    both = {**registrations, **newer}
    assert made.endpoints("a", (ONE,), False, 11.0, newer) == [ServiceObserved("consul", "a", (ONE, TWO), both)]
    assert made.tick(100.0) == [ServiceObserved("consul", "a", (ONE,), newer)]


def test_an_endpoint_that_drained_and_deregistered_during_the_hold_is_not_published_again() -> None:
    made, catalog = view(), Catalog()
    registrations = {each: Registration(each, of_process=True) for each in ("1", "2")}

    def read(endpoints: tuple[Endpoint, ...], restarted: bool, now: float) -> None:
        listed = {endpoint.id: registrations[endpoint.id] for endpoint in endpoints}
        for event in made.endpoints("a", endpoints, restarted, now, listed):
            catalog.apply(event, now)

    read((ONE, TWO), False, 1.0)
    read((ONE, TWO), True, 2.0)
    catalog.apply(EndpointDrained("a", "1"), 3.0)
    read((replace(ONE, health=Health.UNHEALTHY), TWO), False, 4.0)
    read((ONE, TWO), False, 5.0)
    read((TWO,), False, 6.0)
    assert catalog.view(6.0).services["a"].published == (TWO,)


def test_what_comes_back_during_the_hold_is_not_missing() -> None:
    made = view()
    made.endpoints("a", (), True, 10.0)
    assert made.endpoints("a", (ONE, TWO), False, 11.0) == []
    assert made.tick(200.0) == []


def test_what_comes_back_at_the_same_address_under_another_id_takes_the_place_of_what_was_kept() -> None:
    made = view()
    again = replace(TWO, id="2-again")
    assert made.endpoints("a", (ONE, again), True, 10.0) == [observed(ONE, again)]


def test_a_leaving_endpoint_is_not_kept() -> None:
    made = view()
    made.endpoints("a", (ONE, replace(TWO, health=Health.DRAINING)), False, 5.0)
    assert made.endpoints("a", (ONE,), True, 10.0) == [observed(ONE)]


def test_a_removal_during_the_hold_waits_too() -> None:
    made = view()
    made.services(services("a"), True, 10.0)
    assert made.endpoints("a", (ONE,), False, 50.0) == []
    assert made.tick(100.0) == [observed(ONE)]


def test_a_restart_before_anything_was_known_holds_nothing() -> None:
    made = ConsulView()
    made.services(services("a"), True, 0.0)
    assert made.next_tick() is None


class Views(RuleBasedStateMachine):
    """Against a catalog that loses its state now and then: no endpoint goes within the hold of a loss, all do after."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.view = ConsulView(hold=90.0)
        self.catalog: dict[str, dict[str, Endpoint]] = {}
        self.said: dict[str, dict[str, Endpoint]] = {}
        self.lost: dict[tuple[str, str], float] = {}

    def take(self, events: list[ViewEvent]) -> None:
        for event in events:
            before = self.said.get(event.service, {})
            after: dict[str, Endpoint] = {}
            if isinstance(event, ServiceObserved):
                after = {endpoint.id: endpoint for endpoint in event.endpoints}
                self.said[event.service] = after
            else:
                del self.said[event.service]
            for endpoint_id in before.keys() - after.keys():
                # The loss was noticed at the earliest when it happened.
                assert self.now >= self.lost.pop((event.service, endpoint_id), self.now)

    def read(self, restarted: bool) -> None:
        complete = ServiceList(frozenset(self.catalog), (), empty=False, complete=True)
        events, problem = self.view.services(complete, restarted, self.now)
        assert problem is None
        self.take(events)
        for name in sorted(self.view.watched):
            endpoints = tuple(self.catalog.get(name, {}).values())
            self.take(self.view.endpoints(name, endpoints, False, self.now))

    @rule(service=st.sampled_from("ab"), endpoint_id=st.sampled_from("123"))
    def register(self, service: str, endpoint_id: str) -> None:
        endpoint = Endpoint(endpoint_id, f"10.0.0.{endpoint_id}", 80)
        self.catalog.setdefault(service, {})[endpoint_id] = endpoint
        self.lost.pop((service, endpoint_id), None)
        self.read(restarted=False)
        assert endpoint_id in self.said[service]

    @rule(service=st.sampled_from("ab"), endpoint_id=st.sampled_from("123"))
    def deregister(self, service: str, endpoint_id: str) -> None:
        endpoints = self.catalog.get(service, {})
        endpoints.pop(endpoint_id, None)
        if not endpoints:
            self.catalog.pop(service, None)
        self.read(restarted=False)

    @rule()
    def lose_everything(self) -> None:
        for service, endpoints in self.said.items():
            for endpoint_id in endpoints:
                self.lost[service, endpoint_id] = self.now + 90.0
        self.catalog = {}
        self.read(restarted=True)

    @rule(seconds=st.sampled_from([1.0, 40.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.view.tick(self.now))

    @invariant()
    def the_catalog_is_said_and_nothing_else_without_a_hold(self) -> None:
        for service, endpoints in self.catalog.items():
            assert self.said[service].items() >= endpoints.items()
        if self.view.next_tick() is None:
            assert self.said == self.catalog


TestViews = Views.TestCase
