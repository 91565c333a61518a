"""Where services stand in the picture of who calls whom: in layers, callers before those whom they call. Pure.

After Sugiyama, Tagawa & Toda (1981): cycles are cut, layers are longest paths, and within a layer services stand near
those that call them. The same calls give the same picture, whatever their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_SWEEPS = 4


def layers(services: Iterable[str], calls: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The services of each layer, in their order.

    Args:
        services: those that may neither call nor be called too.
        calls: caller and called.
    """
    distinct = set(calls)
    names = sorted({*services, *(name for call in distinct for name in call)})
    edges = sorted((caller, called) for caller, called in distinct if caller != called)
    below: dict[str, list[str]] = {name: [] for name in names}
    for caller, called in edges:
        below[caller].append(called)
    kept = _without_cycles(names, below)
    depth = dict.fromkeys(names, 0)
    # Callers come before those whom they call in this order, so each depth is final when it is read.
    for name in kept.order:
        for called in kept.below[name]:
            depth[called] = max(depth[called], depth[name] + 1)
    made: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in names:
        made[depth[name]].append(name)
    return _ordered(made, edges)


class _Acyclic:
    """Calls without those that close a ring, and services in an order in which callers come first."""

    def __init__(self, order: list[str], below: Mapping[str, list[str]]) -> None:
        self.order = order
        self.below = below


def _without_cycles(names: list[str], below: Mapping[str, list[str]]) -> _Acyclic:
    kept: dict[str, list[str]] = {name: [] for name in names}
    finished: list[str] = []
    state: dict[str, int] = {}
    called_by_others = {called for callees in below.values() for called in callees}
    # From those whom nobody calls, so that a ring is cut where it comes back to its entry.
    for root in sorted(names, key=lambda name: (name in called_by_others, name)):
        if root in state:
            continue
        state[root] = 1
        stack = [(root, iter(below[root]))]
        while stack:
            name, rest = stack[-1]
            called = next(rest, None)
            if called is None:
                state[name] = 2
                finished.append(name)
                stack.pop()
            elif state.get(called) != 1:
                kept[name].append(called)
                if called not in state:
                    state[called] = 1
                    stack.append((called, iter(below[called])))
    return _Acyclic(finished[::-1], kept)


def _ordered(made: list[list[str]], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Each layer by where the neighbours in others stand on average, a few times down and up (barycentre)."""
    neighbours: dict[str, list[str]] = {}
    for caller, called in edges:
        neighbours.setdefault(caller, []).append(called)
        neighbours.setdefault(called, []).append(caller)
    for sweep in range(_SWEEPS):
        places = {name: (place + 0.5) / len(layer) for layer in made for place, name in enumerate(layer)}
        for layer in made[1:] if sweep % 2 == 0 else made[-2::-1]:
            layer.sort(key=lambda name: (_mean([places[each] for each in neighbours.get(name, [name])]), name))
            places |= {name: (place + 0.5) / len(layer) for place, name in enumerate(layer)}
    return made


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 9)
