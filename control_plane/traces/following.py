"""Which new traces somebody who follows them is told of, and when."""

from __future__ import annotations

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
        self._waiting: dict[str, None] = {}
        self._told: set[str] = set()

    def due(self, now: float) -> tuple[Sequence[Trace], float | None]:
        """The traces to tell now, and in how many seconds to look again; None for at the next change of the store."""
        changed = self._store.changed_since(self._revision)
        self._revision = self._store.revision
        self._waiting.update((trace.id, None) for trace in reversed(changed) if trace.id not in self._told)
        told: list[Trace] = []
        soonest: float | None = None
        for trace_id in list(self._waiting):
            trace = self._store.get(trace_id, now)
            left = 0.0 if trace is None else trace.last_seen - now + (QUIET if trace.complete else QUIET_WITHOUT_ROOT)
            if left > 0.0:
                soonest = left if soonest is None else min(soonest, left)
                continue
            del self._waiting[trace_id]
            if trace is not None and self._wanted.matches(trace):
                self._told.add(trace_id)
                told.append(trace)
        if len(self._told) > len(self._store) + _REMEMBERED:
            self._told = {trace_id for trace_id in self._told if self._store.get(trace_id, now) is not None}
        return told, soonest
