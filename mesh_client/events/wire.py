"""Many messages in one write, each with a confirmation of its own.

aiormq publishes one message at a time: a lock, a task that waits and a system call for each, which is most of what a
message costs here and at the broker. This does the same for many at once, by what aiormq's channel is made of; nobody
else may publish on that channel. The tests hold it to the versions that pyproject.toml allows.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import aiormq
from aiormq.abc import ChannelFrame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from mesh_client.core.events.envelope import CONTENT_TYPE
from mesh_client.core.events.topology import routing_key
from mesh_client.events.prepared import PreparedEvent

_FRAME_OVERHEAD = 8
PERSISTENT = 2
"""Delivery mode of what brokers keep over restarts."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message and where it goes. Its properties have a ``message_id`` that no other message on its way has."""

    routing_key: str
    properties: aiormq.spec.Basic.Properties
    body: bytes
    mandatory: bool


class Wire:
    """Publishes to one exchange.

    Args:
        channel: with publisher confirms, and returns that raise; for this alone.
        exchange: where to.
    """

    def __init__(self, channel: aiormq.abc.AbstractChannel, exchange: str) -> None:
        self._channel = cast("aiormq.Channel", channel)
        self._exchange = exchange
        self._largest = channel.connection.connection_tune.frame_max - _FRAME_OVERHEAD

    async def publish(self, messages: Sequence[Outgoing]) -> list[asyncio.Future[Any]]:
        """Writes messages in this order. Each future is done when the broker has confirmed its message.

        It raises `aiormq.exceptions.PublishError` for a message that nobody gets, `DeliveryError` for one that the
        broker could not take, and what closed the channel when that happens before.

        Raises:
            aiormq.exceptions.ChannelInvalidStateError: the channel is closed.
        """
        channel = self._channel
        if channel.is_closed:
            raise aiormq.exceptions.ChannelInvalidStateError(f"{channel!r} is closed")
        confirmations: list[asyncio.Future[Any]] = []
        frames: list[Any] = []
        for message in messages:
            publish = aiormq.spec.Basic.Publish(
                exchange=self._exchange, routing_key=message.routing_key, mandatory=message.mandatory
            )
            frames += (publish, ContentHeader(properties=message.properties, body_size=len(message.body)))
            body = message.body
            frames += (ContentBody(body[at : at + self._largest]) for at in range(0, len(body), self._largest))
            confirmation = channel.create_future()
            channel.delivery_tag += 1
            channel.confirmations[channel.delivery_tag] = confirmation
            channel.message_id_delivery_tag[str(message.properties.message_id)] = channel.delivery_tag
            confirmations.append(confirmation)
        written = ChannelFrame.marshall(frames=frames, channel_number=channel.number)
        await channel.write_queue.put(written)
        return confirmations

    def forget(self, message_id: str) -> None:
        """The message's future is done."""
        self._channel.message_id_delivery_tag.pop(message_id, None)


def outgoing(event: PreparedEvent, user: str, publisher: str) -> Outgoing:
    """An event as a message.

    Args:
        event: from the outbox.
        user: of the connection, whom the broker lets others be told of.
        publisher: as routing keys begin.
    """
    envelope = event.envelope
    headers: dict[str, Any] = {**event.headers, **envelope.headers()}
    properties = aiormq.spec.Basic.Properties(
        content_type=CONTENT_TYPE,
        headers=headers,
        delivery_mode=PERSISTENT,
        message_id=envelope.id,
        timestamp=dt.datetime.fromtimestamp(envelope.time, dt.UTC),
        message_type=envelope.type,
        user_id=user,
        app_id=publisher,
    )
    return Outgoing(routing_key(publisher, envelope.type), properties, event.body, event.mandatory)
