"""What one server counts of the calls that it receives: by method and caller, those included that it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mesh_client.core.tally import MAX_METHODS, OTHER, Tally, is_method

MAX_CALLERS = 100
"""Callers of one server that are told apart; those that come later count for `OTHER` together."""
NOBODY = ""
"""The caller of a call whose caller has no identity of the mesh."""


class ServedBook:
    """The tallies of the calls that one server received, by method and caller.

    Whoever counts takes `of` a method once, when its handler is registered, and finds or makes a caller's tally there.

    Attributes:
        unauthorized: calls that were refused because of who called.
        rate_limited: calls that were refused by a rate limit.
        shed: calls that were refused because too many were in flight.
        peak: most calls in flight since `take_peak`.
    """

    def __init__(self) -> None:
        self._methods: dict[str, dict[str, Tally]] = {}
        self._callers: set[str] = set()
        self.unauthorized = 0
        self.rate_limited = 0
        self.shed = 0
        self.peak = 0

    def of(self, method: str) -> dict[str, Tally]:
        """The tallies of a full method name, by caller; of `OTHER` when there are too many, or it is no such name."""
        if method not in self._methods and (len(self._methods) >= MAX_METHODS or not is_method(method)):
            method = OTHER
        return self._methods.setdefault(method, {})

    def tally(self, of: dict[str, Tally], caller: str) -> Tally:
        """Where calls of a caller are counted, in what `of` returned."""
        if caller not in self._callers:
            if len(self._callers) >= MAX_CALLERS:
                caller = OTHER
            else:
                self._callers.add(caller)
        return of.setdefault(caller, Tally())

    def take_peak(self, in_flight: int) -> int:
        """Most calls in flight since the last time; ``in_flight`` are those of now."""
        peak, self.peak = max(self.peak, in_flight), in_flight
        return peak

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, Tally]]]:
        """Each method with its tallies by caller."""
        return iter(self._methods.items())
