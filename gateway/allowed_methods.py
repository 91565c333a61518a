"""Which HTTP methods a path has, for the ``Allow`` header of 405 (RFC 9110, section 15.5.6)."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.path_template import PathTemplate, Segment, Wildcard
from gateway.routes import RouteTable

_Shape = tuple[tuple[Segment, ...], str]

MAX_SHAPES = 10_000
"""Intersections are given up beyond it: the methods of some paths that several templates match are then incomplete."""


@dataclass(frozen=True, slots=True)
class AllowedMethods:
    """What holds for the paths that a template matches and that none of those before it in the order does."""

    template: PathTemplate
    """Without variables."""
    verbs: tuple[str, ...]
    """Sorted; never empty."""


def allowed_methods(table: RouteTable) -> tuple[AllowedMethods, ...]:
    """Every path that the table matches by any method, with all methods by which it does.

    Of the templates that match a path, the first one counts. Where templates overlap and neither covers the other,
    their intersection is among them.
    """
    verbs: dict[_Shape, set[str]] = {}
    for route in table.routes:
        verbs.setdefault(route.template.shape, set()).add(route.verb)
    stated = {shape: frozenset(found) for shape, found in verbs.items()}
    shapes = list(stated)
    for index, shape in enumerate(shapes):
        for other in shapes[:index]:
            both = _intersection(shape, other)
            if both is None:
                continue
            if both not in verbs and len(shapes) < MAX_SHAPES:
                verbs[both] = set()
                shapes.append(both)  # the loop comes to it
            if both in verbs:
                verbs[both] |= stated.get(shape, frozenset()) | stated.get(other, frozenset())
    found = [AllowedMethods(PathTemplate(shape[0], (), shape[1]), tuple(sorted(verbs[shape]))) for shape in shapes]
    return tuple(sorted(found, key=lambda item: item.template.precedence))


def _intersection(one: _Shape, other: _Shape) -> _Shape | None:
    """What matches exactly the paths that both match; None if there are none."""
    (left, left_verb), (right, right_verb) = one, other
    if any(
        mine != its and isinstance(mine, str) and isinstance(its, str) for mine, its in zip(left, right, strict=False)
    ):
        return None  # nearly all pairs
    if left_verb and right_verb and left_verb != right_verb:
        return None
    if left_verb != right_verb:
        # The verb is the end of a segment of the one that has none, which has to be a wildcard's.
        open_left = left if left_verb else _ends_with_wildcard(left)
        open_right = right if right_verb else _ends_with_wildcard(right)
        if open_left is None or open_right is None:
            return None
        left, right = open_left, open_right
    segments = _intersect(left, right)
    return None if segments is None else (segments, left_verb or right_verb)


def _ends_with_wildcard(segments: tuple[Segment, ...]) -> tuple[Segment, ...] | None:
    """Those of the paths whose last segment stands for a wildcard."""
    if not isinstance(segments[-1], Wildcard):
        return None
    if segments[-1] is Wildcard.MANY and not isinstance(segments[-2:][0], Wildcard):
        return (*segments[:-1], Wildcard.ONE, Wildcard.MANY)
    return segments


def _intersect(left: tuple[Segment, ...], right: tuple[Segment, ...]) -> tuple[Segment, ...] | None:
    found: list[Segment] = []
    for index in range(max(len(left), len(right))):
        mine, its = _at(left, index), _at(right, index)
        if mine is None or its is None:
            # One has ended; the other may, if what is left of it can be nothing.
            return tuple(found) if (left[index:] or right[index:]) == (Wildcard.MANY,) else None
        if mine is Wildcard.MANY and its is Wildcard.MANY:
            return (*found, Wildcard.MANY)
        literals = [segment for segment in (mine, its) if not isinstance(segment, Wildcard)]
        found.append(literals[0] if literals else Wildcard.ONE)
    return tuple(found)


def _at(segments: tuple[Segment, ...], index: int) -> Segment | None:
    """The segment at this place, as far as the template goes; `**` at its end goes on."""
    if index < len(segments):
        return segments[index]
    return Wildcard.MANY if segments[-1] is Wildcard.MANY else None
