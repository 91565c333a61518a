"""Single calls shown to an operator who asked for them: which ones, at most how many, and for how long.

A service that nobody taps is not slowed: while somebody does, its calls take the long way, by `Call`, which tells the
tap how each ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from mesh_client.core.policy import method_matches
from mesh_client.core.rate_limit import TokenBucket

MAX_HELD = 200
"""Tapped calls of one service that are held until they are reported; further ones are dropped, and counted."""


@dataclass(frozen=True, slots=True)
class TapOrder:
    """What somebody wants to see of the calls to one service.

    Attributes:
        id: of the order, unique.
        method: pattern as in a policy.
        codes: names of statuses; empty for any.
        slower_than: seconds that a call must take at least.
        rate: calls a second at most, above 0.
        until: when it ends by itself.
    """

    id: int
    method: str
    codes: frozenset[str]
    slower_than: float
    rate: float
    until: float

    def wants(self, call: TappedCall) -> bool:
        """Whether the call is one of those."""
        return (
            call.took >= self.slower_than
            and (not self.codes or call.code in self.codes)
            and method_matches(self.method, call.method)
        )


@dataclass(frozen=True, slots=True)
class TappedCall:
    """One call, when it was over.

    Attributes:
        method: full name with leading slash.
        code: name of its status.
        took: seconds, all attempts together.
        attempts: how many there were.
        endpoint_id: of the last one; empty without any.
        details: the message of the last attempt that failed.
        trace_id: of the trace that is kept of it, or empty.
        at: when it ended, seconds.
    """

    method: str
    code: str
    took: float
    attempts: int
    endpoint_id: str
    details: str
    trace_id: str
    at: float


class ServiceTap:
    """The orders for the calls to one service, and the calls that were picked for them."""

    def __init__(self) -> None:
        self._orders: dict[int, tuple[TapOrder, TokenBucket]] = {}
        self._held: deque[tuple[int, TappedCall]] = deque()
        self.dropped = 0
        """Calls that were wanted, and not held because there were too many."""

    def __bool__(self) -> bool:
        """Whether there is an order."""
        return bool(self._orders)

    def order(self, orders: Iterable[TapOrder], now: float) -> None:
        """These are the orders now, in place of those before; what an order has used up of its rate stays used."""
        before = self._orders
        self._orders = {}
        for order in orders:
            if now < order.until:
                known = before.get(order.id)
                bucket = TokenBucket(order.rate, max(1, int(order.rate)), now) if known is None else known[1]
                self._orders[order.id] = (order, bucket)

    def ended(self, call: TappedCall) -> None:
        """A call to the service ended: it is held for every order that wants it."""
        for order, bucket in self._orders.values():
            if call.at >= order.until or not order.wants(call):
                continue
            if len(self._held) >= MAX_HELD or bucket.take(call.at):
                self.dropped += 1
            else:
                self._held.append((order.id, call))

    def take(self) -> list[tuple[int, TappedCall]]:
        """The calls held since the last time, each with the id of the order that wanted it."""
        held, self._held = list(self._held), deque()
        return held
