"""Handlers that fail, hang or die, and events that nobody can handle: isolated, tried again, and kept for operators."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections import defaultdict
from typing import Any

import aio_pika
import pytest
from shop.v1.events_pb2 import OrderPlaced, OrderShipped
from shop.v1.orders_pb2 import Order

from mesh_client.core.errors import ConfigError
from mesh_client.core.events.envelope import CONTENT_TYPE, Envelope
from mesh_client.core.events.topology import EXCHANGE, Group
from mesh_client.events import Event, Reject, RetrySchedule, consumer, delivery
from mesh_client.events.delivery import DETAIL, REASON
from mesh_client.events.schema import schema_version
from tests.events.services import Seen, Services, started, until


async def test_a_failed_event_is_tried_again_after_growing_delays_and_then_kept(services: Services) -> None:
    bus = services.bus("shipping")
    bus.group(retries=RetrySchedule((0.1, 0.4)))
    attempts: list[tuple[int, float]] = []

    @bus.subscribe(OrderPlaced)
    async def fail(event: Event[OrderPlaced]) -> None:
        attempts.append((event.attempt, time.monotonic()))
        raise ValueError("no such address")

    await started(bus)
    orders = services.bus("orders")
    id = await orders.publish(OrderPlaced(order_id="1"), key="1")
    await until(lambda: bus.state().groups[0].counters.dead == {"attempts": 1})
    assert [attempt for attempt, _ in attempts] == [1, 2, 3]
    times = [at for _, at in attempts]
    assert times[1] - times[0] >= 0.09
    assert times[2] - times[1] >= 0.39
    [letter] = await services.dead("shipping")
    assert letter.message_id == id
    assert letter.headers[REASON] == "attempts"
    assert letter.headers[DETAIL] == "3 attempts, the last: ValueError: no such address"
    counters = bus.state().groups[0].counters
    assert (counters.failed, counters.retried, counters.handled) == (3, 2, 0)


async def test_events_of_a_key_stay_in_order_while_one_is_tried_again_and_others_go_on(services: Services) -> None:
    bus = services.bus("shipping")
    bus.group(retries=RetrySchedule((0.5, 1.5)))
    handled: dict[str, list[int]] = defaultdict(list)
    log: list[tuple[str, int]] = []

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        number = event.message.quantity
        if event.key == "sick" and number == 1 and event.attempt <= 2:
            raise OSError("not now")
        handled[event.key].append(number)
        log.append((event.key, number))

    await started(bus)
    orders = services.bus("orders")
    # All at once: those that are well must have come when the sick one is tried for the last time.
    await asyncio.gather(
        *(orders.publish(OrderPlaced(quantity=number), key=key) for number in range(6) for key in ("sick", "well"))
    )
    await until(lambda: sum(map(len, handled.values())) == 12)
    assert handled == {"sick": list(range(6)), "well": list(range(6))}
    assert log.index(("well", 5)) < log.index(("sick", 1))
    counters = bus.state().groups[0].counters
    assert counters.retried == 2
    assert counters.deferred >= 4


async def test_a_poison_event_holds_nobody_up(services: Services) -> None:
    bus = services.bus("shipping")
    bus.group(retries=RetrySchedule(()), concurrency=2)
    seen = Seen()

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        if event.message.sku == "poison":
            raise ZeroDivisionError
        await seen(event)

    await started(bus)
    orders = services.bus("orders")
    for number in range(30):
        await orders.publish(OrderPlaced(sku="poison" if number % 3 == 0 else "beans"), key=f"{number % 4}")
    await seen.count(20)
    await until(lambda: bus.state().groups[0].counters.dead == {"attempts": 10})
    assert len(await services.dead("shipping")) == 10


async def test_a_handler_that_hangs_is_ended_and_its_event_tried_again(services: Services) -> None:
    bus, seen = services.bus("shipping"), Seen()
    bus.group(retries=RetrySchedule((0.05,)))

    @bus.subscribe(OrderPlaced, timeout=0.2)
    async def hang(event: Event[OrderPlaced]) -> None:
        await seen(event)
        if event.attempt == 1:
            await asyncio.Event().wait()

    await started(bus)
    await services.bus("orders").publish(OrderPlaced())
    await seen.count(2)
    await until(lambda: bus.state().groups[0].counters.handled == 1)
    counters = bus.state().groups[0].counters
    assert (counters.timed_out, counters.failed, counters.retried) == (1, 1, 1)


async def test_a_handler_can_reject_an_event_at_once(services: Services) -> None:
    bus = services.bus("shipping")

    @bus.subscribe(OrderPlaced)
    async def reject(event: Event[OrderPlaced]) -> None:
        raise Reject("there is no such order")

    await started(bus)
    await services.bus("orders").publish(OrderPlaced())
    await until(lambda: bus.state().groups[0].counters.dead == {"rejected": 1})
    [letter] = await services.dead("shipping")
    assert letter.headers[DETAIL] == "there is no such order"


async def publish_raw(
    services: Services,
    body: bytes = b"",
    *,
    type: str = "shop.v1.OrderPlaced",
    source: str = "mesh:orders",
    **other: Any,
) -> None:
    """Publishes to the group's queue what no publisher of ours would."""
    headers: dict[str, Any] = {**Envelope("id-1", source, type, 0.0).headers()}
    headers.update(other.pop("headers", {}))
    properties = {"content_type": CONTENT_TYPE, "user_id": "orders", **other}
    connection = await services.connect("orders")
    async with connection:
        channel = await connection.channel(on_return_raises=True)
        exchange = await channel.get_exchange(EXCHANGE, ensure=False)
        message = aio_pika.Message(body, headers=headers, **properties)
        await exchange.publish(message, "orders.shop.v1.OrderPlaced")


