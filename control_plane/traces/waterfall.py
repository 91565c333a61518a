"""A trace as rows to be drawn: which span stands below which, where it begins, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.traces.clocks import corrections
from control_plane.traces.span import Span
from control_plane.traces.tree import Node, assemble, walk


@dataclass(frozen=True, slots=True)
class Row:
    """One span of a waterfall. Times are in nanoseconds.

    Attributes:
        span: the span itself: service, name, status, attributes, events.
        depth: how many spans stand above it, 0 for roots.
        offset: when it begins, from the waterfall's beginning, by the corrected clock.
        correction: what was added to the times of its process.
        orphan: its parent did not come, so it stands at depth 0.
    """

    span: Span
    depth: int
    offset: int
    correction: int = 0
    orphan: bool = False

    @property
    def duration(self) -> int:
        """How long it takes."""
        return self.span.duration


@dataclass(frozen=True, slots=True)
class Waterfall:
    """All rows of a trace, in the order in which they are drawn.

    Attributes:
        start: nanoseconds since 1970, by the clock of the first root's process.
        duration: nanoseconds from the beginning of the first to the end of the last.
        rows: each span after the one above it, siblings by their beginnings.
    """

    start: int
    duration: int
    rows: tuple[Row, ...]

    def event_offset(self, row: Row, time: int) -> int:
        """When an event of a row's span happened, from the beginning, in nanoseconds; may be outside of the waterfall.

        Args:
            row: of this waterfall.
            time: of the event.
        """
        return time + row.correction - self.start

    @property
    def services(self) -> tuple[str, ...]:
        """Those that took part, in the order of their rows."""
        return tuple(dict.fromkeys(row.span.service for row in self.rows))


def waterfall(spans: Iterable[Span]) -> Waterfall:
    """The rows of a trace, of whatever has come of it; none for no spans."""
    roots = assemble(spans)
    if not roots:
        return Waterfall(0, 0, ())
    correction = corrections(roots)

    def beginning(node: Node) -> tuple[int, int, str]:
        start = node.span.start + correction[node.span.process]
        return start, -node.span.end, node.span.span_id

    roots.sort(key=beginning)
    for root in roots:
        for node, _ in walk([root]):
            node.children.sort(key=beginning)
    drawn = list(walk(roots))
    start = min(beginning(node)[0] for node, _ in drawn)
    rows = tuple(
        Row(node.span, depth, beginning(node)[0] - start, correction[node.span.process], node.orphan)
        for node, depth in drawn
    )
    return Waterfall(start, max(row.offset + row.duration for row in rows), rows)
