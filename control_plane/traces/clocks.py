"""How far the clocks of processes are off, as far as a trace shows it.

Nothing that is caused begins before its cause, and a server has answered before its caller has the answer. So each call
from one process to another bounds by how much their clocks differ, as a pair of time stamps does in NTP (RFC 5905,
section 8). Where the clocks may be right, they are believed.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence

from control_plane.traces.span import Kind, Process
from control_plane.traces.tree import Node, walk


def corrections(roots: Sequence[Node]) -> dict[Process, int]:
    """What to add to the times of each process, in nanoseconds; 0 for the process of the first root.

    Args:
        roots: of the trace's trees, as `assemble` gives them.
    """
    calls: defaultdict[Process, list[tuple[Node, Node]]] = defaultdict(list)
    for node, _ in walk(roots):
        if node.parent is not None and node.parent.span.process != node.span.process:
            calls[node.span.process].append((node.parent, node))
    found: dict[Process, int] = {}
    for root in roots:
        waiting = deque([root])
        while waiting:
            node = waiting.popleft()
            process = node.span.process
            if process not in found:
                found[process] = _correction(calls[process], found)
            waiting += node.children
    return found


def _correction(calls: Iterable[tuple[Node, Node]], found: Mapping[Process, int]) -> int:
    """Of a process that others called, whose own corrections are known; calls by others say nothing."""
    least, most = -math.inf, math.inf
    for caller, called in calls:
        known = found.get(caller.span.process)
        if known is None:
            continue
        least = max(least, caller.span.start + known - called.span.start)
        if caller.span.kind is Kind.CLIENT and called.span.kind is Kind.SERVER and not caller.span.failed:
            most = min(most, caller.span.end + known - called.span.end)
    if least <= 0 <= most:
        return 0
    if least > most:  # it went on after its answer, or the bounds contradict each other
        return max(int(least), 0)
    return int(least) if math.isinf(most) else (int(least) + int(most)) // 2