@pytest.mark.parametrize(
    ("given", "reason", "detail"),
    [
        ({"headers": {"cloudEvents:id": ""}}, "not-an-event", "the header cloudEvents:id is missing"),
        ({"headers": {"cloudEvents:specversion": "2.0"}}, "not-an-event", "not 1.x"),
        ({"content_type": "application/json"}, "not-an-event", "'application/json', not application/protobuf"),
        ({"headers": {"cloudEvents:partitionkey": "k" * 300}}, "not-an-event", "too long"),
        ({"type": "shop.v2.OrderPlaced"}, "unknown-type", "no handler for shop.v2.OrderPlaced"),
        ({"body": b"\xff\xff\xff"}, "undecodable", "the body is no shop.v1.OrderPlaced"),
        ({"body": Order(sku="x", quantity=2, order_id="1", payment_id="p").SerializeToString()}, "", ""),
        ({"body": b"\x18\x05\x0a\x01x\x22\x03abc"}, "schema", "shop.v1.OrderPlaced.amount_cents has another type"),
        ({"body": b"x" * 2_000}, "too-large", "2000 bytes, at most 1000"),
        ({"source": "mesh:payments"}, "forged", "is of 'orders', and says it were of 'mesh:payments'"),
    ],
)
async def test_what_is_no_good_event_goes_to_the_dead_letters_with_the_reason(
    services: Services, given: dict[str, Any], reason: str, detail: str
) -> None:
    bus, seen = services.bus("shipping"), Seen()
    bus.group(max_bytes=1_000)
    bus.subscribe(OrderPlaced)(seen)
    await started(bus)
    await publish_raw(services, **given)
    await services.bus("orders").publish(OrderPlaced(order_id="good"))
    if not reason:  # Order has OrderPlaced's first three fields, and more that are not known
        await seen.count(2)
        return
    await seen.count(1)
    await until(lambda: bus.state().groups[0].counters.dead == {reason: 1})
    [letter] = await services.dead("shipping")
    assert detail in str(letter.headers[DETAIL])
    assert [event.message.order_id for event in seen.events] == ["good"]


def test_a_version_of_a_schema_changes_with_it() -> None:
    assert schema_version(OrderPlaced) != schema_version(OrderShipped)
    assert schema_version(Order) == schema_version(Order)


async def test_the_broker_buries_what_was_delivered_too_often(services: Services) -> None:
    """An event that kills the process that handles it, again and again; here its connection."""
    seen = Seen()
    for death in range(4):
        bus = services.bus("shipping")
        bus.group(delivery_limit=3, concurrency=4)
        begun = asyncio.Event()

        @bus.subscribe(OrderPlaced)
        async def die(event: Event[OrderPlaced], begun: asyncio.Event = begun) -> None:
            if event.message.sku == "poison":
                begun.set()
                await asyncio.Event().wait()
            await seen(event)

        await started(bus)
        if death == 0:
            orders = services.bus("orders")
            await orders.publish(OrderPlaced(sku="poison"))
            await orders.publish(OrderPlaced(sku="beans"))
            assert await orders.flush(20)
        await begun.wait()
        await seen.count(1)  # the other one, once, or it would be given back with the poison
        await bus.drain(grace=0)
        await bus.close()
    bus, after = services.bus("shipping"), Seen()
    bus.group(delivery_limit=3, concurrency=4)
    bus.subscribe(OrderPlaced)(after)
    await started(bus)
    await services.bus("orders").publish(OrderPlaced(sku="filter-paper"))
    await after.count(1)
    assert [event.message.sku for event in after.events] == ["filter-paper"]
    assert [event.message.sku for event in seen.events] == ["beans"]
    [letter] = await services.dead("shipping")
    deaths = letter.headers["x-death"]
    assert isinstance(deaths, list)
    assert deaths[0]["reason"] == "delivery_limit"  # type: ignore[index,call-overload]  # as RabbitMQ writes it
    assert deaths[0]["queue"] == Group("shipping", "shipping").queue  # type: ignore[index,call-overload]  # likewise


