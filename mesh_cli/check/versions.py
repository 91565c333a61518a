"""Versions, as far as two of them have to be compared. Pure."""

from __future__ import annotations

import re

_NUMBERS = re.compile(r"\d+(?:\.\d+)*")
_BOUND = re.compile(r"(>=|<|==|>|<=)\s*(\d+(?:\.\d+)*)(?:\.\*)?")


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with; none of what is no version. ``1.85.1rc1`` is ``1.85.1`` here."""
    match = _NUMBERS.match(version)
    return () if match is None else tuple(map(int, match[0].split(".")))


def compatible(one: str, other: str) -> bool:
    """Whether two versions of grpc-mesh work together: while they begin with 0, if the first two numbers are equal."""
    mine, theirs = numbers(one), numbers(other)
    return mine[:2] == theirs[:2] if mine[:1] == (0,) else mine[:1] == theirs[:1]


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version is within bounds such as ``>=1.85.1,<2``. Bounds that are not understood hold."""
    found = numbers(version)
    for operator, text in _BOUND.findall(bounds):
        bound = numbers(text)
        length = max(len(found), len(bound))
        left, right = (each + (0,) * (length - len(each)) for each in (found, bound))
        held = {
            ">=": left >= right,
            "<=": left <= right,
            ">": left > right,
            "<": left < right,
            "==": found[: len(bound)] == bound,
        }[operator]
        if not held:
            return False
    return True
