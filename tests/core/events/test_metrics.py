"""What a bus knows of events, as metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mesh_client.core.events.metrics import EVENT_FAMILIES, add_events
from mesh_client.core.events.state import (
    EventsState,
    GroupCounters,
    GroupState,
    OutboxState,
    PublishCounters,
    RelayState,
)
from mesh_client.core.metric import MetricSet
from mesh_client.core.tally import Tally

OUTBOX = OutboxState("orders.sqlite", 7, 700, 2.5, 1, 2, 100, 1_000, True, "connected", True, RelayState.CONNECTED)


def collected(*states: EventsState) -> dict[tuple[str, ...], Any]:
    metrics = MetricSet(EVENT_FAMILIES)
    for state in states:
        add_events(metrics, state)
    return {
        (family.name.removeprefix("grpc_mesh_"), *labels): value
        for family, of in metrics
        for labels, value in of.items()
    }


def publisher(outbox: OutboxState | None = OUTBOX) -> EventsState:
    counters = PublishCounters(stored=5, refused_full=1, sent=9, confirmed=4, returned=2, rejected=3, refused=1)
    return EventsState("orders", outbox, counters, {"shop.v1.OrderPlaced": 5}, ())


def test_an_outbox_and_what_is_published() -> None:
    found = collected(publisher())
    assert {name: found[f"outbox_{name}", "orders"] for name in ("events", "bytes", "max_events")} == {
        "events": 7,
        "bytes": 700,
        "max_events": 100,
    }
    assert found["outbox_oldest_event_age_seconds", "orders"] == 2.5
    assert (found["outbox_held_events", "orders"], found["outbox_refused_events", "orders"]) == (1, 2)
    states = {state.value: found["outbox_relay_state", "orders", state.value] for state in RelayState}
    assert states == {"connected": 1, "disconnected": 0, "standby": 0, "no_broker": 0}
    assert found["events_published_total", "orders", "shop.v1.OrderPlaced"] == 5
    assert found["events_outbox_full_total", "orders"] == 1
    assert found["events_confirmed_total", "orders"] == 4
    not_taken = {why: found["events_not_taken_total", "orders", why] for why in ("unroutable", "rejected", "refused")}
    assert not_taken == {"unroutable": 2, "rejected": 3, "refused": 1}


def test_two_clients_of_a_process_that_share_an_outbox_count_what_is_in_it_once() -> None:
    empty = replace(OUTBOX, events=6, oldest_age=None, relay=RelayState.STANDBY)
    found = collected(publisher(), publisher(empty))
    assert found["outbox_events", "orders"] == 7
    assert found["outbox_oldest_event_age_seconds", "orders"] == 2.5
    assert found["outbox_relay_state", "orders", "standby"] == 1
    assert found["events_confirmed_total", "orders"] == 8


def test_a_bus_that_was_not_used_has_no_outbox() -> None:
    found = collected(publisher(None))
    assert not any(name[0].startswith("outbox_") for name in found)
    assert found["events_confirmed_total", "orders"] == 4


def test_a_group() -> None:
    handled = Tally()
    handled.succeeded(0.1)
    handled.failed("UNKNOWN", 0.3)
    counters = GroupCounters(delivered=9, redelivered=1, retried=2, deferred=3, dead={"attempts": 1})
    counters.lag.succeeded(0.5)
    edge = ("orders", "shop.v1.OrderPlaced")
    calls = {edge: handled, ("web", "x.Y"): Tally()}
    group = GroupState("shipping", "connected", True, False, 2, 4, 0.5, counters, calls)
    assert group.edges == {edge: 1}
    found = collected(EventsState("shipping", None, PublishCounters(), {}, (group,)))
    where = ("shipping", "shipping")
    totals = {
        name: found[f"events_{name}_total", *where] for name in ("delivered", "redelivered", "retried", "deferred")
    }
    assert totals == {"delivered": 9, "redelivered": 1, "retried": 2, "deferred": 3}
    codes = {key[-1]: value for key, value in found.items() if key[:-1] == ("events_handled_total", *where, *edge)}
    assert codes == {"OK": 1, "UNKNOWN": 1}
    durations = found["events_handler_duration_seconds", *where, "shop.v1.OrderPlaced"]
    assert (durations.buckets[-1], durations.seconds) == (2, 0.4)
    assert found["events_lag_seconds", *where].buckets[-1] == 1
    assert found["events_dead_lettered_total", *where, "attempts"] == 1
    assert (found["events_running_handlers", *where], found["events_waiting", *where]) == (2, 4)
    assert (found["events_consumer_connected", *where], found["events_consumer_paused", *where]) == (1, 0)
