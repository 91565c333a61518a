"""The broker is down, killed, frozen, out of disk, or does not take an event: nothing that was published is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from shop.v1.events_pb2 import OrderPlaced

from mesh_client.core.events.state import RelayState
from mesh_client.events import Event, EventBus, consumer, inbox
from mesh_client.events import relay as relay_module
from tests.events.conftest import USERS, VHOSTS
from tests.events.services import Seen, Services, started, until
from tests.integration.rabbitmq import RabbitMQ

if TYPE_CHECKING:
    from mesh_client.events import OutboxState

EVENTS, KEYS = 10_000, 500
SETTLE = consumer.SETTLE
_numbers = itertools.count()


@pytest.fixture(scope="module")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """A broker for this module: with few virtual hosts it is back sooner. Each test leaves it running."""
    directory, settings = tmp_path_factory.mktemp("rabbitmq"), {"max_message_size": str(2 << 20)}
    with RabbitMQ(directory, USERS, vhosts=VHOSTS, settings=settings, outlives_tests=True) as broker:
        yield broker


@pytest.fixture
def new_queues_settle(no_wait_for_new_queues: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that kill the broker soon after."""
    monkeypatch.setattr(consumer, "SETTLE", SETTLE)


@pytest.fixture
def vhost() -> str:
    """A virtual host in which nothing is."""
    return VHOSTS[next(_numbers)]


class Books:
    """A consumer with an inbox: what took effect, in order by key, and how often events came."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA synchronous = OFF")
        self.connection.executescript(inbox.SCHEMA)
        self.effects: dict[str, list[int]] = defaultdict(list)
        self.count = 0
        self.duplicates = 0

    async def handle(self, event: Event[OrderPlaced]) -> None:
        if not inbox.first_time(self.connection, event):
            self.duplicates += 1
            return
        self.effects[event.key].append(event.message.quantity)
        self.count += 1

    def check(self) -> None:
        """Nothing is lost, nothing took effect twice, and each key is in order."""
        assert self.count == EVENTS
        assert all(numbers == list(range(EVENTS // KEYS)) for numbers in self.effects.values())
        assert len(self.effects) == KEYS


def outbox(bus: EventBus) -> OutboxState:
    state = bus.state().outbox
    assert state is not None
    return state


async def publish_all(bus: EventBus, batch: int = 250) -> None:
    """Each key's events one after the other, many keys at once."""
    for first in range(0, EVENTS, batch):
        events = ((number // KEYS, f"key {number % KEYS}") for number in range(first, first + batch))
        await asyncio.gather(*(bus.publish(OrderPlaced(quantity=count), key=key, timeout=20) for count, key in events))


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("new_queues_settle")
async def test_a_broker_that_is_killed_under_load_loses_nothing(services: Services, rabbitmq: RabbitMQ) -> None:
    """kill -9 while 10,000 events are published and handled."""
    books = Books(services.directory / "books.sqlite")
    bus = services.bus("shipping")
    bus.group(prefetch=500, concurrency=100)
    bus.subscribe(OrderPlaced)(books.handle)
    await started(bus)
    orders = services.bus("orders")
    publishing = asyncio.create_task(publish_all(orders))
    with contextlib.closing(books.connection):
        await until(lambda: orders.state().published.confirmed > EVENTS // 5)
        assert orders.state().published.confirmed < EVENTS
        assert books.count < EVENTS
        rabbitmq.kill()
        await rabbitmq.restart()
        await publishing
        assert await orders.flush(90)
        await until(lambda: books.count == EVENTS, "every event")
        books.check()
    published = orders.state().published
    assert published.confirmed == EVENTS
    assert books.duplicates <= published.sent - EVENTS + 2 * 500  # what was on its way, and what was not acknowledged


async def test_a_frozen_broker_holds_no_publisher_up(
    services: Services, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "CONFIRM_TIMEOUT", 1.0)
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = services.bus("orders")
    await orders.publish(OrderPlaced(quantity=0), key="k")
    await seen.count(1)
    with rabbitmq.paused():
        began = time.monotonic()
        for number in range(1, 50):
            await orders.publish(OrderPlaced(quantity=number), key="k", timeout=10)
        assert time.monotonic() - began < 20
        await until(lambda: not outbox(orders).connected)
        assert "does not answer" in outbox(orders).broker
    await until(lambda: len(set(seen.ids)) == 50)
    first = list(dict.fromkeys(event.message.quantity for event in seen.events))
    assert first == list(range(50))
    assert await orders.flush(20)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("new_queues_settle")
async def test_a_broker_that_comes_back_gets_what_waited_also_across_restarts_of_the_service(
    services: Services, rabbitmq: RabbitMQ
) -> None:
    bus, seen = services.bus("shipping"), Seen()
    bus.subscribe(OrderPlaced)(seen)
    await started(bus)
    rabbitmq.kill()
    orders = services.bus("orders", max_events=100)
    for number in range(100):
        await orders.publish(OrderPlaced(quantity=number), key="k")
    await until(lambda: "cannot be reached" in outbox(orders).broker)
    await until(lambda: outbox(orders).events == 100)
    assert (outbox(orders).relay, outbox(orders).connected) == (RelayState.DISCONNECTED, False)
    await orders.close()
    again = services.bus("orders", max_events=100)
    await again.start()
    assert outbox(again).events == 100
    assert outbox(again).oldest_age is not None
    await rabbitmq.restart()
    await until(lambda: len(set(seen.ids)) == 100)
    assert await again.flush(20)
    # A broker that has only just come back may confirm so late that what it has is sent again.
    assert list(dict.fromkeys(event.message.quantity for event in seen.events)) == list(range(100))


async def test_a_broker_that_is_short_of_disk_is_waited_for(
    services: Services, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "CONFIRM_TIMEOUT", 1.0)
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = services.bus("orders")
    await orders.publish(OrderPlaced())
    await seen.count(1)
    await asyncio.to_thread(rabbitmq.control, "set_disk_free_limit", "900GB")
    try:
        for _ in range(5):
            await orders.publish(OrderPlaced(), timeout=10)
        await until(lambda: "short of disk" in outbox(orders).broker)
    finally:
        await asyncio.to_thread(rabbitmq.control, "set_disk_free_limit", "50MB")
    await seen.count(6)
    assert await orders.flush(20)
    await until(lambda: outbox(orders).broker == "connected")


async def test_an_event_that_the_broker_never_takes_is_put_aside(services: Services) -> None:
    """Larger than its ``max_message_size``: it closes the channel over it, and so over all others on their way."""
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = services.bus("orders", max_event_bytes=4 << 20)
    await asyncio.gather(
        *(
            orders.publish(
                OrderPlaced(quantity=number, order_id="x" * (3 << 20 if number == 20 else 1)), key=f"{number}"
            )
            for number in range(40)
        )
    )
    await seen.count(39)
    assert await orders.flush(20)
    assert outbox(orders).refused == orders.state().published.refused == 1
    await orders.publish(OrderPlaced(quantity=40))
    await until(lambda: 40 in {event.message.quantity for event in seen.events})
    assert {event.message.quantity for event in seen.events} == set(range(41)) - {20}
