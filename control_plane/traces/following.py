"""Which new traces somebody who follows them is told of, and when."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from control_plane.traces.query import TraceFilter
from control_plane.traces.store import TraceStore
from control_plane.traces.trace import Trace

QUIET = 2.0
"""Seconds after a trace's last span for which more are waited for once its root is there: processes send their spans
every second or so."""
QUIET_WITHOUT_ROOT = 10.0
"""The same while the root is missing."""

_REMEMBERED = 1_000
"""Traces that were told and are not in the store any more."""


class Following:
    """One follower, who is told of each trace once, when it seems to be complete. Holds ids alone, and no traces.

    Args:
        store: of the traces; those that are there already are not told.
        wanted: which are told.
    """

    def __init__(self, store: TraceStore, wanted: TraceFilter) -> None:
        self._store = store
        self._wanted = wanted
        self._revision = store.revision
        self._waiting: set[str] = set()
        self._looks: list[tuple[float, str]] = []
        """A heap of when to look at those that are waited for."""
        self._told: set[str] = set()

    def due(self, now: float) -> tuple[Sequence[Trace], float | None]:
        """The traces to tell now, and in how many seconds to look again; None for at the next change of the store."""
        for trace in reversed(self._store.changed_since(self._revision)):
            if trace.id not in self._waiting and trace.id not in self._told:
                self._waiting.add(trace.id)
                heapq.heappush(self._looks, (trace.last_seen + QUIET, trace.id))
        self._revision = self._store.revision
        told: list[Trace] = []
        while self._looks and self._looks[0][0] <= now:
            _, trace_id = heapq.heappop(self._looks)
            found = self._store.get(trace_id, now)
            if found is not None:
                again = found.last_seen + (QUIET if found.complete else QUIET_WITHOUT_ROOT)
                if again > now:
                    heapq.heappush(self._looks, (again, trace_id))
                    continue
            self._waiting.discard(trace_id)
            if found is not None and self._wanted.matches(found):
                self._told.add(trace_id)
                told.append(found)
        if len(self._told) > len(self._store) + _REMEMBERED:
            self._told = {trace_id for trace_id in self._told if self._store.get(trace_id, now) is not None}
        return told, self._looks[0][0] - now if self._looks else None
