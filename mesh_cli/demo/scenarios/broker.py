"""The broker dies under load, and what becomes of the events."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from google.protobuf.wrappers_pb2 import StringValue

from mesh_cli.demo.promises import Promise, at_most, exactly
from mesh_cli.demo.stage import Stage
from mesh_cli.demo.system import CUSTOMERS, System
from mesh_client.events import Event, EventBus
from mesh_client.tasks import end_tasks

_DRAINED_WITHIN = 30.0
_LOOK_EVERY = 0.1
_KEYS = 5
_RATE = 50
"""Events a second."""


@dataclass(frozen=True, slots=True)
class Tallied:
    """What the services' own books say of the orders that customers were told were placed."""

    missing: int
    """Orders of which shipping or notifications have not heard, or not all."""
    twice: int
    """Things that were done more than once."""
    duplicates: int
    """Events that came again, and had no effect."""


class Sequences:
    """Counts upwards for several keys while it is entered, by events of its own, and looks at what arrives."""

    def __init__(self, stage: Stage) -> None:
        self.published = 0
        self.disordered = 0
        self.duplicates = 0
        self._system = stage.system
        self._bus = _bus(stage)
        self._seen: dict[str, list[int]] = {}
        self._bus.subscribe(StringValue)(self._arrived)
        self._counting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._bus.start()
        async with asyncio.timeout(_DRAINED_WITHIN):
            while not all(group.connected for group in self._bus.state().groups):
                await asyncio.sleep(_LOOK_EVERY)
        self._counting = asyncio.create_task(self._count())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        await self._bus.close()

    async def stop(self) -> None:
        """Publishes no more."""
        await end_tasks(self._counting)

    @property
    def missing(self) -> int:
        """Events that have not arrived."""
        return self.published - sum(len(set(numbers)) for numbers in self._seen.values())

    async def _count(self) -> None:
        while True:
            key, number = f"key {self.published % _KEYS}", self.published // _KEYS
            self.published += 1
            await asyncio.shield(self._bus.publish(StringValue(value=str(number)), key=key))
            await asyncio.sleep(1 / _RATE)

    async def _arrived(self, event: Event[StringValue]) -> None:
        numbers, number = self._seen.setdefault(event.key, []), int(event.message.value)
        if number in numbers:
            self.duplicates += 1
        elif number != len(numbers):
            self.disordered += 1
            numbers.append(number)
        else:
            numbers.append(number)


class BrokerKilled:
    """``kill -9`` of RabbitMQ; a new one takes its place and its data later."""

    title = "Broker killed under load"

    async def play(self, stage: Stage) -> list[Promise]:
        """No order may fail, no event may be lost, and what happened to each order must be told in order."""
        system, customers, between = stage.system, stage.customers, stage.profile.orders_between
        if system.broker is None:
            await customers.pause()
            waiting = await asyncio.to_thread(_waiting, system.database("orders"))
            customers.go_on()
            placed, note = len(customers.orders), "RabbitMQ is not installed: events wait in the outbox of orders"
            return [exactly("events.kept", "orders whose event is not kept", max(0, placed - waiting), 0, "", note)]
        async with Sequences(stage) as sequences, customers.watched() as tally:
            await customers.finish(between // 2)
            stage.view.tell("kill -9 rabbitmq")
            await system.broker.kill()
            await customers.finish(between)
            stage.view.tell("start it again")
            await system.start_broker()
            await customers.finish(between // 2)
            await sequences.stop()
            await customers.pause()
            began = time.monotonic()
            result = await _books(stage)
            while result.missing + sequences.missing and time.monotonic() - began < _DRAINED_WITHIN:
                await asyncio.sleep(_LOOK_EVERY)
                result = await _books(stage)
            drained = math.inf if result.missing + sequences.missing else time.monotonic() - began
        customers.go_on()
        orders = f"of {len(customers.orders)} orders"
        return [
            exactly(
                "events.failed",
                "kill -9 of the broker: failed orders",
                tally.failed,
                0,
                f"of {tally.sent}",
                tally.explain(),
            ),
            exactly("events.lost", "orders of which shipping or customers did not hear", result.missing, 0, orders),
            exactly(
                "events.order",
                "events of the same key that came in the wrong order, or not at all",
                sequences.disordered + sequences.missing,
                0,
                f"of {sequences.published}",
                f"{_KEYS} keys, {sequences.duplicates} duplicates",
            ),
            exactly(
                "events.twice",
                "shipments and notifications that were made twice",
                result.twice,
                0,
                "",
                f"{result.duplicates} duplicates came, and had no effect",
            ),
            at_most("events.drained", "time until the backlog was gone", drained, _DRAINED_WITHIN, "s"),
        ]


def _bus(stage: Stage) -> EventBus:
    broker = stage.system.broker
    assert broker is not None  # noqa: S101 - the scenario is another one without
    return stage.mesh.events(
        broker=broker.url,
        credentials=broker.credentials(CUSTOMERS),
        roots=broker.roots,
        outbox=stage.system.database(CUSTOMERS),
    )


async def _books(stage: Stage) -> Tallied:
    return await asyncio.to_thread(_tally, stage.system, [order.order_id for order in stage.customers.orders])


def _waiting(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("SELECT events FROM mesh_outbox_size").fetchone()[0])


def _tally(system: System, placed: list[str]) -> Tallied:
    with contextlib.closing(sqlite3.connect(system.database("shipping"))) as connection:
        shipped = {row[0] for row in connection.execute("SELECT order_id FROM shipments")}
        duplicates = int(connection.execute("SELECT count(*) FROM duplicates").fetchone()[0])
    told: dict[str, list[str]] = {}
    with contextlib.closing(sqlite3.connect(system.database("notifications"))) as connection:
        for order, kind in connection.execute("SELECT order_id, type FROM notifications ORDER BY number"):
            told.setdefault(order, []).append(kind.rpartition(".")[2])
        duplicates += int(connection.execute("SELECT count(*) FROM duplicates").fetchone()[0])
    expected = ["OrderPlaced", "OrderShipped"]
    return Tallied(
        missing=sum(order not in shipped or set(told.get(order, ())) != set(expected) for order in placed),
        twice=sum(len(kinds) - len(set(kinds)) for kinds in told.values()),
        duplicates=duplicates,
    )
