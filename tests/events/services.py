"""Buses of services over a real broker, and what tests wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aio_pika
from google.protobuf.message import Message

from mesh_client.core.events.topology import Group
from mesh_client.events import Event, EventBus
from mesh_client.events.bus import Identified
from mesh_client.events.settings import BrokerSettings
from mesh_client.transport import PlaintextTransport
from tests.integration.rabbitmq import ADMIN, RabbitMQ

PATIENCE = 30.0


async def until(holds: Callable[[], object], what: str = "it", timeout: float = PATIENCE) -> None:
    """Returns when something holds."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"{what} does not hold after {timeout} s"
        await asyncio.sleep(0.01)


@dataclass
class Seen:
    """A handler that remembers what it was called with, in order."""

    events: list[Event[Any]] = field(default_factory=list)

    async def __call__(self, event: Event[Any]) -> None:
        self.events.append(event)

    async def count(self, number: int, timeout: float = PATIENCE) -> None:
        await until(lambda: len(self.events) >= number, f"{number} events ({len(self.events)} came)", timeout)

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.events]


@dataclass
class Services:
    """Makes buses; entered on the given stack."""

    broker: RabbitMQ
    vhost: str
    directory: Path
    stack: AsyncExitStack

    def settings(self, service: str) -> BrokerSettings:
        address = ("127.0.0.1", self.broker.ports.amqp, self.vhost)
        return BrokerSettings((address,), secure=False, credentials_file=self.broker.credentials(service))

    def bus(
        self,
        service: str,
        *,
        broker: bool | BrokerSettings = True,
        outbox: str = "",
        transport: Identified | None = None,
        **options: Any,
    ) -> EventBus:
        """A bus that has not been started, by default without identity."""
        settings = self.settings(service) if broker is True else (broker or None)
        path = self.directory / (outbox or f"{service}.sqlite")
        made = EventBus(service, transport or PlaintextTransport(), settings, path, **options)
        self.stack.push_async_callback(made.close)
        return made

    async def subscribed(self, service: str, *types: type[Message], **options: Any) -> tuple[EventBus, Seen]:
        """A started bus whose handler remembers the types, and its handler."""
        bus, seen = self.bus(service), Seen()
        if options:
            bus.group(**options)
        for each in types:
            bus.subscribe(each)(seen)
        await started(bus)
        return bus, seen

    async def depth(self, queue: str, user: str = "mesh:operator") -> int:
        """Messages in a queue that nobody has taken."""
        connection = await self.connect(user)
        async with connection:
            channel = await connection.channel()
            declared = await channel.declare_queue(queue, passive=True)
            return int(declared.declaration_result.message_count or 0)

    async def has(self, queue: str, messages: int) -> None:
        """Returns when a queue has so many messages that nobody has taken.

        What was taken and not acknowledged is back a moment after its connection has ended.
        """
        async with asyncio.timeout(PATIENCE):
            while await self.depth(queue) != messages:
                await asyncio.sleep(0.02)

    async def dead(self, service: str, group: str = "") -> list[aio_pika.abc.AbstractIncomingMessage]:
        """The dead letters of a group, which are taken out."""
        found = []
        connection = await self.connect("mesh:operator")
        async with connection:
            channel = await connection.channel()
            queue = await channel.get_queue(Group(service, group or service).dead)
            while (message := await queue.get(fail=False)) is not None:
                found.append(message)
                await message.ack()
        return found

    async def clean(self) -> None:
        """Deletes the queues that events go to."""
        connection = await self.connect(ADMIN)
        async with connection:
            channel = await connection.channel()
            for service in ("orders", "shipping", "notifications"):
                group = Group(service, service)
                for name in (group.queue, group.dead):
                    await channel.queue_delete(name)

    async def connect(self, user: str) -> aio_pika.abc.AbstractConnection:
        """A plain connection."""
        return await aio_pika.connect(
            host="127.0.0.1",
            port=self.broker.ports.amqp,
            login=user,
            password=self.broker.password(user),
            virtualhost=self.vhost,
        )


async def started(bus: EventBus) -> None:
    """Starts a bus; returns when its groups get events."""
    await bus.start()
    await until(lambda: all(group.connected for group in bus.state().groups), "the group's connection")
