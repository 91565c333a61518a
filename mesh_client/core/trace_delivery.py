"""What becomes of spans that the control plane did not take, and when it is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from mesh_client.core.model import StatusCode
from mesh_client.core.policy import Backoff
from mesh_client.core.retry import backoff_delay

BACKOFF = Backoff(initial=0.5, max=30.0, multiplier=2.0)
"""Between attempts, while no control plane can be reached."""
BACK_TO_FIRST = 60.0
"""Seconds after which the first control plane is tried again: all prefer it, so that a trace is in one place."""

_UNREACHED = frozenset({StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED, StatusCode.ABORTED})
_PAUSES = {
    StatusCode.RESOURCE_EXHAUSTED: 1.0,
    StatusCode.PERMISSION_DENIED: 10.0,
    StatusCode.UNAUTHENTICATED: 10.0,
    StatusCode.UNIMPLEMENTED: 60.0,
}
"""Seconds in which nothing is sent after such an answer: it would be refused for the same reason."""


@dataclass(frozen=True, slots=True)
class NextStep:
    """What to do after a request failed.

    Attributes:
        keep: send the same spans again.
        wait: seconds before anything is sent.
    """

    keep: bool
    wait: float


class Delivery:
    """Whom to send to, by how it went.

    Args:
        control_planes: how many there are, the preferred one first.
        rng: draws the waits.
    """

    def __init__(self, control_planes: int, rng: Random) -> None:
        self._control_planes = control_planes
        self._rng = rng
        self._index = 0
        self._left_first = 0.0
        self.failures = 0
        """Requests in a row that reached nobody."""

    def whom(self, now: float) -> int:
        """Which control plane to send to next."""
        if self._index and now - self._left_first >= BACK_TO_FIRST:
            self._index = 0
        return self._index

    def answered(self) -> None:
        """A request was answered."""
        self.failures = 0

    def failed(self, code: StatusCode, now: float) -> NextStep:
        """A request failed."""
        if code not in _UNREACHED:
            self.failures = 0
            return NextStep(False, _PAUSES.get(code, 0.0))
        self.failures += 1
        if not self._index:
            self._left_first = now
        self._index = (self._index + 1) % self._control_planes
        rounds, others = divmod(self.failures, self._control_planes)
        # Another one may be there: it is waited only after each has had its turn.
        return NextStep(True, 0.0 if others else backoff_delay(BACKOFF, min(rounds, 32), self._rng))
