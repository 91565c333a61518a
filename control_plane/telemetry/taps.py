"""Who wants to see which calls, whom to ask for them, and what was shown. Pure."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from mesh_client.core.errors import InvalidValueError, MeshError
from mesh_client.core.model import StatusCode
from mesh_client.core.tap import TapOrder, TappedCall

MAX_TAPS = 20
"""At once, of all operators."""
MAX_RATE = 1000.0
"""Calls a second that one tap can ask for, and the number that it gets without asking."""
DEFAULT_RATE = 50.0
MAX_DURATION = 3600.0
RENEWAL = 30.0
"""Seconds for which processes show calls without being asked again: a control plane that dies leaves no tap running."""
MAX_HELD = 1000
"""Calls that wait for a slow operator; the oldest ones go."""


class TooManyTapsError(MeshError):
    """As many operators look at calls as may."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One call that was shown: when it ended, and who made it."""

    at: float
    caller: str
    node_id: str
    service: str
    call: TappedCall


@dataclass(eq=False, slots=True)
class OpenTap:
    """What one operator looks at.

    Attributes:
        service: the service called.
        caller: the service that calls; None for any.
        order: which of its calls.
        held: calls that were shown, and not taken yet.
        dropped: calls that were not, because there were too many.
    """

    service: str
    caller: str | None
    order: TapOrder
    held: deque[Shown] = field(default_factory=deque)
    dropped: int = 0

    def take(self) -> tuple[list[Shown], int]:
        """The calls since the last time, and how many were dropped."""
        held, dropped = list(self.held), self.dropped
        self.held.clear()
        self.dropped = 0
        return held, dropped


class Taps:
    """Everything that is looked at now."""

    def __init__(self) -> None:
        self._taps: dict[int, OpenTap] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._taps)

    def open(
        self,
        service: str,
        now: float,
        *,
        method: str = "*",
        codes: Collection[str] = (),
        slower_than: float = 0.0,
        caller: str | None = None,
        rate: float = DEFAULT_RATE,
        duration: float = 60.0,
    ) -> OpenTap:
        """Begins to look.

        Args:
            service: whose calls.
            now: seconds.
            method: pattern as in a policy.
            codes: names of statuses; none for any.
            slower_than: seconds that a call takes at least.
            caller: calls of this service alone.
            rate: calls a second at most, of each process.
            duration: seconds.

        Raises:
            InvalidValueError: an argument is outside its range.
            TooManyTapsError: there are `MAX_TAPS`.
        """
        if not 0.0 < rate <= MAX_RATE:
            raise InvalidValueError("rate", rate, f"above 0, at most {MAX_RATE:.0f}")
        if not 0.0 < duration <= MAX_DURATION:
            raise InvalidValueError("duration", duration, f"above 0 s, at most {MAX_DURATION:.0f} s")
        if not 0.0 <= slower_than <= MAX_DURATION:
            raise InvalidValueError("slower_than", slower_than, f"0 s to {MAX_DURATION:.0f} s")
        for code in codes:
            if code not in StatusCode.__members__:
                raise InvalidValueError("codes", code, "gRPC status codes")
        if len(self._taps) >= MAX_TAPS:
            raise TooManyTapsError(f"{MAX_TAPS} taps are open already; wait until one ends")
        order = TapOrder(next(self._numbers), method, frozenset(codes), slower_than, rate, now + duration)
        tap = self._taps[order.id] = OpenTap(service, caller, order)
        return tap

    def close(self, tap: OpenTap) -> None:
        """Nobody looks any more."""
        self._taps.pop(tap.order.id, None)

    def expire(self, now: float) -> bool:
        """Forgets taps that have ended; whether there were any."""
        ended = [tap for tap in self._taps.values() if tap.order.until <= now]
        for tap in ended:
            self.close(tap)
        return bool(ended)

    def orders(self, caller: str, now: float) -> list[tuple[str, TapOrder, float]]:
        """What processes of a service are to show: service called, order, and for how many seconds from now."""
        return [
            (tap.service, tap.order, min(RENEWAL, tap.order.until - now))
            for tap in self._taps.values()
            if tap.caller in (None, caller) and now < tap.order.until
        ]

    def shown(self, caller: str, node_id: str, calls: Iterable[tuple[int, str, TappedCall]], dropped: int = 0) -> None:
        """A process showed calls, each for one tap, and dropped some. What a tap did not ask for is left out."""
        if dropped:
            for tap in self._taps.values():
                if tap.caller in (None, caller):
                    tap.dropped += dropped
        for number, service, call in calls:
            wanted = self._taps.get(number)
            if wanted is None or wanted.service != service or wanted.caller not in (None, caller):
                continue
            if wanted.order.wants(call):
                if len(wanted.held) >= MAX_HELD:
                    wanted.held.popleft()
                    wanted.dropped += 1
                wanted.held.append(Shown(call.at, caller, node_id, service, call))
