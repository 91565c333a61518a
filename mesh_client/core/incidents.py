"""What a client remembers of what is rare: failed calls, ejections, transitions of the breaker. All of it bounded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mesh_client.core.breaker import BreakerState
from mesh_client.core.errors import MeshErrorDetail, Reason
from mesh_client.core.outlier import Ejection, EjectionReason

MAX_EXAMPLES = 50
"""Groups of failed calls, by method, status and reason, of which an example is kept: those that failed last."""
MAX_EVENTS = 50
"""Ejections that are remembered, and transitions."""

T = TypeVar("T")

FailureKey = tuple[str, str, Reason]
"""Method, name of the status, and reason."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One transition of a service's breaker."""

    at: float
    old: BreakerState
    new: BreakerState


@dataclass(frozen=True, slots=True)
class Example:
    """The last failed call of its group."""

    detail: MeshErrorDetail
    at: float


class EventLog(Generic[T]):
    """The last `MAX_EVENTS` events. Each has a number, from 1, so that a reader can go on where it stopped."""

    __slots__ = ("_held", "count")

    def __init__(self) -> None:
        self._held: deque[T] = deque(maxlen=MAX_EVENTS)
        self.count = 0
        """How many there ever were: the number of the last one."""

    def append(self, event: T) -> None:
        """One more happened."""
        self._held.append(event)
        self.count += 1

    def after(self, number: int) -> Sequence[T]:
        """Those with a higher number that are still held, oldest first."""
        missed = self.count - number
        return list(self._held)[-missed:] if missed > 0 else []


class Incidents:
    """What happened to one service, as one client saw it.

    Attributes:
        examples: the last failed call of each group; the group that failed last is the last one.
        ejections: of endpoints.
        ejected: how many there were, by reason.
        transitions: of the breaker.
        entered: how often the breaker entered each state.
    """

    __slots__ = ("ejected", "ejections", "entered", "examples", "transitions")

    def __init__(self) -> None:
        self.examples: dict[FailureKey, Example] = {}
        self.ejections: EventLog[Ejection] = EventLog()
        self.ejected: Counter[EjectionReason] = Counter()
        self.transitions: EventLog[Transition] = EventLog()
        self.entered: Counter[BreakerState] = Counter()

    def failed(self, key: FailureKey, detail: MeshErrorDetail, now: float) -> None:
        """A call failed for good, by the fault of the service or of the mesh."""
        self.examples.pop(key, None)
        self.examples[key] = Example(detail, now)
        if len(self.examples) > MAX_EXAMPLES:
            del self.examples[next(iter(self.examples))]

    def ejection(self, ejection: Ejection) -> None:
        """An endpoint was ejected."""
        self.ejections.append(ejection)
        self.ejected[ejection.reason] += 1

    def transition(self, transition: Transition) -> None:
        """The breaker changed its state."""
        self.transitions.append(transition)
        self.entered[transition.new] += 1
