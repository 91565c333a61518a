"""One group's consumer: takes events from the group's queue, calls handlers, acknowledges, retries, buries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

from mesh_client.context import InboundCall, inbound
from mesh_client.core.events.envelope import Envelope
from mesh_client.core.events.errors import DeadReason, UnusableEventError
from mesh_client.core.events.lanes import Defer, Delivery, Lanes, Run
from mesh_client.core.events.state import GroupCounters, GroupState
from mesh_client.core.events.topology import EXCHANGE, Group, binding_key
from mesh_client.core.policy import NO_GROUP, EventGroup
from mesh_client.core.served import ServedBook
from mesh_client.events import handling
from mesh_client.events.broker import (
    CONNECT_TIMEOUT,
    FAILURES,
    Backoff,
    Broker,
    check_user,
    declare_exchange,
    declare_queue,
    explain,
    queue_exists,
)
from mesh_client.events.delivery import (
    ATTEMPT,
    BURIED,
    DELIVERY_COUNT,
    DETAIL,
    REASON,
    attempt_of,
    code_of,
    copy_of,
    publisher_name,
)
from mesh_client.events.event import Event
from mesh_client.events.options import GroupOptions
from mesh_client.events.pause import Permission, first_of
from mesh_client.events.publisher import check_publisher, proven_user
from mesh_client.events.relay import break_off, end
from mesh_client.events.schema import decode
from mesh_client.events.subscription import Subscription
from mesh_client.events.tracing import EventTracing, failed
from mesh_client.tasks import end_tasks, obey_cancellation

logger = logging.getLogger(__name__)

STUBBORN = 5.0
"""Seconds that cancelled handlers have to end."""
SETTLE = 2.0
"""Seconds that a new queue has before anything may get into it. RabbitMQ writes the name of a new quorum queue to the
disk up to a second later; killed before that it forgets what it had confirmed to be in the queue (seen with 3.10)."""
_PAUSED = "paused by the service's policy"
_WAITS = "waits to hear from a control plane what the service's policy is"
_MAX_DETAIL = 500
_RETURN_TIMEOUT = 10.0


@dataclass(slots=True)
class _Taken:
    """A delivery that has not been acknowledged."""

    message: AbstractIncomingMessage
    session: asyncio.Future[None]
    """Of the connection that it came by, and by which it is acknowledged; done when that is gone."""
    envelope: Envelope | None
    problem: UnusableEventError | None


class GroupConsumer:
    """Consumes for one group in this process.

    Args:
        broker: where.
        group: whose.
        options: how.
        subscriptions: handlers by message type.
        trust_domain: of the mesh; None in plaintext.
        tracing: makes the spans of handlers.
        rng: of jitter and suspicion.
        waits: whether to begin only once it is known what the service's policy says, by `obey`.

    Attributes:
        counters: since the start.
        book: calls of handlers, by message type with a leading slash, and publisher.
    """

    def __init__(
        self,
        broker: Broker | None,
        group: Group,
        options: GroupOptions,
        subscriptions: dict[str, Subscription],
        trust_domain: str | None,
        tracing: EventTracing,
        rng: Random,
        *,
        waits: bool = False,
    ) -> None:
        self.counters = GroupCounters()
        self.book = ServedBook()
        self._tracing = tracing
        self._broker = broker
        self._group = group
        self._options = options
        self._subscriptions = subscriptions
        self._trust_domain = trust_domain
        self._backoff = Backoff(rng)
        self._lanes = Lanes(options.concurrency, tuple(options.retries.delays), rng, ordered=options.ordered)
        self._policy = NO_GROUP
        self._permission = Permission(given=not waits)
        self._taken: dict[Delivery, _Taken] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._settling: set[asyncio.Task[Any]] = set()
        """Of them those that acknowledge, or move an event to another queue."""
        self._exchange: aio_pika.abc.AbstractExchange | None = None
        self._broken: asyncio.Future[None] | None = None
        self._draining = False
        self._task: asyncio.Task[None] | None = None
        self._tag = 0
        self._words = "not connected yet" if broker is not None else "no broker is configured (MESH_BROKER)"
        self._connected = False
        self._lag: float | None = None

    def obey(self, policy: EventGroup) -> None:
        """Works by this policy from now on; handlers that run finish by the one before."""
        if policy.paused and not self._policy.paused:
            logger.warning("the group %s is paused by the service's policy: its events wait", self._group.queue)
        elif self._policy.paused and not policy.paused:
            logger.info("the group %s goes on", self._group.queue)
        self._policy = policy
        own = self._options.concurrency
        self._lanes.concurrency = min(own, policy.max_in_flight or own)
        self._permission.put(not policy.paused)
        self._go_on()

    def start(self) -> None:
        """Begins to consume, in the background, now and whenever the broker can be reached."""
        if self._broker is not None and self._task is None:
            self._task = asyncio.create_task(self._run(self._broker), name=f"events of {self._group.queue}")

    async def drain(self, grace: float) -> None:
        """Calls no further handlers, waits for those that run, and acknowledges; what was not begun is given back.

        Args:
            grace: seconds after which handlers are cancelled; their events will be delivered again.
        """
        self._draining = True
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=grace)
        if not await end_tasks(*self._handlers, again=1.0, limit=STUBBORN):
            logger.error("handlers of %s do not end when they are cancelled; they are left behind", self._group.queue)
        await end_tasks(self._task)
        self._task = None

    def state(self) -> GroupState:
        """The consumer in plain data."""
        return GroupState(
            self._group.name,
            self._words,
            self._connected,
            self._policy.paused,
            self._lanes.running,
            self._lanes.waiting,
            self._lag,
            self.counters,
            {
                (publisher, method.removeprefix("/")): tally
                for method, tallies in self.book
                for publisher, tally in tallies.items()
            },
        )

    # -- connection

    async def _run(self, broker: Broker) -> None:
        while True:
            if not self._permission.given:
                self._words, self._connected = _PAUSED if self._policy.paused else _WAITS, False
                await self._permission.until_given()
            try:
                async with broker.connection(f"group {self._group.name}") as (connection, credentials):
                    check_user(credentials, self._group.service)
                    await self._session(connection)
                continue
            except FAILURES as error:
                self._lost(explain(error, broker.settings))
            except Exception:
                logger.exception("the consumer of %s failed; it begins again", self._group.queue)
                self._lost("it failed; see the log")
            except BaseException:
                self._words, self._connected = "closed", False
                raise
            await asyncio.sleep(self._backoff.next())

    def _lost(self, words: str) -> None:
        if self._connected or words != self._words:
            logger.warning("the group %s gets no events: %s", self._group.queue, words)
        self._words, self._connected = words, False

    async def _session(self, connection: AbstractConnection) -> None:
        """Consumes until the group is paused, or the connection breaks, which it raises."""
        broken = self._broken = asyncio.get_running_loop().create_future()

        def closed(_: object, error: BaseException | None) -> None:
            break_off(broken, error if isinstance(error, Exception) else ConnectionError("the connection was closed"))

        def dismissed(_: object) -> None:
            break_off(broken, RuntimeError("the broker has ended it, because its queue is gone"))

        await declare_exchange(connection)
        fresh = not await queue_exists(connection, self._group.queue)
        channel = await connection.channel(on_return_raises=True)
        channel.close_callbacks.add(closed)
        connection.close_callbacks.add(closed)
        try:
            queue = await self._declare(channel, fresh=fresh)
            await channel.set_qos(prefetch_count=self._options.ahead, timeout=CONNECT_TIMEOUT)
            (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(dismissed)
            await queue.consume(self._arrived, timeout=CONNECT_TIMEOUT)
            obey_cancellation()  # aiormq may have lost one
            logger.info("the group %s gets events", self._group.queue)
            self._words, self._connected = "connected", True
            self._backoff.reset()
            await self._permission.until_taken(broken)
            # What was not begun is given back with the channel, all at once and in order. Were the consumer cancelled
            # before, what is on its way then would be given back ahead of the others.
            while self._handlers:
                await first_of(broken, *self._handlers)
        finally:
            end(broken)
            self._broken = self._exchange = None
            for task in self._settling:  # what waits to be written to a connection that is gone would wait for ever
                task.cancel()
            for delivery in self._lanes.reset():
                del self._taken[delivery]

    async def _declare(self, channel: AbstractChannel, *, fresh: bool) -> aio_pika.abc.AbstractQueue:
        group, options = self._group, self._options
        own = await channel.declare_exchange(group.exchange, "direct", durable=True, timeout=CONNECT_TIMEOUT)
        queue: aio_pika.abc.AbstractQueue | None = None
        for spec in group.queues(options.retries.milliseconds, options.delivery_limit, ordered=options.ordered):
            queue = await declare_queue(channel, spec)
            await queue.bind(own, spec.name, timeout=CONNECT_TIMEOUT)
        assert queue is not None  # noqa: S101 - the last one is the group's own
        if fresh:
            await asyncio.sleep(SETTLE)
        for message_type in self._subscriptions:
            await queue.bind(EXCHANGE, binding_key(message_type), timeout=CONNECT_TIMEOUT)
        self._exchange = own
        return queue

    # -- deliveries

    async def _arrived(self, message: AbstractIncomingMessage) -> None:
        session, envelope, problem = self._broken, None, None
        if session is None:
            return  # it will be delivered again
        try:
            envelope = Envelope.parse(message.headers, message.content_type)
        except UnusableEventError as error:
            problem = error
        count = message.headers.get(DELIVERY_COUNT, 0)
        deliveries = count if isinstance(count, int) else 0
        self._tag += 1
        delivery = Delivery(self._tag, envelope.id if envelope else "", envelope.key if envelope else "", deliveries)
        self.counters.delivered += 1
        self.counters.redelivered += deliveries > 0
        self._taken[delivery] = _Taken(message, session, envelope, problem)
        loop = asyncio.get_running_loop()
        if wait := self._lanes.arrived(delivery, loop.time()):
            loop.call_later(wait, self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Does what the lanes say now."""
        if self._draining or not self._permission.given or self._broken is None or self._broken.done():
            return
        for action in self._lanes.next(asyncio.get_running_loop().time()):
            work = self._handle(action.delivery) if isinstance(action, Run) else self._defer(action)
            task = asyncio.create_task(work, name=f"event {action.delivery.id}")
            self._handlers.add(task)
            task.add_done_callback(self._handlers.discard)

    async def _handle(self, delivery: Delivery) -> None:
        """Calls the handler, and tells the lanes what became of it."""
        taken = self._taken[delivery]
        level: int | None = None
        try:
            attempt = attempt_of(taken.message)
            try:
                await self._call(taken, attempt)
            except UnusableEventError as error:
                await self._bury(taken, error.reason, error.detail)
            except Exception as error:
                level = await self._failed(taken, attempt, error)
            else:
                with self._settles(taken):
                    await taken.message.ack()
                self.counters.handled += 1
        except Exception as error:
            # Not acknowledged: the broker delivers it again, and those behind it, for none of them is begun before.
            break_off(taken.session, error)
        finally:
            del self._taken[delivery]
            if level is None:
                self._lanes.finished(delivery)
            else:
                self._lanes.postponed(delivery, level, asyncio.get_running_loop().time())
            self._go_on()

    async def _call(self, taken: _Taken, attempt: int) -> None:
        message, envelope = taken.message, taken.envelope
        if envelope is None:
            raise taken.problem or UnusableEventError(DeadReason.NOT_AN_EVENT, "it says nothing of itself")
        user = proven_user(message.user_id, message.headers, self._group.service)
        caller = check_publisher(envelope.source, user, message.headers, self._trust_domain)
        subscription = self._subscriptions.get(envelope.type)
        if subscription is None:
            raise UnusableEventError(
                DeadReason.UNKNOWN_TYPE, f"the group has no handler for {envelope.type}, only for {self._types()}"
            )
        policy = self._policy.handling(envelope.type)
        subscription.check_publisher(user, policy)
        if len(message.body) > self._options.max_bytes:
            raise UnusableEventError(
                DeadReason.TOO_LARGE, f"{len(message.body)} bytes, at most {self._options.max_bytes} are taken"
            )
        event = Event(
            decode(subscription.message_class, message.body, envelope.schema),
            envelope.id,
            envelope.source,
            caller,
            envelope.type,
            envelope.key,
            envelope.time,
            attempt,
            self._group.name,
        )
        self._lag = lag = max(0.0, time.time() - envelope.time)
        if attempt == 1:
            self.counters.lag.succeeded(lag)
        tally = self.book.tally(self.book.of(f"/{envelope.type}"), publisher_name(envelope.source, user))
        code, began, timeout = "OK", time.monotonic(), policy.timeout or subscription.timeout
        call = InboundCall(began + timeout, caller=caller)
        token = inbound.set(call)
        size, queue, group = len(message.body), self._group.queue, self._group.name
        try:
            with self._tracing.handling(envelope, size, message.headers, queue, group, attempt) as span:
                limit = asyncio.timeout(timeout)
                try:
                    await handling.call(subscription.handler, event, limit)
                except Exception as error:
                    failed(span, error)
                    if not (isinstance(error, TimeoutError) and limit.expired()):
                        raise
                    self.counters.timed_out += 1
                    raise TimeoutError(f"the handler took more than {timeout:g} s") from None
        except BaseException as error:
            code = code_of(error)
            raise
        finally:
            call.cancel()
            inbound.reset(token)
            tally.ended(code, time.monotonic() - began)

    async def _failed(self, taken: _Taken, attempt: int, error: Exception) -> int | None:
        """Sends an event to wait for its next attempt; at which level, or None when there is none."""
        self.counters.failed += 1
        words = f"{type(error).__name__}: {error}"
        retries, envelope = self._options.retries, taken.envelope
        event_id, message_type = (envelope.id, envelope.type) if envelope else ("", "")
        attempts = min(retries.attempts, self._policy.handling(message_type).max_attempts or retries.attempts)
        level = retries.level(attempt) if attempt < attempts else None
        if level is None:
            logger.error("event %s is dead after %d attempts: %s", event_id, attempt, words, exc_info=error)
            await self._bury(taken, DeadReason.ATTEMPTS, f"{attempt} attempts, the last: {words}")
            return None
        logger.warning("event %s failed, attempt %d of %d: %s", event_id, attempt, attempts, words)
        await self._move(taken, self._retry_queue(level), {ATTEMPT: attempt + 1})
        self.counters.retried += 1
        return level

    async def _defer(self, action: Defer) -> None:
        taken = self._taken.pop(action.delivery)
        try:
            await self._move(taken, self._retry_queue(action.level), {})
            self.counters.deferred += 1
        except Exception as error:
            break_off(taken.session, error)

    async def _bury(self, taken: _Taken, reason: DeadReason, detail: str) -> None:
        detail = detail.encode(errors="replace").decode()  # names of files may have what is no text
        headers: dict[str, aio_pika.abc.FieldValue] = {
            REASON: reason.value,
            DETAIL: detail[:_MAX_DETAIL],
            BURIED: int(time.time()),
        }
        await self._move(taken, self._group.dead, headers)
        self.counters.dead[reason.value] = self.counters.dead.get(reason.value, 0) + 1
        logger.warning("event %s is in %s: %s", taken.message.message_id, self._group.dead, detail)

    async def _move(self, taken: _Taken, queue: str, headers: dict[str, aio_pika.abc.FieldValue]) -> None:
        """Puts a delivery into another queue of the group, and acknowledges it once it is there."""
        message, exchange = taken.message, self._exchange
        if exchange is None:
            raise ConnectionError("the connection is gone")
        moved = copy_of(message, self._group.service, self._group.service, headers)
        with self._settles(taken):
            async with asyncio.timeout(_RETURN_TIMEOUT):
                await exchange.publish(moved, queue)
            await message.ack()

    @contextlib.contextmanager
    def _settles(self, taken: _Taken) -> Iterator[None]:
        """The running task is cancelled within the block when the connection is lost."""
        task = asyncio.current_task()
        if taken.session is not self._broken or taken.session.done() or task is None:
            raise ConnectionError("the connection is gone")
        self._settling.add(task)
        try:
            yield
        finally:
            self._settling.discard(task)

    def _retry_queue(self, level: int) -> str:
        return self._group.retry(self._options.retries.milliseconds[level])

    def _types(self) -> str:
        return ", ".join(sorted(self._subscriptions))
