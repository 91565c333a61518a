"""Processes that publish or handle events die at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
from shop.v1.events_pb2 import OrderPlaced

from tests.events.services import Services, until

HERE = Path(__file__).parent


@contextlib.asynccontextmanager
async def process(services: Services, script: str, user: str, when: str) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        str(HERE / script),
        str(services.broker.ports.amqp),
        services.vhost,
        str(services.broker.credentials(user)),
        str(services.directory),
        when,
        stdout=asyncio.subprocess.PIPE,
        cwd=HERE.parents[1],
        env={"PYTHONPATH": str(HERE.parents[1]), "MESH_INSECURE": "1", "HOME": str(services.directory)},
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()


def shipments(services: Services) -> list[int]:
    path = services.directory / "books.sqlite"
    if not path.exists():
        return []
    connection = sqlite3.connect(path)
    with contextlib.closing(connection), contextlib.suppress(sqlite3.OperationalError):
        return [number for (number,) in connection.execute("SELECT number FROM shipments ORDER BY rowid")]
    return []


async def test_what_was_committed_is_published_though_the_process_died_right_after(services: Services) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    async with process(services, "orders_process.py", "orders", "before") as died:
        assert await died.wait() == -signal.SIGKILL
    again = services.bus("orders")
    await again.start()
    await seen.count(1)
    assert seen.events[0].message.order_id == "1"
    assert await again.flush(20)


async def test_a_publisher_that_is_killed_loses_nothing_that_publish_returned_for(services: Services) -> None:
    _, seen = await services.subscribed("shipping", OrderPlaced)
    told: list[int] = []
    async with process(services, "orders_process.py", "orders", "never") as running:
        assert running.stdout is not None
        while len(told) < 300:
            told.append(int(await running.stdout.readline()))
        running.kill()
        told += map(int, (await running.stdout.read()).split())
    again = services.bus("orders")
    await again.start()
    assert await again.flush(20)
    await until(lambda: {event.message.quantity for event in seen.events} >= set(told))
    first = list(dict.fromkeys(event.message.quantity for event in seen.events))
    assert first == sorted(first)


async def test_an_event_whose_handler_died_before_acknowledging_is_delivered_again_and_takes_effect_once(
    services: Services,
) -> None:
    async with process(services, "shipping_process.py", "shipping", "handled") as died:
        orders = services.bus("orders")
        for number in range(2):
            await orders.publish(OrderPlaced(quantity=number), key="k")
        assert await died.wait() == -signal.SIGKILL
    assert shipments(services) == [0]
    async with process(services, "shipping_process.py", "shipping", "never"):
        await until(lambda: shipments(services) == [0, 1])
        assert await orders.flush(20)
    assert shipments(services) == [0, 1]


@pytest.mark.timeout(120)
async def test_poison_that_kills_processes_ends_as_a_dead_letter_and_the_innocent_get_through(
    services: Services,
) -> None:
    orders = services.bus("orders")
    for number in range(8):
        await orders.publish(OrderPlaced(quantity=number, sku="poison" if number == 3 else "beans"), key=str(number))
    deaths = 0

    def over(ended: asyncio.Task[int]) -> bool:
        return ended.done() or len(shipments(services)) == 8

    while True:
        async with process(services, "shipping_process.py", "shipping", "poison") as running:
            ended = asyncio.create_task(running.wait())
            await until(partial(over, ended))
            if not ended.done():
                ended.cancel()
                break
            deaths += 1
            assert ended.result() == -signal.SIGKILL
            assert deaths <= 8
            if deaths == 7:
                await orders.publish(OrderPlaced(quantity=8, sku="beans"), key="8")
    assert sorted(shipments(services)) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert deaths == 7
    letters = await services.dead("shipping")
    assert [letter.headers["cloudEvents:partitionkey"] for letter in letters] == ["3"]


async def test_a_service_that_gets_sigterm_finishes_its_handlers_and_takes_no_more(services: Services) -> None:
    orders = services.bus("orders")
    for number in range(40):  # so many that it is asked to stop long before it has handled all
        await orders.publish(OrderPlaced(quantity=number))
    async with process(services, "shipping_process.py", "shipping", "slow") as running:
        assert running.stdout is not None
        for _ in range(4):
            await running.stdout.readline()
        running.send_signal(signal.SIGTERM)
        assert await running.wait() == 0
        begun = 4 + (await running.stdout.read()).count(b"begun")
    assert len(shipments(services)) == begun < 40
    await services.has("shipping.shipping", 40 - begun)
