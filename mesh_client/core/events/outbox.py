"""Which events of an outbox are sent now: in order by key, a bounded number at once, and those nobody takes later.

An outbox is a table whose rows have growing numbers. Events leave it when the broker has confirmed them. Of one key one
event is on its way at a time: the next one follows when it is confirmed, whatever happens to the first.

Two relays on one outbox, one of which was frozen say, send events twice. Each sends them in order, so that the first
arrivals of each are in order too.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mesh_client.core.errors import InvalidTransitionError

RETURN_DELAYS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds until an event is sent again that came back: nobody is subscribed to it, or the broker could not store it."""


@dataclass(slots=True)
class _Event:
    number: int
    key: str
    state: str = "waiting"
    returns: int = 0


class OutboxRelay:
    """Decides for one relay.

    Args:
        window: events on their way at once, 1 at least; may be changed.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._events: dict[int, _Event] = {}
        self._keys: dict[str, deque[int]] = {}
        """Unsettled events of each key, in order. Those without a key are in none."""
        self._ready: list[int] = []
        """Heap of those that may be sent."""
        self._held: list[tuple[float, int]] = []
        """Heap of those that came back, by when they are sent again."""
        self._in_flight = 0
        self._last = 0

    @property
    def last(self) -> int:
        """The highest number that is known; further ones are to be read from the table."""
        return self._last

    @property
    def known(self) -> int:
        """Events that are known and not settled."""
        return len(self._events)

    @property
    def in_flight(self) -> int:
        """Events on their way."""
        return self._in_flight

    @property
    def held(self) -> int:
        """Events that came back and wait."""
        return len(self._held)

    @property
    def idle(self) -> int:
        """Events that could be sent if the window let them, or are on their way: what is worth to be known."""
        return len(self._ready) + self._in_flight

    @property
    def next_due(self) -> float | None:
        """When the next one of those that came back is sent again; None for never."""
        return self._held[0][0] if self._held else None

    def learn(self, rows: Iterable[tuple[int, str]]) -> None:
        """Takes further rows in, as number and key, by growing numbers. Those that are known are passed over."""
        for number, key in rows:
            if number in self._events:
                continue
            self._events[number] = _Event(number, key)
            self._last = max(self._last, number)
            if not key:
                heapq.heappush(self._ready, number)
                continue
            line = self._keys.setdefault(key, deque())
            line.append(number)
            if len(line) == 1:
                heapq.heappush(self._ready, number)

    def take(self, now: float) -> Iterator[int]:
        """The events to send now, in this order."""
        while self._held and self._held[0][0] <= now:
            _, number = heapq.heappop(self._held)
            self._events[number].state = "waiting"
            heapq.heappush(self._ready, number)
        while self._ready and self._in_flight < self.window:
            number = heapq.heappop(self._ready)
            self._events[number].state = "sent"
            self._in_flight += 1
            yield number

    def settled(self, number: int) -> None:
        """The broker has confirmed it, or it was put aside for good: the next of its key may follow.

        Raises:
            InvalidTransitionError: it is not on its way.
        """
        event = self._sent(number)
        self._in_flight -= 1
        del self._events[number]
        if event.key:
            line = self._keys[event.key]
            line.popleft()
            if line:
                heapq.heappush(self._ready, line[0])
            else:
                del self._keys[event.key]

    def returned(self, number: int, now: float) -> float:
        """It came back. It is sent again after a growing delay, and those of its key wait behind it.

        Returns:
            The delay in seconds.

        Raises:
            InvalidTransitionError: it is not on its way.
        """
        event = self._sent(number)
        self._in_flight -= 1
        delay = RETURN_DELAYS[min(event.returns, len(RETURN_DELAYS) - 1)]
        event.returns += 1
        event.state = "held"
        heapq.heappush(self._held, (now + delay, number))
        return delay

    def lost(self) -> None:
        """The connection is gone: whatever is on its way may have arrived or not, and is sent again."""
        for number, event in self._events.items():
            if event.state == "sent":
                event.state = "waiting"
                heapq.heappush(self._ready, number)
        self._in_flight = 0

    def _sent(self, number: int) -> _Event:
        event = self._events.get(number)
        if event is None or event.state != "sent":
            raise InvalidTransitionError(f"event {number} is not on its way")
        return event
