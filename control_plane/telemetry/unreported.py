"""Calls of those who send no load reports, as the instances that were called received them. Pure.

Proxies at the edge, and whoever calls with a plain gRPC channel, do not report what they call. Servers do report what
they receive, by caller. Each edge is counted once, by one of the two: by what its caller says if it says anything of
that service within the window, else by what the service received.
"""

from __future__ import annotations

from collections.abc import Iterator

from control_plane.telemetry.timeline import CODE_NAMES, CODES, Counters
from control_plane.telemetry.window import INSTANCE, FailureKey, ReceivedKey, Window
from mesh_client.core.served import NOBODY
from mesh_client.core.tally import OTHER

_UNTOLD = (NOBODY, OTHER)
"""Callers that a server does not tell apart."""


class Unreported:
    """What callers that do not report did, for one question: it holds as long as the window is not written to.

    Args:
        window: what was reported.
    """

    def __init__(self, window: Window) -> None:
        self._window = window
        self._reported = {(key.caller, key.service) for key in window.edges.keys()}  # noqa: SIM118 - no dictionary
        self._called = {service for _, service in self._reported}
        self._folded = {caller for caller, service in self._reported if service == OTHER}

    def counts(self, caller: str, service: str) -> bool:
        """Whether an edge is counted by what the service received."""
        if caller in _UNTOLD:  # it may be any of those that report, as all are without identity
            return not self._folded and service not in self._called
        return caller not in self._folded and (caller, service) not in self._reported

    def edges(self, first: int, service: str = "") -> dict[tuple[str, str], Counters]:
        """By caller and service, from a step on; of one service, if it is given, its callers and its callees."""
        return self._window.served.grouped(
            first,
            lambda key: (
                (key.caller, key.service)
                if service in ("", key.caller, key.service) and self.counts(key.caller, key.service)
                else None
            ),
        )

    def to(self, service: str, first: int) -> Counters:
        """To one service, all callers together."""
        sums = self._window.served.grouped(
            first, lambda key: service if key.service == service and self.counts(key.caller, service) else None
        )
        return sums.get(service, {})

    def methods(self, service: str, first: int) -> dict[str, Counters]:
        """To one service, by method."""
        return self._window.received.grouped(first, lambda key: key.method if self._is_to(key, service) else None)

    def endpoints(self, service: str, first: int) -> dict[str, Counters]:
        """To one service, by instance."""
        return self._window.received.grouped(first, lambda key: key.instance_id if self._is_to(key, service) else None)

    def failures(self, first: int, service: str = "") -> dict[FailureKey, int]:
        """Calls that were not answered with OK, to one service if it is given. Why is not known."""
        sums = self._window.received.grouped(
            first,
            lambda key: (key.caller, key.service, key.method) if self._is_to(key, service or key.service) else None,
        )
        return {
            FailureKey(*names, CODE_NAMES[number], None): count
            for names, counters in sums.items()
            for number, count in counters.items()
            if number in CODE_NAMES and number != CODES["OK"] and count
        }

    def steps(self, first: int, caller: str | None, service: str | None) -> Iterator[tuple[int, Counters]]:
        """Each step of each edge: of a caller, to a service, or of both; None for any."""
        for key in self._window.served.keys():  # noqa: SIM118 - it is no dictionary
            wanted = caller in (None, key.caller) and service in (None, key.service)
            if wanted and self.counts(key.caller, key.service):
                yield from self._window.served.steps(key, first)

    def _is_to(self, key: ReceivedKey, service: str) -> bool:
        return (
            key.service == service
            and (key.caller, key.method) != (INSTANCE, INSTANCE)
            and self.counts(key.caller, service)
        )
