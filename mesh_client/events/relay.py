"""The outbox at work: publishers wait until their events are stored, one task sends what is stored to the broker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from typing import Any, TypeVar

from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelPreconditionFailed, DeliveryError, PublishError

from mesh_client.core.events.errors import OutboxFullError, PublishTimeoutError
from mesh_client.core.events.outbox import OutboxRelay
from mesh_client.core.events.state import OutboxState, PublishCounters, RelayState
from mesh_client.core.events.topology import EXCHANGE
from mesh_client.events.broker import FAILURES, Backoff, Broker, check_user, declare_exchange, explain, is_blocked
from mesh_client.events.outbox import LEASE, OutboxSize, OutboxStore, explain_full
from mesh_client.events.prepared import PreparedEvent
from mesh_client.events.rows import StoredEvent
from mesh_client.events.wire import Wire, outgoing
from mesh_client.events.writer import OutboxWriter
from mesh_client.tasks import end_tasks, obey_cancellation

logger = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW = 512
"""Events on their way to the broker at once."""
SETTLE_BATCH = 128
"""Confirmed events that leave the table together."""
READ_BATCH = 1024
CACHED_BYTES = 16 * 1024 * 1024
"""Bodies that are kept in memory after they were read; others are read again when they are sent."""
POLL = 0.05
"""Seconds until an event is seen that another process, or the service's own transaction, has stored."""
CONFIRM_TIMEOUT = 5.0
"""Seconds without confirmation after which the first connection counts as dead, unless the broker says that it is
short of disk or memory; the next ones have longer, until one confirms. RabbitMQ itself waits 10 s before it asks again
a queue whose leader it did not find, as happens when it starts: a new connection is sooner."""
MOST_PATIENCE = 60.0
CLOSED_LEASE = LEASE / 5
"""Seconds between looks at who relays."""

CLOSE_TIMEOUT = 5.0
"""Seconds for what is under way when the outbox is closed."""
LOOK = 0.5
"""Seconds between looks at how much waits, while nothing is sent from here."""

NO_BROKER = "no broker is configured (MESH_BROKER): events stay in the outbox"


