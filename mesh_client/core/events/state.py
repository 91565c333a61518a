"""What the bus knows of itself, as plain data: for operators, tests and exporters of metrics."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh_client.core.tally import Tally


class RelayState(enum.Enum):
    """Whether what is in an outbox goes to the broker from this process."""

    CONNECTED = "connected"
    """It does."""
    DISCONNECTED = "disconnected"
    """It would, but there is no connection now."""
    STANDBY = "standby"
    """Another process sends what is in the same outbox."""
    NO_BROKER = "no_broker"
    """No broker is configured: everything stays where it is."""


@dataclass(slots=True)
class PublishCounters:
    """Of one bus, since its start. They only grow."""

    stored: int = 0
    """Events that `publish` has put into the outbox."""
    refused_full: int = 0
    """Calls of `publish` that failed because the outbox was full."""
    sent: int = 0
    """Messages given to the broker, repetitions included."""
    confirmed: int = 0
    """Events that the broker has confirmed, and that have left the outbox."""
    returned: int = 0
    """Times that an event came back because nobody is subscribed to it."""
    rejected: int = 0
    """Times that the broker could not store an event just then."""
    refused: int = 0
    """Events that the broker will never take, put aside."""


@dataclass(slots=True)
class GroupCounters:
    """Of one group's consumer in this process, since its start. They only grow."""

    delivered: int = 0
    """Deliveries, of which one event may have several."""
    redelivered: int = 0
    """Deliveries of events that had been delivered before and not acknowledged."""
    handled: int = 0
    """Events whose handler succeeded, and that were acknowledged."""
    failed: int = 0
    """Handlers that raised or took too long."""
    timed_out: int = 0
    """Those of them that took too long."""
    retried: int = 0
    """Events sent to wait for another attempt."""
    deferred: int = 0
    """Events sent to wait behind one of their key that waits for another attempt."""
    dead: dict[str, int] = field(default_factory=dict)
    """Events sent to the dead-letter queue, by reason."""
    lag: Tally = field(default_factory=Tally)
    """From publications to the first calls of their handlers, by the clocks of both sides."""


@dataclass(frozen=True, slots=True)
class OutboxState:
    """The outbox.

    Attributes:
        name: where it is.
        events: how many wait, those on their way included.
        bytes: of their bodies.
        oldest_age: seconds for which the oldest has waited; None when it is empty.
        held: those that came back from the broker and wait to be sent again.
        refused: those that the broker will never take, put aside.
        max_events: the bound.
        max_bytes: the bound.
        relaying: whether it is this process that sends them.
        broker: state of the connection, in words.
        connected: whether there is one.
        relay: the same as one of few.
    """

    name: str
    events: int
    bytes: int
    oldest_age: float | None
    held: int
    refused: int
    max_events: int
    max_bytes: int
    relaying: bool
    broker: str
    connected: bool
    relay: RelayState


@dataclass(frozen=True, slots=True)
class GroupState:
    """One group's consumer in this process.

    Attributes:
        group: its name.
        broker: state of the connection, in words.
        connected: whether it consumes. Of an ordered group one instance at a time gets events.
        paused: whether the service's policy says that it must not.
        running: handlers that run.
        waiting: deliveries that wait for one.
        lag: seconds from the publishing of the last event that a handler was called for to that call; None for none.
        counters: since the start.
        handled: calls of handlers, how they ended and how long they took, by publisher and message type.
    """

    group: str
    broker: str
    connected: bool
    paused: bool
    running: int
    waiting: int
    lag: float | None
    counters: GroupCounters
    handled: Mapping[tuple[str, str], Tally]

    @property
    def edges(self) -> dict[tuple[str, str], int]:
        """Events handled well, by publisher and message type."""
        return {edge: tally.ok for edge, tally in self.handled.items() if tally.ok}


@dataclass(frozen=True, slots=True)
class EventsState:
    """A bus.

    Attributes:
        service: whose it is.
        outbox: None before the first use.
        published: counters.
        edges: events stored, by message type.
        groups: consumers.
    """

    service: str
    outbox: OutboxState | None
    published: PublishCounters
    edges: dict[str, int]
    groups: tuple[GroupState, ...]
