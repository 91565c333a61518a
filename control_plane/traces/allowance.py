"""How much each reporter may send, so that none fills the store or keeps the control plane busy."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from mesh_client.core.errors import InvalidValueError

_REFUSED = 1 / 8
"""What a span that is refused counts: it had to be read."""
_ROUNDING = 1e-6

MAX_REPORTERS = 10_000
"""Reporters that are remembered: past that, the one that sent something longest ago is forgotten."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So much a second on average, and ``burst`` at once."""

    per_second: float
    burst: int

    def __post_init__(self) -> None:
        if not (self.per_second > 0.0 and self.burst >= 1):
            raise InvalidValueError("traces.rate", (self.per_second, self.burst), "more than 0 a second, and 1 at once")


@dataclass(frozen=True, slots=True)
class ReportLimits:
    """What a reporter, and what all of them together, may send."""

    requests: Rate = Rate(20.0, 60)
    spans: Rate = Rate(1_000.0, 5_000)
    size: Rate = Rate(1024.0 * 1024, 8 * 1024 * 1024)
    """Bytes of requests."""
    all_spans: Rate = Rate(5_000.0, 20_000)
    """Of all reporters: each costs the control plane time."""


class Allowance:
    """A token bucket that can be overdrawn, by what costs something before it is known how much; it begins full.

    Args:
        rate: how it fills.
        now: seconds, monotonic.
    """

    __slots__ = ("_filled_at", "_left", "rate")

    def __init__(self, rate: Rate, now: float) -> None:
        self.rate = rate
        self._left = float(rate.burst)
        self._filled_at = now

    def left(self, now: float) -> int:
        """How much may be used; 0 or less for none."""
        self._left = min(float(self.rate.burst), self._left + (now - self._filled_at) * self.rate.per_second)
        self._filled_at = now
        return math.floor(self._left + _ROUNDING)

    def use(self, amount: float, now: float) -> None:
        """So much has been used, more than was left perhaps; at most ``burst`` is owed."""
        self.left(now)
        self._left = max(self._left - amount, -float(self.rate.burst))


class Reporter:
    """What one reporter may send still.

    Args:
        limits: its limits.
        total: what all reporters together may send of spans.
        now: seconds, monotonic.
    """

    __slots__ = ("_requests", "_size", "_spans", "_total")

    def __init__(self, limits: ReportLimits, total: Allowance, now: float) -> None:
        self._requests = Allowance(limits.requests, now)
        self._spans = Allowance(limits.spans, now)
        self._size = Allowance(limits.size, now)
        self._total = total

    def refusal(self, now: float) -> str:
        """Why its next request is refused before it is read, in words; empty when it is not. It counts if it is not."""
        if self._requests.left(now) < 1:
            return f"more than {self._requests.rate.per_second:g} requests a second; send more spans in each"
        if self._size.left(now) < 1:
            return f"more than {self._size.rate.per_second / 1024:g} KiB a second; record less, or sample"
        if self._spans.left(now) < 1:
            return f"more than {self._spans.rate.per_second:g} spans a second; sample"
        if self._total.left(now) < 1:
            return f"more than {self._total.rate.per_second:g} spans a second from all together; sample"
        self._requests.use(1, now)
        return ""

    def read(self, size: int, now: float) -> None:
        """A request of so many bytes has been read."""
        self._size.use(size, now)

    def grant(self, spans: int, others: int, now: float) -> int:
        """How many of the spans of a request may be taken in.

        Args:
            spans: how many it has.
            others: parts beside spans that it is made of: each costs as much as a span.
            now: seconds, monotonic.
        """
        granted = max(min(spans, self._spans.left(now), self._total.left(now)), 0)
        used = granted + others + (spans - granted) * _REFUSED
        self._spans.use(used, now)
        self._total.use(used, now)
        return granted


class Reporters:
    """Everybody who sends spans.

    Args:
        limits: of each, and of all.
    """

    def __init__(self, limits: ReportLimits) -> None:
        self._limits = limits
        self._total: Allowance | None = None
        self._reporters: OrderedDict[str, Reporter] = OrderedDict()

    def reporter(self, name: str, now: float) -> Reporter:
        """The one who is named so, by workload or address."""
        self._total = self._total or Allowance(self._limits.all_spans, now)
        reporter = self._reporters.get(name)
        if reporter is None:
            reporter = self._reporters[name] = Reporter(self._limits, self._total, now)
            if len(self._reporters) > MAX_REPORTERS:
                self._reporters.popitem(last=False)
        else:
            self._reporters.move_to_end(name)
        return reporter
