"""What services publish arrives at their subscribers, in order, once in the normal case."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import defaultdict

import pytest
from mesh.v1 import event_pb2
from shop.v1.events_pb2 import OrderPlaced, OrderShipped

from mesh_client.core.errors import ConfigError, InvalidTransitionError, InvalidValueError
from mesh_client.events import (
    Event,
    EventTooLargeError,
    OutboxFullError,
    PublishTimeoutError,
    inbox,
)
from tests.events.services import Seen, Services, started, until


async def test_an_event_arrives_with_what_it_says_of_itself(services: Services) -> None:
    bus, seen = await services.subscribed("shipping", OrderPlaced)
    orders = services.bus("orders")
    id = await orders.publish(OrderPlaced(order_id="1", quantity=3), key="order-1")
    await seen.count(1)
    event: Event[OrderPlaced] = seen.events[0]
    assert event.message == OrderPlaced(order_id="1", quantity=3)
    assert (event.id, event.key, event.type, event.attempt) == (id, "order-1", "shop.v1.OrderPlaced", 1)
    assert (event.source, event.caller, event.group) == ("mesh:orders", None, "shipping")
    await until(lambda: bus.state().groups[0].counters.handled == 1)
    group = bus.state().groups[0]
    assert group.edges == {("orders", "shop.v1.OrderPlaced"): 1}
    assert group.lag is not None
    assert 0 <= group.lag < 30
    assert await orders.flush()
    state = orders.state()
    assert state.outbox is not None
    assert (state.outbox.events, state.published.confirmed, state.edges) == (0, 1, {"shop.v1.OrderPlaced": 1})


async def test_each_group_gets_each_event_of_its_types(services: Services) -> None:
    _, ships = await services.subscribed("shipping", OrderPlaced)
    _, tells = await services.subscribed("notifications", OrderPlaced, OrderShipped)
    bus = services.bus("orders")
    await bus.publish(OrderPlaced(order_id="1"))
    await bus.publish(OrderShipped(order_id="1"))
    await tells.count(2)
    await ships.count(1)
    assert {event.type for event in tells.events} == {"shop.v1.OrderPlaced", "shop.v1.OrderShipped"}
    assert [event.type for event in ships.events] == ["shop.v1.OrderPlaced"]


async def test_what_nobody_is_subscribed_to_waits_and_holds_nothing_up(services: Services) -> None:
    _, tells = await services.subscribed("notifications", OrderShipped)
    orders = services.bus("orders")
    for number in range(3):
        await orders.publish(OrderPlaced(order_id=str(number)), key="k")
    await orders.publish(OrderShipped(order_id="other"), key="other")
    await orders.publish(OrderShipped(order_id="same key"), key="k")
    await orders.publish(OrderPlaced(order_id="nobody must"), mandatory=False)
    await tells.count(1)
    await until(lambda: orders.state().published.confirmed == 2)
    state = orders.state().outbox
    assert state is not None
    assert state.held == 1
    # The other event of key "k" waits behind those that came back.
    assert [event.message.order_id for event in tells.events] == ["other"]
    _, ships = await services.subscribed("shipping", OrderPlaced)
    await ships.count(3)
    await tells.count(2)
    assert [event.message.order_id for event in ships.events] == ["0", "1", "2"]


async def test_events_of_a_key_are_handled_in_order_and_keys_side_by_side(services: Services) -> None:
    bus = services.bus("shipping")
    bus.group(concurrency=8)
    seen: dict[str, list[int]] = defaultdict(list)
    running: set[str] = set()
    most, full = 0, asyncio.Event()

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        nonlocal most
        assert event.key not in running
        running.add(event.key)
        most = max(most, len(running))
        if most == 8:
            full.set()
        await full.wait()  # however slowly they come
        await asyncio.sleep(0.001)
        running.remove(event.key)
        seen[event.key].append(event.message.quantity)

    await started(bus)
    orders = services.bus("orders")
    await asyncio.gather(
        *(orders.publish(OrderPlaced(quantity=number // 10), key=f"key {number % 10}") for number in range(300))
    )
    await until(lambda: sum(map(len, seen.values())) == 300)
    assert all(numbers == list(range(30)) for numbers in seen.values())
    assert most == 8


async def test_instances_of_an_unordered_group_share_the_work(services: Services) -> None:
    seen = [Seen(), Seen()]
    for each in seen:
        bus = services.bus("shipping", outbox=f"{id(each)}.sqlite")
        bus.group(ordered=False, prefetch=1, concurrency=1)
        bus.subscribe(OrderPlaced)(each)
        await started(bus)
    orders = services.bus("orders")
    await asyncio.gather(*(orders.publish(OrderPlaced(), key="k") for _ in range(100)))
    await until(lambda: sum(len(each.events) for each in seen) == 100)
    assert all(each.events for each in seen)


async def test_an_event_is_published_in_the_services_own_transaction(services: Services) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    orders = services.bus("orders")
    assert await orders.flush()  # makes the table
    connection = sqlite3.connect(services.directory / "orders.sqlite", isolation_level=None)
    try:
        connection.execute("CREATE TABLE orders (id TEXT PRIMARY KEY)")
        for order, commit in (("lost", False), ("kept", True)):
            event = orders.prepare(OrderPlaced(order_id=order), key=order)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO orders VALUES (?)", (order,))
            event.store(connection)
            connection.execute("COMMIT" if commit else "ROLLBACK")
        orders.stored()
        await seen.count(1)
        assert await orders.flush()
        assert [event.message.order_id for event in seen.events] == ["kept"]
        assert connection.execute("SELECT id FROM orders").fetchall() == [("kept",)]
    finally:
        connection.close()


async def test_the_inbox_has_a_handler_take_effect_once(services: Services) -> None:
    bus, seen = services.bus("shipping"), Seen()
    connection = sqlite3.connect(services.directory / "inbox.sqlite", isolation_level=None)
    connection.executescript(inbox.SCHEMA + "CREATE TABLE shipments (id TEXT);")
    results = []

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        results.append(inbox.first_time(connection, event))
        if results[-1]:
            connection.execute("INSERT INTO shipments VALUES (?)", (event.id,))
        connection.execute("COMMIT")
        await seen(event)

    await started(bus)
    orders = services.bus("orders")
    event = orders.prepare(OrderPlaced(order_id="1"))
    assert await orders.flush()
    try:
        with sqlite3.connect(services.directory / "orders.sqlite") as outbox:
            event.store(outbox)
            event.store(outbox)
        outbox.close()
        await seen.count(2)
        assert results == [True, False]
        assert connection.execute("SELECT count(*) FROM shipments").fetchone() == (1,)
        assert inbox.forget(connection, older_than=60.0) == 0
        assert inbox.forget(connection, older_than=-1.0) == 1
    finally:
        connection.close()


async def test_a_full_outbox_is_a_clear_error_and_makes_room_again(services: Services) -> None:
    orders = services.bus("orders", broker=False, max_events=3)
    for number in range(3):
        await orders.publish(OrderPlaced(), key=str(number))
    with pytest.raises(OutboxFullError, match=r"full: 3 of 3 events.*no broker is configured.*nothing was stored"):
        await orders.publish(OrderPlaced(), timeout=1.0)
    assert orders.state().published.refused_full == 1
    await orders.close()
    _, seen = await services.subscribed("shipping", OrderPlaced)
    again = services.bus("orders", max_events=3)
    await asyncio.gather(*(again.publish(OrderPlaced(), key=str(number), timeout=20) for number in range(20)))
    await seen.count(23)


async def test_the_outbox_is_bounded_in_bytes_too(services: Services) -> None:
    orders = services.bus("orders", broker=False, max_bytes=1_000)
    await orders.publish(OrderPlaced(order_id="x" * 600))
    with pytest.raises(OutboxFullError, match="of 1000 bytes"):
        await orders.publish(OrderPlaced(order_id="x" * 600), timeout=1.0)
    await orders.publish(OrderPlaced(order_id="x" * 100), timeout=20)


async def test_publishing_waits_for_a_locked_database_up_to_its_deadline(services: Services) -> None:
    orders = services.bus("orders", broker=False)
    assert await orders.flush()
    connection = sqlite3.connect(services.directory / "orders.sqlite", isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(PublishTimeoutError, match="somebody else holds its database"):
            await orders.publish(OrderPlaced(), timeout=0.2)
        waiting = asyncio.create_task(orders.publish(OrderPlaced(order_id="patient")))
        await asyncio.sleep(0.05)
        connection.execute("COMMIT")
        await waiting
    finally:
        connection.close()


async def test_an_outbox_that_is_locked_when_it_is_opened_holds_publishers_no_longer_than_they_say(
    services: Services,
) -> None:
    connection = sqlite3.connect(services.directory / "orders.sqlite", isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        orders = services.bus("orders", broker=False)
        began = time.monotonic()
        with pytest.raises(PublishTimeoutError, match=r"does not answer|cannot be used now"):
            await orders.publish(OrderPlaced(), timeout=0.2)
        assert time.monotonic() - began < 2.5, "SQLite itself waits for 5 s"
        waiting = asyncio.create_task(orders.publish(OrderPlaced(order_id="patient"), timeout=30.0))
        await asyncio.sleep(0.05)
        connection.execute("COMMIT")
        await waiting
    finally:
        connection.close()


async def test_a_full_outbox_that_is_locked_too_is_told_in_time(services: Services) -> None:
    orders = services.bus("orders", broker=False, max_events=1)
    await orders.publish(OrderPlaced())
    connection = sqlite3.connect(services.directory / "orders.sqlite", isolation_level=None)
    try:
        publishing = asyncio.create_task(orders.publish(OrderPlaced(), timeout=1.0))
        await asyncio.sleep(0.3)
        connection.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises((OutboxFullError, PublishTimeoutError)):
            await publishing
        assert time.monotonic() - began < 3.0, "SQLite itself waits for 5 s"
    finally:
        connection.close()


async def test_what_kept_an_outbox_from_being_opened_may_be_mended(services: Services) -> None:
    orders = services.bus("orders", broker=False, outbox="later/orders.sqlite")
    with pytest.raises(ConfigError, match="cannot be used"):
        await orders.publish(OrderPlaced())
    (services.directory / "later").mkdir()
    await orders.publish(OrderPlaced())
    await until(lambda: (outbox := orders.state().outbox) is not None and outbox.events == 1)


async def test_a_bus_is_closed_while_its_outbox_cannot_be_opened(services: Services) -> None:
    connection = sqlite3.connect(services.directory / "orders.sqlite", isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        orders = services.bus("orders")
        starting = asyncio.create_task(orders.start())
        await until(lambda: orders._opening is not None)
        async with asyncio.timeout(30.0):
            await orders.close()
        await asyncio.wait({starting})
        assert starting.cancelled() or isinstance(starting.exception(), ConfigError | InvalidTransitionError)
    finally:
        connection.close()


async def test_what_cannot_be_published_is_refused_at_once(services: Services) -> None:
    orders = services.bus("orders", broker=False, max_event_bytes=100)
    with pytest.raises(EventTooLargeError, match="publish a reference"):
        await orders.publish(OrderPlaced(order_id="x" * 200))
    with pytest.raises(InvalidValueError, match="key"):
        await orders.publish(OrderPlaced(), key="k" * 300)
    assert orders.state().outbox is None


async def test_subscriptions_are_checked(services: Services) -> None:
    bus = services.bus("shipping", broker=False)
    bus.subscribe(OrderPlaced)(Seen())
    with pytest.raises(ConfigError, match="has a handler"):
        bus.subscribe(OrderPlaced)(Seen())
    bus.subscribe(OrderPlaced, group="audit")(Seen())
    for wrong in ({"concurrency": 0}, {"prefetch": 70_000}, {"delivery_limit": 0}, {"max_bytes": 0}, {"unknown": 1}):
        with pytest.raises(ConfigError):
            bus.group(**wrong)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigError, match="timeout"):
        bus.subscribe(OrderShipped, timeout=0)
    with pytest.raises(InvalidValueError, match="group"):
        bus.subscribe(OrderShipped, group="Upper")
    await bus.start()
    await bus.start()
    assert {group.broker for group in bus.state().groups} == {"no broker is configured (MESH_BROKER)"}
    with pytest.raises(ConfigError, match="has been started"):
        bus.subscribe(event_pb2.EndpointUp)
    await bus.close()
    await bus.close()
    with pytest.raises(InvalidTransitionError, match="closed"):
        await bus.publish(OrderPlaced())


async def test_two_processes_of_a_service_share_an_outbox_and_one_of_them_relays(services: Services) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    first, second = services.bus("orders"), services.bus("orders")
    for number in range(20):
        await (first, second)[number % 2].publish(OrderPlaced(quantity=number), key="k")
    await seen.count(20)
    assert [event.message.quantity for event in seen.events] == list(range(20))
    assert await first.flush()
    relaying = [bus for bus in (first, second) if bus.state().outbox.relaying]  # type: ignore[union-attr]  # both are open
    assert len(relaying) == 1
    other = second if relaying[0] is first else first
    assert other.state().outbox.broker == "another process sends what is in the outbox"  # type: ignore[union-attr]  # likewise
    await relaying[0].close()
    await other.publish(OrderPlaced(quantity=20), key="k")
    await seen.count(21)
