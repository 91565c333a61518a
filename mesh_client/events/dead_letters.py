"""Dead letters of a group: looked at, sent back to the group, or deleted."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass

from aio_pika.abc import AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity

from mesh_client.core.events.errors import DeadReason
from mesh_client.core.events.topology import Group
from mesh_client.events.broker import CONNECT_TIMEOUT, Broker, explain
from mesh_client.events.delivery import ATTEMPT, BURIED, DETAIL, REASON, attempt_of, copy_of
from mesh_client.events.publisher import proven_user


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One event that nobody could handle.

    Attributes:
        id: of the event; of what is no event, the message's, which may be empty.
        type: full name of its message.
        source: as it says.
        publisher: the broker's user that published it; empty where that is not known.
        key: what it is ordered by.
        time: when it was published, as it says.
        reason: why it is here, as `DeadReason` has it.
        detail: the same in words.
        buried: when it came here, seconds since 1970; 0 where the broker moved it.
        attempts: how often a handler was called.
        headers: all of them, as text.
        body: the message.
    """

    id: str
    type: str
    source: str
    publisher: str
    key: str
    time: str
    reason: str
    detail: str
    buried: int
    attempts: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """A queue of a group: how many events wait in it, and how many consumers it has."""

    queue: str
    events: int
    consumers: int


class DeadLetters:
    """Asks a broker, as a service or as an operator.

    Args:
        broker: with the credentials of one of them.
        group: whose dead letters.
    """

    def __init__(self, broker: Broker, group: Group) -> None:
        self._broker = broker
        self._group = group

    async def letters(self, limit: int) -> list[DeadLetter]:
        """The oldest dead letters, which stay where they are.

        Raises:
            AMQPError, OSError, TimeoutError, ConfigError: the broker cannot be asked.
        """
        found = []
        async with self._all() as (messages, _):
            async for message in messages:
                found.append(_letter(message, self._group.service))
                if len(found) >= limit:
                    break
        return found

    async def replay(self, ids: Collection[str]) -> int:
        """Sends dead letters back to the group, to be handled as if for the first time; how many.

        Args:
            ids: which; none for all that are there now.

        Raises:
            AMQPError, OSError, TimeoutError, ConfigError: the broker cannot be asked. What was not sent stays.
        """
        count = 0
        fresh = dict.fromkeys((ATTEMPT, REASON, DETAIL, BURIED))
        async with self._all() as (messages, user), self._broker.connection("dead letters") as (connection, _):
            channel = await connection.channel(on_return_raises=True)
            exchange = await channel.get_exchange(self._group.exchange, ensure=False)
            async for message in messages:
                if _wanted(message, ids):
                    again = copy_of(message, self._group.service, user, fresh)
                    await exchange.publish(again, self._group.queue, timeout=CONNECT_TIMEOUT)
                    await message.ack()
                    count += 1
        return count

    async def purge(self, ids: Collection[str]) -> int:
        """Deletes dead letters; how many.

        Args:
            ids: which; none for all that are there now.

        Raises:
            AMQPError, OSError, TimeoutError, ConfigError: the broker cannot be asked.
        """
        count = 0
        async with self._all() as (messages, _):
            async for message in messages:
                if _wanted(message, ids):
                    await message.ack()
                    count += 1
        return count

    async def depths(self, delays: Collection[int]) -> list[QueueDepth]:
        """How full the group's queues are; those that are not there are left out.

        Args:
            delays: milliseconds of the retry queues.

        Raises:
            AMQPError, OSError, TimeoutError, ConfigError: the broker cannot be asked.
        """
        found = []
        group = self._group
        async with self._broker.connection("status") as (connection, _):
            for name in (group.queue, *map(group.retry, delays), group.dead):
                with contextlib.suppress(ChannelNotFoundEntity):
                    async with connection.channel() as channel:
                        queue = await channel.declare_queue(name, passive=True, timeout=CONNECT_TIMEOUT)
                        result = queue.declaration_result
                        found.append(QueueDepth(name, result.message_count or 0, result.consumer_count or 0))
        return found

    def explain(self, error: BaseException) -> str:
        """Why the broker could not be asked, in words that say what to do."""
        if isinstance(error, ChannelNotFoundEntity):
            return f"the broker knows no group {self._group.queue}: no instance of it has been started yet"
        return explain(error, self._broker.settings)

    @contextlib.asynccontextmanager
    async def _all(self) -> AsyncIterator[tuple[AsyncIterator[AbstractIncomingMessage], str]]:
        """Every dead letter of now, and as whom they are looked at. Those that are not acknowledged stay, in order."""
        async with self._broker.connection("dead letters") as (connection, credentials):
            channel = await connection.channel()
            queue = await channel.declare_queue(self._group.dead, passive=True, timeout=CONNECT_TIMEOUT)

            async def messages() -> AsyncIterator[AbstractIncomingMessage]:
                # Once at least, so that who may not read it is told.
                for _ in range(max(1, queue.declaration_result.message_count or 0)):
                    message = await queue.get(fail=False, timeout=CONNECT_TIMEOUT)
                    if message is None:
                        return
                    yield message

            yield messages(), credentials.user


def _wanted(message: AbstractIncomingMessage, ids: Collection[str]) -> bool:
    return not ids or _id(message) in ids


def _id(message: AbstractIncomingMessage) -> str:
    return _text(message, "id") or message.message_id or ""


def _text(message: AbstractIncomingMessage, attribute: str) -> str:
    value = message.headers.get(f"cloudEvents:{attribute}", message.headers.get(f"cloudEvents_{attribute}"))
    return value if isinstance(value, str) else ""


def _letter(message: AbstractIncomingMessage, service: str) -> DeadLetter:
    headers = message.headers
    reason, detail = headers.get(REASON), headers.get(DETAIL)
    if not isinstance(reason, str):
        reason, detail = DeadReason.DELIVERIES.value, "its handlers' processes died of it, or their connections"
    buried = headers.get(BURIED)
    return DeadLetter(
        _id(message),
        _text(message, "type"),
        _text(message, "source"),
        proven_user(message.user_id, headers, service) or "",
        _text(message, "partitionkey"),
        _text(message, "time"),
        reason,
        str(detail or ""),
        buried if isinstance(buried, int) else 0,
        attempt_of(message),
        {name: str(value) for name, value in sorted(headers.items())},
        message.body,
    )
