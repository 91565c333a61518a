"""Which traces stay when there is no room for all: those with errors, the slow ones, and the last of the others.

Decided at the end ("tail-based"): not when a trace begins, nor when its spans come, but when it would have to go, for
by then it is complete.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict

from control_plane.traces.trace import Reason, Trace

SHARES = {Reason.ERROR: 0.5, Reason.SLOW: 0.25}
"""Of what is kept of a service, how much of it may be traces with errors and slow ones while there are others to keep:
these so have a quarter."""

SLOW_QUANTILE = 0.95
"""A trace is slow that takes longer than this share of the last ones with the same entry."""
WINDOW, LEAST = 100, 20
"""Durations of an entry that are remembered, and with how many of them it can be said what slow is."""
MAX_ENTRIES = 200
"""Entries whose durations are remembered; past that the one that was seen longest ago is forgotten. All take 1 MiB
at most, beside what the store counts."""


class Durations:
    """How long traces take, by the service and method of their entry."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str], tuple[list[int], list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def judge(self, trace: Trace) -> bool:
        """Whether the trace was slow, by those before it; from now on it is one of them."""
        entry = trace.entry.service, trace.entry.method
        if entry not in self._entries and len(self._entries) >= MAX_ENTRIES:
            self._entries.popitem(last=False)
        recent, ranked = self._entries.setdefault(entry, ([], []))
        self._entries.move_to_end(entry)
        slow = len(ranked) >= LEAST and trace.duration > ranked[int(len(ranked) * SLOW_QUANTILE) - 1]
        if len(recent) == WINDOW:
            del ranked[bisect_left(ranked, recent.pop(0))]
        recent.append(trace.duration)
        insort(ranked, trace.duration)
        return slow


class Kept:
    """All traces that are kept, by the service that reported them and by reason, the oldest first.

    Attributes:
        cost: bytes of all.
    """

    def __init__(self) -> None:
        self._reporters: dict[str, dict[Reason, _Traces]] = {}
        self._costs: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self.cost = 0

    def count(self, reason: Reason) -> int:
        """How many are kept for this."""
        return sum(len(traces[reason]) for traces in self._reporters.values())

    def add(self, trace: Trace) -> None:
        """Takes a trace in, as the newest."""
        reporter = trace.reporter
        if reporter not in self._reporters:
            self._reporters[reporter] = {reason: _Traces() for reason in Reason}
            self._costs[reporter] = self._counts[reporter] = 0
        self._reporters[reporter][trace.reason][trace.id] = trace
        self._counts[reporter] += 1
        self.grown(trace, trace.cost)

    def grown(self, trace: Trace, cost: int) -> None:
        """One of the traces costs more by this."""
        self._reporters[trace.reporter][trace.reason].cost += cost
        self._costs[trace.reporter] += cost
        self.cost += cost

    def remove(self, trace: Trace) -> None:
        """Gives a trace up."""
        reporter = trace.reporter
        self.grown(trace, -trace.cost)
        del self._reporters[reporter][trace.reason][trace.id]
        self._counts[reporter] -= 1
        if not self._counts[reporter]:
            del self._reporters[reporter], self._costs[reporter], self._counts[reporter]

    def first_to_go(self, *, by_count: bool) -> Trace:
        """The oldest trace, of whoever has most, of the reason that has more than its share of what they have.

        Args:
            by_count: there are too many traces; else they take too much memory.
        """
        totals = self._counts if by_count else self._costs
        most = max(totals, key=totals.__getitem__)
        traces = self._reporters[most]
        measure = len if by_count else _cost
        greedy = (reason for reason, share in SHARES.items() if measure(traces[reason]) > share * totals[most])
        return next(iter(traces[next(greedy, Reason.ORDINARY)].values()))


class _Traces(OrderedDict[str, Trace]):
    cost = 0


def _cost(traces: _Traces) -> int:
    return traces.cost
