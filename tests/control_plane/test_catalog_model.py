"""The catalog against a flat model of the same promises, under random events."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from control_plane.catalog import Catalog, CatalogSettings
from control_plane.events import EndpointDrained, EndpointUndrained, Registration, ServiceObserved, ServiceVanished
from mesh_client.core.model import Endpoint, Health

SERVICES = st.sampled_from(["orders", "payments"])
SOURCES = st.sampled_from(["consul", "embedded"])
IDS = [f"e{number}" for number in range(6)]
REGISTRATIONS = st.dictionaries(
    st.sampled_from(IDS), st.builds(Registration, st.sampled_from(["1", "2"]), st.booleans()), max_size=2
)
FORGET_AFTER, HOLD, WINDOW = 30.0, 20.0, 3.0


@st.composite
def listings(draw: st.DrawFn) -> tuple[Endpoint, ...]:
    return tuple(
        Endpoint(
            each,
            "127.0.0.1",
            draw(st.sampled_from([1000, 2000])),
            health=draw(st.sampled_from([Health.HEALTHY, Health.HEALTHY, Health.UNHEALTHY, Health.DRAINING])),
        )
        for each in draw(st.sets(st.sampled_from(IDS)))
    )


@dataclasses.dataclass
class Fate:
    """What the model knows of one endpoint."""

    listed: dict[str, Endpoint] = dataclasses.field(default_factory=dict)
    registrations: dict[str, Registration] = dataclasses.field(default_factory=dict)
    drained: tuple[str, Registration] | None = None
    """Target and registration of what asked to leave."""
    away: bool = False
    """It was not healthy since."""
    operator: str = ""
    """Who drained it, unless it asked itself."""
    lost: Endpoint | None = None
    lost_at: float = 0.0
    held: bool = False

    def endpoint(self) -> Endpoint | None:
        return self.listed[min(self.listed)] if self.listed else None

    def registration(self) -> Registration:
        return self.registrations.get(min(self.listed), Registration())

    def live(self) -> bool:
        endpoint = self.endpoint()
        return endpoint is not None and endpoint.health is not Health.DRAINING and self.drained is None


class CatalogModel(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.catalog = Catalog(CatalogSettings(forget_after=FORGET_AFTER, guard_hold=HOLD, guard_window=WINDOW))
        self.fates: dict[str, dict[str, Fate]] = {}
        self.listing: dict[str, set[str]] = {}
        self.vanished: dict[str, float] = {}
        self.hold_since: float | None = None
        self.history: list[tuple[float, int]] = []
        """Until when how many were published, without those that went on purpose since."""
        self.last = 0

    @rule(source=SOURCES, service=SERVICES, endpoints=listings(), registrations=REGISTRATIONS)
    def observe(
        self, source: str, service: str, endpoints: tuple[Endpoint, ...], registrations: dict[str, Registration]
    ) -> None:
        self.catalog.apply(ServiceObserved(source, service, endpoints, registrations), self.now)
        self.listing.setdefault(service, set()).add(source)
        self.vanished.pop(service, None)
        self.replace(source, service, {endpoint.id: endpoint for endpoint in endpoints}, registrations)

    @rule(source=SOURCES, service=SERVICES)
    def vanish(self, source: str, service: str) -> None:
        self.catalog.apply(ServiceVanished(source, service), self.now)
        if source in self.listing.get(service, ()):
            self.listing[service].discard(source)
            if not self.listing[service]:
                self.vanished[service] = self.now
            self.replace(source, service, {}, {})

    @rule(service=SERVICES, endpoint_id=st.sampled_from(IDS), operator=st.sampled_from(["", "", "alice"]))
    def drain(self, service: str, endpoint_id: str, operator: str) -> None:
        self.catalog.apply(EndpointDrained(service, endpoint_id, operator), self.now)
        fate = self.fates.get(service, {}).get(endpoint_id, Fate())
        self.leave(fate.live() or fate.held)
        if (endpoint := fate.endpoint()) is not None and fate.drained is None:
            fate.drained = (endpoint.target, fate.registration())
            fate.away = endpoint.health is not Health.HEALTHY
            fate.operator = operator
        elif not operator:
            fate.operator = ""
        fate.lost, fate.held = None, False
        self.end_hold_if_empty()

    @rule(service=SERVICES, endpoint_id=st.sampled_from(IDS))
    def undrain(self, service: str, endpoint_id: str) -> None:
        self.catalog.apply(EndpointUndrained(service, endpoint_id), self.now)
        fate = self.fates.get(service, {}).get(endpoint_id, Fate())
        if fate.drained is not None and fate.operator:
            fate.drained = None
            self.end_hold_if_empty()

    @rule()
    def what_operators_have_drained_is_known(self) -> None:
        drains = self.catalog.operator_drains()
        assert [(each.service, each.endpoint_id) for each in drains] == [
            (service, endpoint_id)
            for service in sorted(self.fates)
            for endpoint_id, fate in sorted(self.fates[service].items())
            if fate.drained is not None and fate.operator
        ]

    @rule()
    def confirm(self) -> None:
        held = sum(fate.held for fate in self.all_fates())
        assert self.catalog.confirm_removals(self.now) == held
        self.release()

    @rule(seconds=st.sampled_from([0.5, 2.0, 3.0, 15.0, 20.0, 31.0]))
    def wait(self, seconds: float) -> None:
        before = self.catalog.view(self.now)
        self.now += seconds
        if before.next_deadline is None or self.now < before.next_deadline:
            assert self.catalog.view(self.now) == before, "it changed before the deadline that it named"
        if self.hold_since is not None and self.now >= self.hold_since + HOLD:
            self.release()
        for fate in self.all_fates():
            if not fate.held and self.now >= fate.lost_at + WINDOW:
                fate.lost = None
        for service, at in list(self.vanished.items()):
            if self.now >= at + FORGET_AFTER and not any(fate.held for fate in self.fates[service].values()):
                del self.vanished[service], self.fates[service], self.listing[service]

    @invariant()
    def published_is_what_the_model_says(self) -> None:
        view = self.catalog.view(self.now)
        assert view.services.keys() == self.fates.keys()
        for service, fates in self.fates.items():
            expected = []
            for endpoint_id in sorted(fates):
                fate = fates[endpoint_id]
                endpoint = fate.endpoint() if fate.live() else fate.lost if fate.held else None
                if endpoint is not None:
                    expected.append(endpoint)
            assert list(view.services[service].published) == expected
        assert (view.hold is None) == (not any(fate.held for fate in self.all_fates()))
        if view.hold is not None:
            assert view.hold.since == self.hold_since

    def replace(
        self, source: str, service: str, endpoints: dict[str, Endpoint], registrations: dict[str, Registration]
    ) -> None:
        fates = self.fates.setdefault(service, {})
        loss = False
        leaving = 0
        for endpoint_id in IDS:
            fate = fates.setdefault(endpoint_id, Fate())
            was, was_live = fate.endpoint(), fate.live()
            fate.listed.pop(source, None)
            if endpoint_id in endpoints:
                fate.listed[source] = endpoints[endpoint_id]
                fate.registrations[source] = registrations.get(endpoint_id, Registration())
            endpoint = fate.endpoint()
            if endpoint is None:
                fate.drained = None
                if was_live:
                    fate.lost, fate.lost_at, fate.held, loss = was, self.now, False, True
            else:
                fate.lost, fate.held = None, False
                healthy = endpoint.health is Health.HEALTHY
                same = fate.drained == (endpoint.target, fate.registration())
                anew = healthy and fate.away and not fate.registration().of_process and not fate.operator
                if not same or anew:
                    fate.drained = None
                fate.away = fate.away or not healthy
                leaving += was_live and endpoint.health is Health.DRAINING
        self.leave(leaving)
        lost = [fate for fate in self.all_fates() if fate.lost is not None]
        live = sum(fate.live() for fate in self.all_fates())
        before = max(self.last, *(count for until, count in self.history if self.now < until + WINDOW), 0)
        if loss and before >= 4 and live < before / 2:
            for fate in lost:
                fate.held = True
            if self.hold_since is None:
                self.hold_since = self.now
        self.end_hold_if_empty()

    def published(self) -> int:
        return sum(fate.live() or fate.held for fate in self.all_fates())

    def all_fates(self) -> list[Fate]:
        return [fate for fates in self.fates.values() for fate in fates.values()]

    def leave(self, count: int) -> None:
        self.last -= count
        self.history = [(until, published - count) for until, published in self.history]

    def release(self) -> None:
        self.leave(sum(fate.held for fate in self.all_fates()))
        for fate in self.all_fates():
            if fate.held:
                fate.lost, fate.held = None, False
        self.hold_since = None

    def end_hold_if_empty(self) -> None:
        if not any(fate.held for fate in self.all_fates()):
            self.hold_since = None
        if self.published() != self.last:
            self.history.append((self.now, self.last))
            self.last = self.published()


TestCatalogModel = CatalogModel.TestCase
TestCatalogModel.settings = settings(stateful_step_count=40)
