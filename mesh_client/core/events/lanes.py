"""Which of a group's deliveries are handled now: order by key, concurrency, and what is suspected of killing processes.

Events of one key share a lane and are handled one after the other. One that fails and waits to be tried again keeps its
lane: those behind it are sent to wait behind it, so that they come back in the same order. Everything else goes on.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

SUSPECT_AFTER = 2
"""Deliveries without acknowledgement after which an event may be what kills the processes that handle it."""

SUSPECT_QUIET = 0.25
"""Seconds after the last suspect arrived until one is handled: to begin with the last, all of them must be there."""

RETURN_PATIENCE = 600.0
"""Seconds beyond its delay for which an event is waited for that was sent to a retry queue. Somebody may have deleted
it there, and those behind it must not wait for ever."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One delivery of an event.

    Attributes:
        tag: names this delivery; no other one has it.
        id: names the event.
        key: its lane; empty for a lane of its own.
        deliveries: how often it was delivered before without being acknowledged.
    """

    tag: int
    id: str
    key: str = ""
    deliveries: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """Call the handler; then tell `Lanes.finished` or `Lanes.postponed`."""

    delivery: Delivery


@dataclass(frozen=True, slots=True)
class Defer:
    """Send it to the retry queue of this level, behind the event that holds its lane; its attempts do not change."""

    delivery: Delivery
    level: int


@dataclass(slots=True)
class _Lane:
    waiting: deque[Delivery] = field(default_factory=deque)
    running: int = 0
    away: OrderedDict[str, tuple[int, float]] = field(default_factory=OrderedDict)
    """Events of the lane in retry queues, in their order: level, and until when they are waited for."""

    def level_before(self, id: str) -> int:
        """Level of the one that an event follows: by the same queue it comes back right behind it."""
        found = 0
        for other, (level, _) in self.away.items():
            if other == id:
                break
            found = level
        return found

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.away)


class Lanes:
    """Decides for one consumer of a group.

    Args:
        concurrency: handlers at once, 1 at least.
        delays: seconds of each retry level.
        ordered: whether keys have lanes; otherwise every event has its own.
        rng: whom to suspect first.

    Attributes:
        concurrency: may be changed at any time; handlers that run go on.
    """

    def __init__(self, concurrency: int, delays: tuple[float, ...], rng: Random, *, ordered: bool = True) -> None:
        self.concurrency = concurrency
        self._delays = delays
        self._ordered = ordered
        self._rng = rng
        self._lanes: dict[str, _Lane] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()
        """Lanes with something at the head that may go on, in the order in which they became so."""
        self._quiet_from = 0.0
        self._suspects: dict[str, None] = {}
        """Of those the ones whose head is suspected."""
        self._running = 0
        self._alone = False

    @property
    def running(self) -> int:
        """Handlers that run."""
        return self._running

    @property
    def waiting(self) -> int:
        """Deliveries that no handler was called for yet."""
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def arrived(self, delivery: Delivery, now: float) -> float:
        """The broker delivered an event. Returns how long it may take, seconds, until `next` has something to do."""
        name = self._name(delivery)
        lane = self._lanes.setdefault(name, _Lane())
        lane.waiting.append(delivery)
        self._offer(name, lane)
        if delivery.deliveries < SUSPECT_AFTER:
            return 0.0
        self._quiet_from = now + SUSPECT_QUIET
        return SUSPECT_QUIET

    def next(self, now: float) -> Iterator[Run | Defer]:
        """What to do now, in this order."""
        while self._ready:
            if self._alone or self._running >= self.concurrency:
                deferring = next((name for name in self._ready if self._defers(self._lanes[name], now)), None)
                if deferring is None:
                    return
                name = deferring
            elif self._suspects:
                if self._running or now < self._quiet_from:
                    return
                name = self._suspect()
            else:
                name = next(iter(self._ready))
            yield self._take(name, now)

    def finished(self, delivery: Delivery) -> None:
        """It was handled and acknowledged, or is dead, or its connection is gone: its lane goes on."""
        self._ended(delivery, None, 0.0)

    def postponed(self, delivery: Delivery, level: int, now: float) -> None:
        """It failed and waits in a retry queue: its lane waits for it."""
        self._ended(delivery, level, now)

    def reset(self) -> list[Delivery]:
        """The connection is gone: what waits will be delivered again, perhaps to somebody else. Handlers run on.

        Returns:
            The deliveries that nothing was done with.
        """
        dropped: list[Delivery] = []
        for name, lane in list(self._lanes.items()):
            dropped += lane.waiting
            lane.waiting.clear()
            lane.away.clear()
            self._withdraw(name)
            if lane.idle:
                del self._lanes[name]
        return dropped

    def _name(self, delivery: Delivery) -> str:
        if self._ordered and delivery.key:
            return f"key {delivery.key}"
        return f"event {delivery.id or delivery.tag}"  # what is delivered twice is not handled twice at once

    def _offer(self, name: str, lane: _Lane) -> None:
        if lane.waiting and not lane.running:
            self._ready[name] = None
            if lane.waiting[0].deliveries >= SUSPECT_AFTER:
                self._suspects[name] = None

    def _suspect(self) -> str:
        """The lane whose suspected head is next, alone.

        A process that dies of one of them comes back to the same ones, each delivered once more. By beginning with the
        last, then the first, then anywhere, it gets the innocent on both sides of the guilty one through.
        """
        names = list(self._suspects)
        turn = max(self._lanes[name].waiting[0].deliveries for name in names) - SUSPECT_AFTER
        return (names[-1], names[0], self._rng.choice(names))[turn % 3]

    def _withdraw(self, name: str) -> None:
        self._ready.pop(name, None)
        self._suspects.pop(name, None)

    def _defers(self, lane: _Lane, now: float) -> bool:
        """Whether the head has to wait behind others that are away."""
        while lane.away:
            first, (_, until) = next(iter(lane.away.items()))
            if until >= now:
                return first != lane.waiting[0].id
            del lane.away[first]
        return False

    def _take(self, name: str, now: float) -> Run | Defer:
        lane = self._lanes[name]
        if self._defers(lane, now):
            delivery = lane.waiting.popleft()
            level = lane.level_before(delivery.id)
            lane.away[delivery.id] = (level, now + self._delays[level] + RETURN_PATIENCE)
            self._withdraw(name)
            self._offer(name, lane)
            return Defer(delivery, level)
        delivery = lane.waiting.popleft()
        self._alone = name in self._suspects
        self._withdraw(name)
        lane.running = 1
        self._running += 1
        return Run(delivery)

    def _ended(self, delivery: Delivery, level: int | None, now: float) -> None:
        name = self._name(delivery)
        lane = self._lanes[name]
        lane.running = 0
        self._running -= 1
        self._alone = False
        lane.away.pop(delivery.id, None)
        if level is not None and self._ordered and delivery.key:
            lane.away[delivery.id] = (level, now + self._delays[level] + RETURN_PATIENCE)
            lane.away.move_to_end(delivery.id, last=False)
        self._offer(name, lane)
        if lane.idle:
            del self._lanes[name]
