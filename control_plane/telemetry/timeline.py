"""Counters by the time at which they grew: a few minutes of it, in steps, small in memory. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping

from mesh_client.core.model import StatusCode

STEP = 10.0
"""Seconds."""
STEPS = 60
WINDOW = STEP * STEPS
"""Seconds that are kept."""

# Numbers of counters. Status codes count under their own numbers.
FIRST_BUCKET = 32
"""Bucket n of durations counts under this and n; see `mesh_client.core.tally.BOUNDS`."""
ATTEMPTS = 200
BUSY = 201
"""Microseconds that calls took together."""
PEAK = 202
"""Most calls in flight: the one counter that does not add up, the largest value counts."""
UNAUTHORIZED, RATE_LIMITED, SHED = 203, 204, 205
"""Calls that a server refused: for who called, by a rate limit, because too many were in flight."""

CODES = {code.name: int(code) for code in StatusCode}
CODE_NAMES = {number: name for name, number in CODES.items()}

_PARTS = 1_000_000
_LEAST = 1e-3
"""Seconds in which something happens at least."""
_NEVER = -(2**62)
"""Before every step."""
_MOST = 2**63
"""What a packed counter holds at most. No honest one comes near it."""

Counters = dict[int, int]


def count_of(counters: Mapping[int, int]) -> int:
    """How many calls ended."""
    return sum(count for counter, count in counters.items() if counter in CODE_NAMES)


def step_of(now: float) -> int:
    """The number of the step that a time, in seconds of any clock that only grows, is in."""
    return int(now // STEP)


class Timeline:
    """Counters of one thing, by step. The step that is written to is a dictionary, those before are packed."""

    __slots__ = ("_closed", "_open", "_step")

    def __init__(self) -> None:
        self._closed: dict[int, array[int]] = {}
        self._step = _NEVER
        self._open: Counters = {}

    def add(self, step: int, counters: Mapping[int, int]) -> None:
        """These grew by so much in a step."""
        if not counters:
            return
        if step > self._step:
            self._close()
            self._step = step
        held = self._open if step == self._step else _unpacked(self._closed.get(step))
        for counter, count in counters.items():
            known = held.get(counter, 0)
            held[counter] = max(known, count) if counter == PEAK else known + count
        if held is not self._open:
            self._closed[step] = _packed(held)

    def _close(self) -> None:
        if self._open:
            self._closed[self._step] = _packed(self._open)
            self._open = {}

    def steps(self, first: int) -> Iterator[tuple[int, Counters]]:
        """Each step from ``first`` on in which something grew, in no order, with its counters."""
        for step, packed in self._closed.items():
            if step >= first:
                yield step, _unpacked(packed)
        if self._open and self._step >= first:
            yield self._step, self._open

    def expire(self, first: int) -> bool:
        """Forgets the steps before ``first``; True when nothing is left."""
        for step in [step for step in self._closed if step < first]:
            del self._closed[step]
        if self._step < first:
            self._open = {}
        return not self._closed and not self._open


def add_up(total: Counters, parts: Iterable[Mapping[int, int]]) -> None:
    """Adds counters to those in ``total``."""
    for counters in parts:
        for counter, count in counters.items():
            known = total.get(counter, 0)
            total[counter] = max(known, count) if counter == PEAK else known + count


def _packed(counters: Counters) -> array[int]:
    return array("Q", [min(number, _MOST) for pair in counters.items() for number in pair])


def _unpacked(packed: array[int] | None) -> Counters:
    return {} if packed is None else dict(zip(packed[::2], packed[1::2], strict=True))


def spread(counters: Mapping[int, int], now: float, interval: float) -> Iterator[tuple[int, Counters]]:
    """Shares out what grew within ``interval`` seconds before ``now`` to the steps that it lies in.

    Nothing is known but the sum, so each step gets its part by time, in whole numbers that add up to the sum. Steps
    that are not kept any more are left out.
    """
    last = step_of(now)
    first = max(step_of(now - interval), last - STEPS + 1)
    if first == last and now - interval >= last * STEP:
        yield last, dict(counters)
        return
    begin, length = now - interval, max(interval, _LEAST)
    for step in range(first, last + 1):
        # The part up to the end of a step, in millionths, so that whole numbers decide and none is lost.
        before = max(0, round((step * STEP - begin) / length * _PARTS))
        upto = _PARTS if step == last else round(((step + 1) * STEP - begin) / length * _PARTS)
        part = {
            counter: share
            for counter, count in counters.items()
            if (share := count if counter == PEAK else count * upto // _PARTS - count * before // _PARTS)
        }
        if part:
            yield step, part
