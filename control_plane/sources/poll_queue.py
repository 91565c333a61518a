"""Whose turn it is among services that have no watch of their own. Pure.

Consul allows 200 connections per client address by default, so past a number of services the rest is polled: at once
when something says that they may have changed, and now and then to be sure.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush


class PollQueue:
    """Services, each polled when triggered and every ``interval`` seconds.

    Args:
        interval: longest time between two polls of a service, seconds.
    """

    def __init__(self, interval: float = 30.0) -> None:
        self._interval = interval
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._taken: dict[str, bool] = {}
        """Being polled now, and whether to do so once more."""

    @property
    def services(self) -> frozenset[str]:
        """Every service that is polled."""
        return frozenset((*self._due, *self._taken))

    def add(self, service: str, now: float) -> None:
        """A service to poll, for the first time at once. Does nothing for one that is there."""
        if service not in self._due and service not in self._taken:
            self._schedule(service, now)

    def discard(self, service: str) -> None:
        """No need to poll the service any more. Does nothing for one that is not there."""
        self._due.pop(service, None)
        self._taken.pop(service, None)

    def trigger(self, services: Iterable[str], now: float) -> None:
        """Some services may have changed: they are polled now, those that are being polled once more.

        Args:
            services: those that are not here are ignored.
            now: monotonic seconds; later than now to do so only then.
        """
        for service in services:
            if service in self._due:
                self._schedule(service, min(now, self._due[service]))
            elif service in self._taken:
                self._taken[service] = True

    def next_due(self) -> float | None:
        """When `take` has something to give, monotonic seconds; None when nothing waits."""
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def take(self, now: float) -> str | None:
        """The service to poll next, or None when none is due. It is to be `put_back`."""
        due = self.next_due()
        if due is None or due > now:
            return None
        service = heappop(self._heap)[1]
        del self._due[service]
        self._taken[service] = False
        return service

    def put_back(self, service: str, now: float, delay: float | None = None) -> None:
        """The service was polled; at once again if it was triggered meanwhile, never again if it was discarded.

        Args:
            service: that was taken.
            now: monotonic seconds.
            delay: seconds until its next turn; None: the interval.
        """
        again = self._taken.pop(service, None)
        if again is not None:
            self._schedule(service, now if again else now + (self._interval if delay is None else delay))

    def _schedule(self, service: str, due: float) -> None:
        if self._due.get(service) != due:
            self._due[service] = due
            heappush(self._heap, (due, service))
