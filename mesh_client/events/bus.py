"""The bus: what a service publishes events by, and subscribes to them."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar

from google.protobuf.message import Message

from mesh_client.context import inbound
from mesh_client.core.errors import ConfigError, InvalidTransitionError
from mesh_client.core.events.envelope import Envelope, check_key, check_type
from mesh_client.core.events.errors import EventTooLargeError, OutboxAwayError, PublishTimeoutError
from mesh_client.core.events.state import EventsState
from mesh_client.core.events.topology import CONTROL_PLANE, Group, check_member
from mesh_client.core.load_report import Consumer
from mesh_client.events.broker import Broker
from mesh_client.events.consumer import GroupConsumer
from mesh_client.events.event import Handler
from mesh_client.events.handling import check_handler
from mesh_client.events.options import GroupOptions
from mesh_client.events.outbox import OutboxStore, SqliteOutbox
from mesh_client.events.prepared import PreparedEvent
from mesh_client.events.publisher import WORKLOAD, source_of
from mesh_client.events.relay import Outbox
from mesh_client.events.schema import schema_version
from mesh_client.events.settings import BrokerSettings
from mesh_client.events.subscription import Subscription
from mesh_client.events.tracing import EventTracing
from mesh_client.tasks import end_tasks

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.core.identity import Principal
    from mesh_client.core.policy import ServicePolicy
    from mesh_client.identity import IdentityState

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

DEFAULT_TIMEOUT = 5.0
"""Seconds for which `EventBus.publish` waits at most, outside of handlers that have a deadline."""
DEFAULT_HANDLER_TIMEOUT = 30.0
MAX_EVENTS = 100_000
MAX_OUTBOX_BYTES = 256 << 20
MAX_EVENT_BYTES = 1 << 20
OPEN_TIMEOUT = 10.0
"""Seconds for which the start waits for the outbox's database."""
OPEN_AGAIN = 0.1
FLUSH_TIMEOUT = 2.0
"""Seconds for which a service that stops waits for its outbox to become empty, while there is a broker."""


FollowPolicy = Callable[[str, Callable[["ServicePolicy"], None]], Callable[[], None]]
"""Calls back with the policy of a service, the defaults for one that the mesh does not know, and at each change.

Returns what ends that.
"""


def _nothing() -> None:
    """Nothing is followed."""


class Publisher(Protocol):
    """Who publishes, as far as events say it. A process's `mesh_client.identity.Identity` is one."""

    @property
    def principal(self) -> Principal:
        """Who it is."""

    def state(self, now: float) -> IdentityState:
        """Which workload it is at ``now``, seconds since the epoch."""


class Identified(Protocol):
    """What knows who publishes, such as the transport of a mesh client."""

    @property
    def identity(self) -> Publisher | None:
        """Who; None in plaintext, where nobody is anybody."""


