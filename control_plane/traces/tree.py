"""Which span belongs below which: the tree of a trace, of whatever has come of it so far.

Spans come in any order, some twice, some never. The parents that spans name may be missing, may be themselves, or may
name each other in a ring; two spans of different services may carry the same id. Each span is in the tree once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from control_plane.traces.span import Kind, Span

_CALLED = frozenset({Kind.SERVER, Kind.CONSUMER})
"""What has its parent in another process, mostly."""


@dataclass(eq=False, slots=True)
class Node:
    """A span with those below it, by their beginnings.

    Attributes:
        span: the span.
        parent: the one above; None for a root.
        children: those below.
        orphan: a root whose parent did not come.
    """

    span: Span
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    orphan: bool = False


def assemble(spans: Iterable[Span]) -> list[Node]:
    """The roots of the trees that the spans make: those without a parent first, then orphans, each by their beginnings.

    Args:
        spans: of one trace; what comes twice, by service and span id, counts once.
    """
    nodes = [Node(span) for span in _distinct(spans)]
    by_id: defaultdict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        by_id[node.span.span_id].append(node)
    for node in nodes:
        if node.span.parent_id:
            node.parent = _parent(node, by_id.get(node.span.parent_id, ()))
            node.orphan = node.parent is None
    _cut_rings(nodes)
    for node in nodes:
        if node.parent is not None:
            node.parent.children.append(node)
    return [node for node in nodes if node.parent is None]


def walk(roots: Iterable[Node]) -> Iterator[tuple[Node, int]]:
    """Every node with its depth, each before those below it. A trace may be deeper than Python's stack."""
    waiting = [(root, 0) for root in reversed(list(roots))]
    while waiting:
        node, depth = waiting.pop()
        yield node, depth
        waiting += [(child, depth + 1) for child in reversed(node.children)]


def _distinct(spans: Iterable[Span]) -> list[Span]:
    found: dict[tuple[str, bool, str], Span] = {}
    for span in spans:
        found.setdefault((span.service, span.process.verified, span.span_id), span)
    return sorted(found.values(), key=lambda span: (bool(span.parent_id), span.start, -span.end, span.span_id))


def _parent(node: Node, candidates: Iterable[Node]) -> Node | None:
    """Of several spans with the id, one of another service for what was called, one of the same for the rest."""
    elsewhere = node.span.kind in _CALLED
    others = [other for other in candidates if other is not node]
    return min(others, key=lambda other: (other.span.service != node.span.service) is not elsewhere, default=None)


def _cut_rings(nodes: Sequence[Node]) -> None:
    """Makes an orphan of the first node of each ring."""
    order = {node: number for number, node in enumerate(nodes)}
    safe: set[Node] = set()
    for node in nodes:
        path: dict[Node, None] = {}
        above: Node | None = node
        while above is not None and above not in safe and above not in path:
            path[above] = None
            above = above.parent
        if above in path:
            climbed = list(path)
            first = min(climbed[climbed.index(above) :], key=order.__getitem__)
            first.parent, first.orphan = None, True
        safe |= path.keys()
