"""The last traces, in bounded memory."""

from __future__ import annotations

import enum
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from control_plane.traces.query import TraceFilter
from control_plane.traces.retention import Durations, Kept
from control_plane.traces.span import Span
from control_plane.traces.trace import Reason, Trace
from mesh_client.core.errors import InvalidValueError


@dataclass(frozen=True, slots=True)
class TraceLimits:
    """What a store may hold.

    Raises:
        InvalidValueError: a limit is out of its range.
    """

    max_bytes: int = 64 * 1024 * 1024
    """Of memory, as `Span.cost` counts it. 1 MiB to 64 GiB."""
    max_traces: int = 20_000
    """1 to 1000000."""
    max_spans: int = 1_000
    """Of one trace. 1 to 100000."""
    max_trace_bytes: int = 1024 * 1024
    """Of one trace. 64 KiB to ``max_bytes``."""
    max_age: float = 3_600.0
    """Seconds from a trace's last span to its end here. Above 0."""

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("max_bytes", self.max_bytes, 1024 * 1024, 64 * 1024**3),
            ("max_traces", self.max_traces, 1, 1_000_000),
            ("max_spans", self.max_spans, 1, 100_000),
            ("max_trace_bytes", self.max_trace_bytes, 64 * 1024, self.max_bytes),
        ):
            if not least <= value <= most:
                raise InvalidValueError(f"traces.{name}", value, f"{least} to {most}")
        if not self.max_age > 0.0:
            raise InvalidValueError("traces.max_age", self.max_age, "seconds, more than 0")


class Added(enum.Enum):
    """What became of a span."""

    KEPT = "kept"
    DUPLICATE = "duplicate"
    """It is there already."""
    TRACE_FULL = "trace full"
    """Its trace has as many spans, or bytes, as one may have."""


class TraceStore:
    """Spans, grouped by trace.

    Whatever is added, it holds no more than its limits. What has to go is the oldest trace of the service that takes
    most: of those with errors, or of the slow ones, if they have more than their share (`retention.SHARES`), else of
    the ordinary ones. An ordinary trace that would have to go and was slow is kept for that instead.

    Args:
        limits: what it may hold.

    Attributes:
        counts: spans, by what became of them (`Added`).
        evicted: traces that made room for others, by what they were kept for.
        expired: traces that became too old.
        revision: grows with each span that is kept.
    """

    def __init__(self, limits: TraceLimits | None = None) -> None:
        self.limits = limits or TraceLimits()
        self.counts: Counter[Added] = Counter()
        self.evicted: Counter[Reason] = Counter()
        self.expired = 0
        self.revision = 0
        self._traces: dict[str, Trace] = {}
        self._by_change: OrderedDict[str, Trace] = OrderedDict()
        self._kept = Kept()
        self._durations = Durations()
        self._spans = 0

    def __len__(self) -> int:
        return len(self._traces)

    @property
    def spans(self) -> int:
        """Spans of all traces."""
        return self._spans

    @property
    def cost(self) -> int:
        """Bytes, some; at most ``limits.max_bytes``."""
        return self._kept.cost

    def kept_for(self, reason: Reason) -> int:
        """How many traces are kept for this."""
        return self._kept.count(reason)

    def add(self, trace_id: str, span: Span, now: float) -> Added:
        """Takes a span in, and gives up what there is no room for any more.

        Args:
            trace_id: of the span, 32 lower-case hex digits.
            span: it.
            now: seconds, monotonic.
        """
        self.expire(now)
        trace = self._traces.get(trace_id)
        if trace is not None and span in trace:
            self.counts[Added.DUPLICATE] += 1
            return Added.DUPLICATE
        new = trace is None
        trace = trace or Trace(trace_id, span, now)
        cost = trace.cost_of(span)
        if len(trace) >= self.limits.max_spans or trace.cost + cost > self.limits.max_trace_bytes:
            trace.refused += 1
            self.counts[Added.TRACE_FULL] += 1
            return Added.TRACE_FULL
        if new:
            self._traces[trace_id] = self._by_change[trace_id] = trace
            self._kept.add(trace)
        self.revision += 1
        trace.add(span, cost, now, self.revision)
        self._kept.grown(trace, cost)
        self._by_change.move_to_end(trace_id)
        self._spans += 1
        if span.failed and trace.reason is not Reason.ERROR:
            self._keep_for(trace, Reason.ERROR)
        self._make_room()
        self.counts[Added.KEPT] += 1
        return Added.KEPT

    def expire(self, now: float) -> None:
        """Gives up what has become too old."""
        oldest = now - self.limits.max_age
        while self._by_change:
            trace = next(iter(self._by_change.values()))
            if trace.last_seen >= oldest:
                return
            self._give_up(trace)
            self.expired += 1

    # -- queries

    def get(self, trace_id: str, now: float) -> Trace | None:
        """The trace with this id; None if it is not, or no longer, here."""
        self.expire(now)
        return self._traces.get(trace_id)

    def find(self, prefix: str, now: float) -> Sequence[Trace]:
        """The traces whose ids begin so, newest first."""
        self.expire(now)
        exact = self._traces.get(prefix)
        if exact is not None:
            return (exact,)
        return tuple(trace for trace in reversed(self._traces.values()) if trace.id.startswith(prefix))

    def newest(self, now: float) -> Iterator[Trace]:
        """All traces, by when their first span came, newest first. To be used up before anything is added."""
        self.expire(now)
        return reversed(self._traces.values())

    def latest(self, limit: int, now: float, wanted: TraceFilter | None = None) -> Sequence[Trace]:
        """The last traces, or the last that are wanted, newest first."""
        found = self.newest(now) if wanted is None else filter(wanted.matches, self.newest(now))
        return tuple(itertools.islice(found, limit))

    def changed_since(self, revision: int) -> Sequence[Trace]:
        """The traces that got spans after this revision, the one that changed last first."""
        changed = itertools.takewhile(lambda trace: trace.revision > revision, reversed(self._by_change.values()))
        return tuple(changed)

    # -- room

    def _make_room(self) -> None:
        limits = self.limits
        while (large := self.cost > limits.max_bytes) or len(self) > limits.max_traces:
            trace = self._kept.first_to_go(by_count=not large)
            if trace.reason is Reason.ORDINARY and self._durations.judge(trace):
                self._keep_for(trace, Reason.SLOW)
            else:
                self._give_up(trace)
                self.evicted[trace.reason] += 1

    def _keep_for(self, trace: Trace, reason: Reason) -> None:
        self._kept.remove(trace)
        trace.reason = reason
        self._kept.add(trace)

    def _give_up(self, trace: Trace) -> None:
        self._kept.remove(trace)
        del self._traces[trace.id], self._by_change[trace.id]
        self._spans -= len(trace)