class EventBus:
    """Publishes a service's events and calls its handlers. Made by `mesh_client.mesh.Mesh.events`.

    Belongs to one event loop. Publishing works at once; handlers are called from `start` on, which a mesh server of
    the same client calls by itself.
    """

    def __init__(
        self,
        service: str,
        transport: Identified,
        broker: BrokerSettings | None,
        outbox: OutboxStore | str | Path,
        *,
        max_events: int = MAX_EVENTS,
        max_bytes: int = MAX_OUTBOX_BYTES,
        max_event_bytes: int = MAX_EVENT_BYTES,
        follow_policy: FollowPolicy | None = None,
        tracer_provider: TracerProvider | None = None,
        rng: Random | None = None,
    ) -> None:
        self._tracing = EventTracing(tracer_provider)
        self.service = service if service == CONTROL_PLANE else check_member(service)
        self._transport = transport
        self._rng = rng or Random()
        self._broker = None if broker is None else Broker(broker, f"{service}")
        store = SqliteOutbox(Path(outbox)) if isinstance(outbox, str | Path) else outbox
        self._outbox = Outbox(store, self._broker, service, max_events, max_bytes, self._rng)
        self._max_event_bytes = max_event_bytes
        self._follow_policy = follow_policy
        self._stop_following: Callable[[], None] = _nothing
        self._opening: asyncio.Task[None] | None = None
        self._subscriptions: dict[str, dict[str, Subscription]] = {}
        self._options: dict[str, GroupOptions] = {}
        self._consumers: dict[str, GroupConsumer] = {}
        self._used = self._started = self._closed = False
        self._stored: Counter[str] = Counter()

    # -- publishing

    async def publish(
        self, message: Message, *, key: str = "", timeout: float | None = None, mandatory: bool = True
    ) -> str:
        """Publishes an event. Returns once it is in the outbox: from then on it is not lost.

        The broker gets it as soon as it can be reached, in the order of publishing for each key.

        Args:
            message: what happened. Its type, a message with a package, names the event.
            key: events with the same key are handled in the order in which they were published; empty for no order.
            timeout: seconds to wait at most while the outbox is full or its database is busy; by default what is left
                of the handler's deadline, else 5.
            mandatory: keep the event until somebody is subscribed to it. False lets the broker drop it when nobody is.

        Returns:
            The event's id.

        Raises:
            EventTooLargeError: the message is larger than events may be.
            OutboxFullError: there was no room for it in the outbox.
            PublishTimeoutError: it could not be stored in time.
            ConfigError: the outbox cannot be used.
            InvalidValueError: the key or the message's type is not allowed.
        """
        event = self.prepare(message, key=key, mandatory=mandatory)
        timeout = self._timeout(timeout)
        if not self._is_open:
            deadline = time.monotonic() + timeout
            try:
                await self._open(timeout)
            except OutboxAwayError as error:
                raise PublishTimeoutError(f"the event could not be stored in time: {error}") from None
            timeout = deadline - time.monotonic()
        await self._outbox.publish(event, timeout)
        self._stored[event.envelope.type] += 1
        return event.envelope.id

    def prepare(self, message: Message, *, key: str = "", mandatory: bool = True) -> PreparedEvent:
        """An event that is stored by the service itself, in a transaction on its own database.

        The table is ``mesh_outbox``; the file must be the bus's ``outbox``. Call `stored` after the commit.

        Raises:
            EventTooLargeError, InvalidValueError: as for `publish`.
        """
        descriptor = message.DESCRIPTOR
        body = message.SerializeToString(deterministic=True)
        if len(body) > self._max_event_bytes:
            raise EventTooLargeError(
                f"{descriptor.full_name} of {len(body)} bytes; events have at most {self._max_event_bytes}: publish a "
                "reference to it in its place"
            )
        identity = self._transport.identity
        envelope = Envelope(
            uuid.uuid4().hex,
            source_of(None if identity is None else identity.principal, self.service),
            check_type(descriptor.full_name),
            time.time(),
            schema_version(type(message)),
            check_key(key),
        )
        headers = self._tracing.publishing(envelope, len(body))
        if identity is not None and (workload := identity.state(envelope.time).workload_id):
            headers[WORKLOAD] = workload
        return PreparedEvent(envelope, headers, mandatory, body)

    def stored(self) -> None:
        """What `prepare` made was committed: it is sent at once. Without this it is found a moment later."""
        self._outbox.wake()

    async def flush(self, timeout: float = FLUSH_TIMEOUT) -> bool:
        """Waits until the broker has confirmed everything in the outbox; False when that took longer.

        Args:
            timeout: seconds.

        Raises:
            ConfigError: the outbox cannot be used.
        """
        await self._open()
        return await self._outbox.flush(timeout)

    # -- subscribing

    def group(self, name: str | None = None, options: GroupOptions | None = None, **changes: object) -> None:
        """Says how a group works, before the start.

        Args:
            name: of the group; by default the service's.
            options: in whole.
            changes: of single options.

        Raises:
            ConfigError: an option is not allowed, or the bus has been started.
        """
        self._not_started()
        name = Group(self.service, name or self.service).name
        try:
            self._options[name] = replace(options or self._options.get(name, GroupOptions()), **changes)  # type: ignore[arg-type]  # replace checks
        except TypeError as error:
            raise ConfigError(f"group {name}: {error}") from None

    def subscribe(
        self,
        message_class: type[M],
        *,
        group: str | None = None,
        timeout: float = DEFAULT_HANDLER_TIMEOUT,
        publishers: Collection[str] = (),
    ) -> Callable[[Handler[M]], Handler[M]]:
        """Decorates the handler of an event.

        All instances of a group share its events: each event is handled once by each group, and again when its handler
        raised, took too long or died: see `mesh_client.events.inbox`.

        Args:
            message_class: generated class of the event's message.
            group: DNS label; by default the service's name.
            timeout: seconds that the handler has.
            publishers: services whose events are taken, by what the broker says of who published; those of others are
                dead letters. Empty for everybody's.

        Raises:
            ConfigError: the group has a handler for it, this one is no coroutine function, or the bus has been started.
            InvalidValueError: the group's name, the message's type or a publisher's name is not allowed.
        """
        self._not_started()
        allowed = frozenset(each if each == CONTROL_PLANE else check_member(each) for each in publishers)
        name = Group(self.service, group or self.service).name
        message_type = check_type(message_class.DESCRIPTOR.full_name)
        if not 0.0 < timeout <= 3_600.0:
            raise ConfigError(f"timeout: {timeout} is not allowed; expected seconds, above 0 to 3600")

        def subscribed(handler: Handler[M]) -> Handler[M]:
            check_handler(handler)
            handlers = self._subscriptions.setdefault(name, {})
            if message_type in handlers:
                raise ConfigError(f"group {name} has a handler for {message_type} already; use another group")
            handlers[message_type] = Subscription(message_class, handler, timeout, allowed)
            return handler

        return subscribed

    async def start(self) -> None:
        """Opens the outbox and begins to call handlers, as soon as the broker can be reached. Idempotent.

        Raises:
            ConfigError: the outbox cannot be used.
        """
        await self._open()
        if self._started:
            return
        self._started = True
        identity = self._transport.identity
        trust_domain = None if identity is None else identity.principal.trust_domain
        # As servers do: whoever proves who they are also learns first whom they may listen to.
        waits = identity is not None and self._follow_policy is not None
        for name, handlers in self._subscriptions.items():
            group, options = Group(self.service, name), self._options.get(name, GroupOptions())
            consumer = GroupConsumer(
                self._broker, group, options, handlers, trust_domain, self._tracing, self._rng, waits=waits
            )
            self._consumers[name] = consumer
            consumer.start()
        if self._consumers and self._follow_policy is not None:
            self._stop_following = self._follow_policy(self.service, self._obey)

    def _obey(self, policy: ServicePolicy) -> None:
        for name, consumer in self._consumers.items():
            consumer.obey(policy.event_group(name))

    async def drain(self, grace: float = 10.0) -> None:
        """Stops calling handlers: those that run finish, and their events are acknowledged. Publishing goes on.

        Args:
            grace: seconds after which handlers are cancelled; their events will be delivered again.
        """
        await asyncio.gather(*(consumer.drain(grace) for consumer in self._consumers.values()))

    async def close(self) -> None:
        """Drains, gives the broker what is in the outbox if it takes it at once, and ends. Idempotent.

        What the broker has not confirmed stays in the outbox.
        """
        if self._closed:
            return
        self._closed = True
        self._stop_following()
        await self.drain()
        if not self._used:
            return
        if self._opening is not None and self._opening.done():
            state = self._outbox.state(time.time())
            if state is not None and state.connected and state.relaying:
                await self._outbox.flush(FLUSH_TIMEOUT)
        await end_tasks(self._opening)
        await self._outbox.close()

    async def __aenter__(self) -> Self:
        """Starts.

        Raises:
            ConfigError: the outbox cannot be used.
        """
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes."""
        await self.close()

    def state(self) -> EventsState:
        """What the bus knows of itself now. What other processes do with the same outbox shows within a moment."""
        return EventsState(
            self.service,
            self._outbox.state(time.time()),
            self._outbox.counters,
            dict(self._stored),
            tuple(consumer.state() for consumer in self._consumers.values()),
        )

    def consumers(self) -> list[Consumer]:
        """The groups whose load is reported."""
        return [Consumer(name, consumer.book) for name, consumer in self._consumers.items()]

    @property
    def _is_open(self) -> bool:
        opening = self._opening
        if self._closed or opening is None or not opening.done():
            return False
        return not opening.cancelled() and opening.exception() is None

    async def _open(self, timeout: float = OPEN_TIMEOUT) -> None:
        """Opens the outbox, unless it is open; what keeps it from that may have been mended since the last time.

        Raises:
            OutboxAwayError: its database does not answer in time, or somebody else holds it.
            ConfigError: the outbox cannot be used.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            if self._closed:
                raise InvalidTransitionError("the event bus is closed")
            if self._opening is None:
                self._used = True
                self._opening = asyncio.create_task(self._outbox.open(), name="outbox opens")
                self._opening.add_done_callback(self._opened)
            opening = self._opening
            try:
                async with asyncio.timeout_at(deadline):
                    await asyncio.shield(opening)
                    return
            except TimeoutError:
                raise OutboxAwayError(f"outbox: the database of {self._outbox.name} does not answer") from None
            except OutboxAwayError:
                if asyncio.get_running_loop().time() + OPEN_AGAIN >= deadline:
                    raise
            await asyncio.sleep(OPEN_AGAIN)

    def _opened(self, opening: asyncio.Task[None]) -> None:
        if opening.cancelled() or opening.exception() is not None:
            self._opening = None

    def _not_started(self) -> None:
        if self._started:
            raise ConfigError("the event bus has been started: subscribe and set up groups before")

    def _timeout(self, timeout: float | None) -> float:
        if timeout is not None:
            return timeout
        call = inbound.get()
        if call is None or call.deadline is None:
            return DEFAULT_TIMEOUT
        return max(0.0, min(DEFAULT_TIMEOUT, call.deadline - time.monotonic()))