async def test_handlers_that_run_finish_when_a_service_stops_and_the_rest_is_left_for_others(
    services: Services,
) -> None:
    bus = services.bus("shipping")
    bus.group(concurrency=2)
    begun, done, release = [], [], asyncio.Event()

    @bus.subscribe(OrderPlaced)
    async def slow(event: Event[OrderPlaced]) -> None:
        begun.append(event.id)
        await release.wait()
        done.append(event.id)

    await started(bus)
    orders = services.bus("orders")
    for _ in range(6):
        await orders.publish(OrderPlaced())
    assert await orders.flush(20)
    await until(lambda: len(begun) == 2)
    draining = asyncio.create_task(bus.drain(10))
    await asyncio.sleep(0.05)
    release.set()
    await draining
    assert len(begun) == len(done) == 2
    bus2, seen = services.bus("shipping", outbox="other.sqlite"), Seen()
    bus2.subscribe(OrderPlaced)(seen)
    await started(bus2)
    await seen.count(4)
    await asyncio.sleep(0.1)
    assert not set(seen.ids) & set(done)


class Fatal(BaseException):
    """What no `except Exception` sees."""


async def test_a_handler_that_is_cancelled_from_within_has_failed_and_order_is_kept(services: Services) -> None:
    bus = services.bus("shipping")
    bus.group(retries=RetrySchedule((0.05,)), concurrency=1, prefetch=2)
    handled: list[tuple[int, int]] = []

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        number = event.message.quantity
        if event.attempt == 1 and number < 5:
            if number % 2:
                raise Fatal
            other = asyncio.ensure_future(asyncio.sleep(60.0))
            other.cancel()
            await other
        handled.append((number, event.attempt))

    await started(bus)
    orders = services.bus("orders")
    for number in range(6):  # more than the broker sends ahead
        await orders.publish(OrderPlaced(quantity=number), key="one")
    await until(lambda: len(handled) == 6)
    assert handled == [(number, 2 if number < 5 else 1) for number in range(6)]
    counters = bus.state().groups[0].counters
    assert (counters.failed, counters.dead) == (5, {})


async def test_why_an_event_is_rejected_may_be_anything(services: Services) -> None:
    bus = services.bus("shipping")
    bus.group(concurrency=1)

    @bus.subscribe(OrderPlaced)
    async def handle(event: Event[OrderPlaced]) -> None:
        raise Reject("of a file's name: \udcff")

    await started(bus)
    for _ in range(3):
        await services.bus("orders").publish(OrderPlaced())
    await until(lambda: bus.state().groups[0].counters.dead == {"rejected": 3})
    letters = await services.dead("shipping")
    assert {letter.headers[DETAIL] for letter in letters} == {"of a file's name: ?"}


async def test_an_error_of_the_consumer_itself_gives_the_event_back_and_those_behind_it_wait(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus, seen = services.bus("shipping"), Seen()
    bus.subscribe(OrderPlaced)(seen)
    await started(bus)
    real, broken = delivery.attempt_of, 0

    def defect(message: Any) -> int:
        nonlocal broken
        broken += 1
        if broken <= 2:
            raise ValueError("a defect")
        return real(message)

    monkeypatch.setattr(consumer, "attempt_of", defect)
    orders = services.bus("orders")
    for number in range(4):
        await orders.publish(OrderPlaced(quantity=number), key="one")
    await seen.count(4)
    assert [event.message.quantity for event in seen.events] == list(range(4))


@pytest.mark.parametrize("whole", [True, False])
async def test_a_group_whose_queue_is_deleted_makes_it_again(services: Services, whole: bool) -> None:
    bus, seen = services.bus("shipping"), Seen()
    bus.subscribe(OrderPlaced)(seen)
    await started(bus)
    orders = services.bus("orders")
    await orders.publish(OrderPlaced(order_id="before"))
    await seen.count(1)
    async with await services.connect("shipping") as connection:
        channel = await connection.channel()
        await channel.queue_delete("shipping.shipping")
        if whole:
            await channel.exchange_delete(Group("shipping", "shipping").exchange)
    await until(lambda: not bus.state().groups[0].connected, "that the group notices")
    await until(lambda: bus.state().groups[0].connected, "that the group is back")
    await orders.publish(OrderPlaced(order_id="after"))
    await seen.count(2)
    assert seen.events[1].message.order_id == "after"


async def test_only_coroutine_functions_are_handlers(services: Services) -> None:
    bus = services.bus("shipping")

    def plain(event: Event[OrderPlaced]) -> None:
        raise AssertionError

    with pytest.raises(ConfigError, match="plain is no coroutine function: write `async def`"):
        bus.subscribe(OrderPlaced)(plain)  # type: ignore[arg-type]  # as a program without types may
    bus.subscribe(OrderPlaced)(functools.partial(Seen().__call__))


async def test_a_handler_that_ignores_its_cancellation_holds_no_drain_up(
    services: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(consumer, "STUBBORN", 0.2)
    bus, go, begun = services.bus("shipping"), asyncio.Event(), asyncio.Event()

    @bus.subscribe(OrderPlaced)
    async def stubborn(event: Event[OrderPlaced]) -> None:
        begun.set()
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go.wait()

    await started(bus)
    await services.bus("orders").publish(OrderPlaced())
    await begun.wait()
    async with asyncio.timeout(30.0):
        await bus.drain(grace=0.05)
    assert "do not end when they are cancelled" in caplog.text
    go.set()
