"""Load of one endpoint as this client sees it: calls in flight and a peak-sensitive moving average of latency."""

from __future__ import annotations

import math

from mesh_client.core.errors import InvalidTransitionError
from mesh_client.core.model import Outcome

DEFAULT_DECAY = 10.0
"""Seconds; Finagle's default time constant of the average."""

UNMEASURED_PENALTY = 1e6
"""Cost in seconds of an endpoint that has calls in flight and has answered none yet (Finagle's ``penalty``).

A new endpoint gets one call at a time until its first answer, instead of all of them because it looks fast.
"""

FAILURE_LATENCY = 1.0
"""Seconds that a failed call counts for at least, so that an endpoint that fails at once does not look fast."""

_SUCCESS = Outcome.SUCCESS
_NEUTRAL = Outcome.NEUTRAL


class EndpointLoad:
    """Live load of one endpoint. Reading it never changes it.

    The latency average follows Finagle's ``PeakEwma``
    (https://github.com/twitter/finagle/blob/develop/finagle-core/src/main/scala/com/twitter/finagle/loadbalancer/p2c/P2CPeakEwma.scala):
    it jumps to a higher latency at once and falls to a lower one exponentially. Unlike Finagle's, a read does not store
    the decayed value (linkerd2-proxy ``ewma``).

    Attributes:
        outstanding: calls in flight.
    """

    __slots__ = ("_cost", "_decay", "_measured_at", "outstanding")

    def __init__(self, decay: float = DEFAULT_DECAY) -> None:
        """``decay`` is the time constant of the average in seconds, above 0."""
        self.outstanding = 0
        self._decay = decay
        self._cost = 0.0
        self._measured_at = 0.0

    def start(self, now: float) -> None:
        """A call begins."""
        self.outstanding += 1

    def finish(self, started_at: float, now: float, outcome: Outcome) -> None:
        """A call that began at ``started_at`` ends.

        A success moves the average. A failure counts as `FAILURE_LATENCY` at least and never lowers it. When the
        caller gave up, the time it waited is a lower bound of the latency: it may raise the average, never lower it.

        Raises:
            InvalidTransitionError: no call is in flight.
        """
        if not self.outstanding:
            raise InvalidTransitionError("a call finished on an endpoint that has none in flight")
        self.outstanding -= 1
        latency = now - started_at
        cost = self._cost
        remaining = math.exp((self._measured_at - now) / self._decay) if cost else 0.0
        if outcome is not _SUCCESS:
            if outcome is not _NEUTRAL and latency < FAILURE_LATENCY:
                latency = FAILURE_LATENCY
            if latency <= cost * remaining:
                return
        self._cost = latency if latency > cost else latency + (cost - latency) * remaining
        self._measured_at = now

    def latency_cost(self, now: float) -> float:
        """Expected cost in seconds of one more call: decayed peak latency times the calls that would be in flight."""
        cost = self._cost
        if cost:
            return cost * math.exp((self._measured_at - now) / self._decay) * (self.outstanding + 1)
        return UNMEASURED_PENALTY + self.outstanding if self.outstanding else 0.0
