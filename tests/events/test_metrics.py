"""Metrics of events, from processes that publish and handle them by a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from shop.v1.events_pb2 import OrderPlaced

import mesh_client
from mesh_client.core.events.state import RelayState
from mesh_client.events import Event, Reject, RetrySchedule
from mesh_client.mesh import Mesh
from mesh_client.metrics import MeshCollector
from tests.events.services import Services, started, until

TYPE = "shop.v1.OrderPlaced"


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def client(stack: AsyncExitStack, service: str) -> Mesh:
    """A client whose control plane is not there: events go without."""
    return await stack.enter_async_context(
        mesh_client.connect("127.0.0.1:1", service=service, insecure=True, cache_dir="", load_reports=0.0)
    )


def samples(mesh: Mesh) -> dict[tuple[str, ...], float]:
    """By name and values of labels, as they are written."""
    return {
        (sample.name.removeprefix("grpc_mesh_"), *sample.labels.values()): sample.value
        for family in MeshCollector([mesh], []).collect()
        for sample in family.samples
        if sample.name.startswith(("grpc_mesh_events_", "grpc_mesh_outbox_"))
    }


async def test_what_is_published_and_handled_can_be_scraped(services: Services, stack: AsyncExitStack) -> None:
    def broker(service: str) -> dict[str, Any]:
        return {
            "broker": services.broker.url_of(services.vhost),
            "credentials": services.broker.credentials(service),
            "outbox": services.directory / f"{service}.sqlite",
        }

    consumer, publisher = await client(stack, "shipping"), await client(stack, "orders")
    bus = consumer.events(**broker("shipping"))
    bus.group(retries=RetrySchedule((0.05,)))

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        if event.message.quantity == 1 and event.attempt == 1:
            raise ValueError("not now")
        if event.message.quantity == 2:
            raise Reject("of no use")

    await started(bus)
    orders = publisher.events(**broker("orders"))
    for number in range(3):
        await orders.publish(OrderPlaced(quantity=number), key=str(number))
    counters = bus.state().groups[0].counters
    await until(lambda: counters.handled == 2 and counters.dead == {"rejected": 1})
    assert await orders.flush()
    found, where = samples(consumer), ("shipping", "shipping")
    handled = {key[-1]: value for key, value in found.items() if key[0] == "events_handled_total"}
    assert handled == {"OK": 2, "UNKNOWN": 1, "INVALID_ARGUMENT": 1}
    assert found["events_handled_total", *where, "orders", TYPE, "OK"] == 2
    assert found["events_handler_duration_seconds_count", *where, TYPE] == 4
    assert found["events_lag_seconds_count", *where] == 3
    assert found["events_retried_total", *where] == 1
    assert found["events_dead_lettered_total", *where, "rejected"] == 1
    assert found["events_delivered_total", *where] == 4
    assert found["events_consumer_connected", *where] == 1
    found = samples(publisher)
    assert found["events_published_total", "orders", TYPE] == 3
    assert found["events_confirmed_total", "orders"] == 3
    assert (found["outbox_events", "orders"], found["outbox_oldest_event_age_seconds", "orders"]) == (0, 0)
    assert found["outbox_relay_state", "orders", "connected"] == 1


async def test_without_a_broker_the_metrics_say_so_and_how_much_waits(tmp_path: Path, stack: AsyncExitStack) -> None:
    mesh = await client(stack, "orders")
    bus = mesh.events(broker="", outbox=tmp_path / "orders.sqlite", max_events=10)
    for _ in range(3):
        await bus.publish(OrderPlaced())
    await until(lambda: samples(mesh)["outbox_events", "orders"] == 3)
    found = samples(mesh)
    assert found["outbox_oldest_event_age_seconds", "orders"] > 0
    assert found["outbox_max_events", "orders"] == 10
    assert {state for state in RelayState if found["outbox_relay_state", "orders", state.value]} == {
        RelayState.NO_BROKER
    }
    assert found["events_confirmed_total", "orders"] == 0
