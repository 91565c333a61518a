"""One trace of the store, of whatever has come of it so far."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence

from control_plane.traces.span import Span

TRACE_COST, SPAN_SLOT = 1280, 120
"""Bytes that the store holds for a trace beside its spans, and for each span beside the span itself."""


class Reason(enum.Enum):
    """What a trace is kept for."""

    ORDINARY = "ordinary"
    SLOW = "slow"
    ERROR = "error"


class Trace:
    """A trace. The store alone changes it.

    Attributes:
        id: 32 lower-case hex digits.
        reporter: the service whose span came first.
        first_seen: when its first span came, in seconds by the store's clock.
        last_seen: when its last span came.
        revision: grows with each span; of all traces of a store, the one that changed last has the highest.
        reason: what it is kept for.
        cost: bytes, some.
        errors: spans that failed.
        refused: spans that were too many or too large for it.
    """

    __slots__ = (
        "_longest",
        "_processes",
        "_root",
        "_services",
        "_spans",
        "cost",
        "errors",
        "first_seen",
        "id",
        "last_seen",
        "reason",
        "refused",
        "reporter",
        "revision",
    )

    def __init__(self, id: str, first: Span, now: float) -> None:
        self.id = id
        self.reporter = first.service if first.process.verified else ""
        self.first_seen = self.last_seen = now
        self.revision = 0
        self.reason = Reason.ORDINARY
        self.cost = TRACE_COST
        self.errors = 0
        self.refused = 0
        self._spans: dict[tuple[str, bool, str], Span] = {}
        self._processes: set[int] = set()
        self._services: Counter[str] = Counter()
        self._root: Span | None = None
        self._longest = first

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, span: Span) -> bool:
        return _key(span) in self._spans

    @property
    def spans(self) -> Sequence[Span]:
        """Its spans, in the order in which they came."""
        return tuple(self._spans.values())

    @property
    def services(self) -> tuple[str, ...]:
        """Those that have spans in it, by name."""
        return tuple(sorted(self._services))

    @property
    def entry(self) -> Span:
        """What the trace is about: its longest span without a parent; the longest of all while there is none."""
        return self._root or self._longest

    @property
    def complete(self) -> bool:
        """Whether its root has come. Others may be missing still: nobody knows how many there are."""
        return self._root is not None

    @property
    def duration(self) -> int:
        """How long its entry took, in nanoseconds."""
        return self.entry.duration

    def has_service(self, service: str) -> bool:
        """Whether the service has a span in it."""
        return service in self._services

    def cost_of(self, span: Span) -> int:
        """Bytes that the span would add."""
        process = 0 if id(span.process) in self._processes else span.process.cost
        return SPAN_SLOT + span.cost + process

    def add(self, span: Span, cost: int, now: float, revision: int) -> None:
        """Takes a span in that it does not contain, whose cost is ``cost_of(span)``."""
        self._spans[_key(span)] = span
        self._processes.add(id(span.process))  # equal ones that are other objects take memory too
        self._services[span.service] += 1
        self.cost += cost
        self.errors += span.failed
        self.last_seen = now
        self.revision = revision
        if span.duration > self._longest.duration:
            self._longest = span
        if not span.parent_id and (self._root is None or span.duration > self._root.duration):
            self._root = span


def _key(span: Span) -> tuple[str, bool, str]:
    # Who made it belongs to it: otherwise a service that knows the id of another's span could send one in its place.
    return span.service, span.process.verified, span.span_id