class Outbox:
    """A service's outbox and the task that empties it.

    Args:
        store: the table.
        broker: where to send; None to keep everything.
        publisher: whose events they are, as routing keys begin.
        max_events: bound of the table.
        max_bytes: bound of the bodies in it.
        rng: of jitter.
    """

    def __init__(
        self,
        store: OutboxStore,
        broker: Broker | None,
        publisher: str,
        max_events: int,
        max_bytes: int,
        rng: Random,
    ) -> None:
        self.counters = PublishCounters()
        self._store = store
        self._broker = broker
        self._publisher = publisher
        self._bounds = max_events, max_bytes
        self._backoff = Backoff(rng)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mesh-outbox")
        self._writer = OutboxWriter(store, lambda events: self._in_thread(store.add, events))
        self._relay = OutboxRelay(WINDOW)
        self._cache: dict[int, StoredEvent] = {}
        self._cached_bytes = 0
        self._settled: list[int] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._leading = self._standby = False
        self._connected = False
        self._words = "not connected yet" if broker is not None else NO_BROKER
        self._size: OutboxSize | None = None
        self._alone = 0
        """Events that are sent one at a time, to find the one that the broker does not take."""
        self._oversize: tuple[StoredEvent, str] | None = None
        """The event over which the broker has closed the channel, and its words."""
        self._unroutable: Counter[str] = Counter()
        self._patience = CONFIRM_TIMEOUT
        self._sent_at: dict[int, float] = {}
        """When those on their way were sent, the first one first."""

    @property
    def name(self) -> str:
        """Where the table is, for people."""
        return self._store.name

    async def open(self) -> None:
        """Opens the table and begins to send.

        Raises:
            OutboxAwayError: the table cannot be used now; the same again may succeed.
            ConfigError: the table cannot be used.
        """
        await self._in_thread(self._store.open, *self._bounds)
        self._size = await self._in_thread(self._store.size)
        self._tasks = [asyncio.create_task(self._watch(), name="outbox size")]
        if self._broker is None:
            logger.warning("%s: %s", self._store.name, NO_BROKER)
        else:
            self._tasks.append(asyncio.create_task(self._run(self._broker), name="outbox"))

    async def close(self) -> None:
        """Ends, within seconds even if the database hangs. What is in the table stays there."""
        await end_tasks(*self._tasks)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._writer.close()
                settled, self._settled = self._settled, []
                with contextlib.suppress(Exception):
                    await self._in_thread(self._store.exchange, settled, 0, 0)
                with contextlib.suppress(Exception):
                    await self._in_thread(self._store.close)
        except TimeoutError:
            logger.warning("the outbox %s does not answer: it is left as it is", self._store.name)
            self._store.abort()
            await self._writer.abandon()
            self._thread.submit(self._store.close)
        self._thread.shutdown(wait=False)

    async def publish(self, event: PreparedEvent, timeout: float) -> None:
        """Returns once the event is stored.

        Raises:
            OutboxFullError: there was no room for it, up to the deadline.
            PublishTimeoutError: it could not be stored before the deadline.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        was_full = False
        while True:
            try:
                await self._writer.add(event, deadline - loop.time())
            except (OutboxFullError, PublishTimeoutError) as error:
                was_full = was_full or isinstance(error, OutboxFullError)
                if not was_full:
                    raise
                if loop.time() + POLL >= deadline:
                    self.counters.refused_full += 1
                    raise OutboxFullError(await self._explain_full()) from None
                self._room.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await self._room.wait()
            else:
                self.counters.stored += 1
                self._wake.set()
                return

    def wake(self) -> None:
        """Something was stored without `publish`: it is looked for at once."""
        self._wake.set()

    async def flush(self, timeout: float) -> bool:
        """Waits until the table is empty; False when it is not in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while (size := await self._in_thread(self._store.size)).events:
                    self._size = size
                    self._wake.set()
                    await asyncio.sleep(0.01)
                self._size = size
                return True
        return False

    async def look(self) -> None:
        """Has `state` show what is in the table now."""
        self._size = await self._in_thread(self._store.size)

    def state(self, now: float) -> OutboxState | None:
        """What is known; None before it was opened. ``now`` in seconds since 1970."""
        if (size := self._size) is None:
            return None
        age = None if size.oldest is None else max(0.0, now - size.oldest)
        return OutboxState(
            self._store.name,
            size.events,
            size.bytes,
            age,
            self._relay.held,
            size.refused,
            size.max_events,
            size.max_bytes,
            self._leading,
            self._words,
            self._connected,
            self._relay_state(),
        )

    def _relay_state(self) -> RelayState:
        if self._broker is None:
            return RelayState.NO_BROKER
        if self._connected:
            return RelayState.CONNECTED
        return RelayState.STANDBY if self._standby else RelayState.DISCONNECTED

    async def _watch(self) -> None:
        """Has `state` say how much waits also while nothing is sent from here."""
        while True:
            await asyncio.sleep(LOOK)
            if not self._connected:
                with contextlib.suppress(Exception):  # whoever publishes is told what is wrong with the table
                    await self.look()

    async def _explain_full(self) -> str:
        with contextlib.suppress(TimeoutError):  # then what was known a moment ago has to do
            async with asyncio.timeout(POLL):
                await self.look()
        return explain_full(self._store.name, self._size, self._words, self._relay.held, self._unroutable)

    # -- sending

    async def _run(self, broker: Broker) -> None:
        while True:
            try:
                if not await self._lead():
                    await asyncio.sleep(CLOSED_LEASE)
                    continue
                async with broker.connection("outbox") as (connection, credentials):
                    check_user(credentials, self._publisher)
                    await declare_exchange(connection)
                    channel = await connection.channel(on_return_raises=True)
                    await self._session(connection, channel, credentials.user)
            except FAILURES as error:
                self._lost(explain(error, broker.settings))
            except Exception:
                logger.exception("the outbox's relay failed; it begins again")
                self._lost("it failed; see the log")
            except BaseException:
                self._words, self._connected = "closed", False
                raise
            await asyncio.sleep(self._backoff.next())

    async def _lead(self) -> bool:
        self._leading = await self._in_thread(self._store.lead)
        self._standby = not self._leading
        if not self._leading:
            self._connected = False
            self._words = "another process sends what is in the outbox"
            self._relay = OutboxRelay(WINDOW)
            self._forget_bodies()
        return self._leading

    def _lost(self, words: str) -> None:
        if self._connected or words != self._words:
            logger.warning("events wait in the outbox %s: %s", self._store.name, words)
        self._words, self._connected = words, False
        self._relay.lost()

    async def _session(self, connection: AbstractConnection, channel: AbstractChannel, user: str) -> None:
        """Sends until the connection breaks, which it raises, or another process relays."""
        loop = asyncio.get_running_loop()
        wire = Wire(await channel.get_underlay_channel(), EXCHANGE)
        if not self._connected:
            logger.info("events of the outbox %s go to the broker", self._store.name)
        self._words, self._connected = "connected", True
        broken: asyncio.Future[None] = loop.create_future()

        def closed(_: object, error: BaseException | None) -> None:
            break_off(broken, error if isinstance(error, Exception) else ConnectionError("the connection was closed"))

        channel.close_callbacks.add(closed)
        connection.close_callbacks.add(closed)
        self._sent_at.clear()
        led = loop.time()
        force = True
        try:
            while not broken.done():
                obey_cancellation()  # aiormq may have lost one
                self._wake.clear()
                if loop.time() - led > CLOSED_LEASE:
                    led = loop.time()
                    if not await self._lead():
                        return
                await self._cycle(force)
                if rows := await self._next_rows(loop.time()):
                    await self._send(wire, rows, user, broken)
                force = await self._pause(broken, connection)
            broken.result()
        finally:
            end(broken)
            await self._put_aside()

    async def _cycle(self, force: bool) -> None:
        """Deletes what was confirmed, and reads what is new."""
        settled, self._settled = self._settled, []
        room = READ_BATCH - self._relay.idle
        try:
            rows, size = await self._in_thread(self._exchange, settled, self._relay.last, max(room, 0), force)
        except BaseException:
            self._settled[:0] = settled
            raise
        if size is not None:
            self._size = size
        if settled:
            self._room.set()
        for row in rows:
            if self._cached_bytes < CACHED_BYTES:
                self._cache[row.number] = row
                self._cached_bytes += len(row.event.body)
        self._relay.learn((row.number, row.event.envelope.key) for row in rows)
        if len(rows) == max(room, 0):
            self._wake.set()

    def _exchange(
        self, settled: Sequence[int], after: int, limit: int, force: bool
    ) -> tuple[list[StoredEvent], OutboxSize | None]:
        changed = self._store.changed()
        if not (settled or force or changed):
            return [], None
        return self._store.exchange(settled, after, limit), self._store.size()

    async def _next_rows(self, now: float) -> list[StoredEvent]:
        self._relay.window = 1 if self._alone else WINDOW
        numbers = list(self._relay.take(now))
        missing = [number for number in numbers if number not in self._cache]
        if missing:
            try:
                found = await self._in_thread(self._store.read, missing)
            except BaseException:
                self._relay.lost()
                raise
            self._cache.update((row.number, row) for row in found)
            self._cached_bytes += sum(len(row.event.body) for row in found)
        rows = []
        for number in numbers:
            row = self._cache.pop(number, None)
            if row is None:  # somebody has deleted it
                self._relay.settled(number)
            else:
                self._cached_bytes -= len(row.event.body)
                rows.append(row)
        return rows

    async def _pause(self, broken: asyncio.Future[None], connection: AbstractConnection) -> bool:
        """Waits for something to do; whether the table is to be read whatever it says."""
        loop = asyncio.get_running_loop()
        due = self._relay.next_due
        wait = POLL if due is None else min(POLL, max(0.0, due - loop.time()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._wake.wait()
        oldest = next(iter(self._sent_at.values()), math.inf)
        if loop.time() - oldest > self._patience and not broken.done():
            if await is_blocked(connection):
                self._words = "the broker takes no events for now: it is short of disk or memory"
            else:
                self._patience = min(2 * self._patience, MOST_PATIENCE)
                break_off(broken, TimeoutError())
        return self._wake.is_set()

    async def _send(self, wire: Wire, rows: Sequence[StoredEvent], user: str, broken: asyncio.Future[None]) -> None:
        now = asyncio.get_running_loop().time()
        messages = [outgoing(row.event, user, self._publisher) for row in rows]
        self.counters.sent += len(rows)
        self._sent_at.update((row.number, now) for row in rows)
        for row, confirmation in zip(rows, await wire.publish(messages), strict=True):
            confirmation.add_done_callback(partial(self._sent, wire, row, broken))

    def _sent(self, wire: Wire, row: StoredEvent, broken: asyncio.Future[None], result: asyncio.Future[Any]) -> None:
        """What became of a message. Those that a broken connection leaves behind are sent again, whatever is said."""
        wire.forget(row.event.envelope.id)
        error = None if result.cancelled() else result.exception()
        if broken.done():
            return
        now, type = asyncio.get_running_loop().time(), row.event.envelope.type
        if isinstance(error, PublishError):
            self.counters.returned += 1
            delay = self._relay.returned(row.number, now)
            if not self._unroutable[type]:
                logger.warning("nobody is subscribed to %s: its events wait in the outbox, %.1f s for now", type, delay)
            self._unroutable[type] += 1
        elif isinstance(error, DeliveryError):
            self.counters.rejected += 1
            self._relay.returned(row.number, now)
        elif error is not None or result.cancelled():
            if isinstance(error, ChannelPreconditionFailed) and "larger than" in str(error):
                # It closed the channel over one of those on their way. Sent one at a time, it is found.
                self._alone = max(self._alone, self._relay.in_flight)
                self._oversize = (row, str(error)) if self._relay.in_flight == 1 else None
            break_off(broken, error if isinstance(error, Exception) else ConnectionError("the connection was closed"))
        else:
            self.counters.confirmed += 1
            self._settle(row.number)
            self._patience = CONFIRM_TIMEOUT
            self._words = "connected"
            self._backoff.reset()
        self._sent_at.pop(row.number, None)
        if broken.done() or self._relay.in_flight < WINDOW // 2 or len(self._settled) >= SETTLE_BATCH:
            self._wake.set()

    async def _put_aside(self) -> None:
        """Puts aside the event that the broker never takes, if it has just been found."""
        if self._oversize is None:
            return
        (row, why), self._oversize = self._oversize, None
        self.counters.refused += 1
        logger.error("the broker takes no event of this size: %s is put aside: %s", row.event.envelope.id, why)
        await self._in_thread(self._store.refuse, row.number, why)
        self._relay.settled(row.number)

    def _settle(self, number: int) -> None:
        self._relay.settled(number)
        self._settled.append(number)
        self._alone = max(0, self._alone - 1)

    def _forget_bodies(self) -> None:
        self._cache.clear()
        self._cached_bytes = 0

    async def _in_thread(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def end(broken: asyncio.Future[None]) -> None:
    """Nobody waits any more for the end of a connection."""
    if not broken.cancel() and not broken.cancelled():
        broken.exception()


def break_off(broken: asyncio.Future[None], error: Exception) -> None:
    """Ends a session: whoever serves it is told of the first error."""
    if not broken.done():
        broken.set_exception(error)
