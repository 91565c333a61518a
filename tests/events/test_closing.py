"""A bus that is closed ends, whatever it is about to do.

The moments are many, and which of them is hit is chance: with `asyncio.wait_for` in the relay one in eleven of those
that publish never ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from shop.v1.events_pb2 import OrderPlaced

from mesh_client.events import EventBus
from mesh_client.tasks import AGAIN
from tests.events.services import Seen, Services, until

ROUNDS = 60


@asynccontextmanager
async def closing(bus: EventBus) -> AsyncIterator[None]:
    """Starts the bus, and has it closed afterwards before any task is cancelled twice."""
    await bus.start()
    yield
    async with asyncio.timeout(AGAIN):
        await bus.close()


async def connected(bus: EventBus) -> None:
    await until(lambda: (state := bus.state().outbox) is not None and state.connected)


async def test_while_it_publishes(services: Services) -> None:
    loop, rng = asyncio.get_running_loop(), Random(1)
    for number in range(ROUNDS):
        bus = services.bus("orders", outbox=f"{number}.sqlite")
        async with closing(bus):
            await connected(bus)
            for _ in range(40):
                loop.call_later(rng.uniform(0.0, 0.01), bus.stored)


async def test_while_it_connects(services: Services) -> None:
    rng = Random(2)
    for number in range(ROUNDS):
        async with closing(services.bus("orders", outbox=f"{number}.sqlite")):
            await asyncio.sleep(rng.uniform(0.0, 0.02))


async def test_while_it_subscribes(services: Services) -> None:
    rng = Random(3)
    for number in range(ROUNDS):
        bus = services.bus("shipping", outbox=f"{number}.sqlite")
        bus.subscribe(OrderPlaced)(Seen())
        async with closing(bus):
            await asyncio.sleep(rng.uniform(0.0, 0.1))
